"""Two tenants, one of whom wants ten times as much: the real scheduler against a simulated clock, and over HTTP."""

from pathlib import Path

import pytest

from ops.bench.engine.fairness import Tenant, bench_fairness, simulate
from ops.bench.service.fairness_http import bench_fairness_http

ROOT = Path(__file__).parents[2]


def test_a_small_tenant_gets_its_share_and_its_answers_in_time() -> None:
    (result,) = bench_fairness([0.3], 120)
    assert result["of_fair_share"] >= 0.9
    assert result["ttft_p50_ratio"] <= 1.5
    assert result["greedy"]["output_throughput"] >= 0.5 * result["capacity"], "what the small one leaves is used"


def test_two_that_both_want_too_much_share_by_weight() -> None:
    both = simulate([Tenant("one", 20.0, weight=2.0), Tenant("two", 20.0)], 120)
    ratio = both["one"]["output_throughput"] / both["two"]["output_throughput"]
    assert 1.8 < ratio < 2.2


@pytest.mark.slow
def test_two_keys_of_a_deployed_service() -> None:
    """How fast either is served is a matter of the machine; who is refused, and what is metered, is not."""
    result = bench_fairness_http(ROOT / "ray_config.yaml", [0.25], 15.0)
    (row,) = result["shares"]
    assert row["small"]["refused"] == row["alone"]["refused"] == 0
    assert row["greedy"]["refused"] > 0
    assert row["small"]["output_throughput"] > 0.5 * row["fair_share_tokens_per_s"]
    assert result["tokens_metered"] == result["tokens_received"]

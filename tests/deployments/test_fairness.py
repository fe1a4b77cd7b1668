"""Two tenants, one of whom wants ten times as much: the real scheduler against a simulated clock."""

from deployments.bench.fairness import Tenant, bench_fairness, simulate


def test_a_small_tenant_gets_its_share_and_its_answers_in_time() -> None:
    (result,) = bench_fairness([0.3], 120)
    assert result["of_fair_share"] >= 0.9
    assert result["ttft_p50_ratio"] <= 1.5
    assert result["greedy"]["output_throughput"] >= 0.5 * result["capacity"], "what the small one leaves is used"


def test_two_that_both_want_too_much_share_by_weight() -> None:
    both = simulate([Tenant("one", 20.0, weight=2.0), Tenant("two", 20.0)], 120)
    ratio = both["one"]["output_throughput"] / both["two"]["output_throughput"]
    assert 1.8 < ratio < 2.2

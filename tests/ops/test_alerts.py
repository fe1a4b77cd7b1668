"""Alerts: each fires on series that are sick and on nothing else, says promtool; each has its place in the runbook."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ops.watch.alerts import ALERTS, RUNBOOK, rules_json

LABELS = 'application="caravan",replica="r1"'
P = "ray_caravan_"
Series = list[tuple[str, str]]


def of(name: str, labels: str, values: str) -> tuple[str, str]:
    return f"{P}{name}{{{LABELS}{labels}}}", values


def stages(*busy: int) -> Series:
    """Stages that need so many seconds for a thousand steps a minute."""
    seconds = [of("stage_busy_seconds_total", f',stage="{i}"', f"0+{n}x30") for i, n in enumerate(busy)]
    return seconds + [of("stage_steps_total", f',stage="{i}"', "0+1000x30") for i in range(len(busy))]


def first_tokens(within_limit: int) -> Series:
    """Of 100 requests a minute so many see their first token within 2.5 s."""
    edges = (("2.5", within_limit), ("5", 100), ("+Inf", 100))
    return [of("ttft_seconds_bucket", f',le="{le}"', f"0+{n}x30") for le, n in edges]


# Series of a minute a sample, and the minute at which the alert must fire.
SICK: dict[str, tuple[Series, int]] = {
    "CaravanNoTokens": ([of("last_token_age_seconds", "", "10 70 130 190")], 3),
    "CaravanStreamsBroken": ([of("streams_broken_total", "", "0 0 1 1 1")], 4),
    "CaravanStageSick": (stages(30, 30, 55), 25),
    "CaravanPipelineFlaps": ([of("recoveries_total", ',cause="killed"', "0+1x10")], 8),
    "CaravanSlowFirstToken": (first_tokens(80), 25),
    "CaravanRefusing": ([of("refused_total", ',tenant="a",reason="overloaded"', "0+5x30")], 25),
    "CaravanCacheFull": ([of("kv_blocks_used", "", "99+0x30"), of("kv_blocks_total", "", "100+0x30")], 25),
}
HEALTHY: Series = [
    of("last_token_age_seconds", "", "1+0x30"),
    of("streams_broken_total", "", "3+0x30"),
    *stages(30, 31, 29),
    of("recoveries_total", ',cause="killed"', "0 1+0x29"),
    *first_tokens(99),
    of("refused_total", ',tenant="a",reason="rate_limit_exceeded"', "0+5x30"),
    of("kv_blocks_used", "", "90+0x30"),
    of("kv_blocks_total", "", "100+0x30"),
]


def case(series: Series, minute: int, firing: str) -> dict[str, Any]:
    """promtool's unit test: at `minute` exactly the alert `firing` fires, or none of all."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{firing}"}}', "value": 1}] if firing else [],
            }
        ],
    }


def test_promtool_sees_each_alert_fire_and_no_other(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (part of Prometheus) is not installed")
    (tmp_path / "rules.yml").write_text(rules_json())
    tests = [case(series, minute, name) for name, (series, minute) in SICK.items()] + [case(HEALTHY, 30, "")]
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_and_its_place_in_the_runbook() -> None:
    names = {alert.name for alert in ALERTS}
    assert set(SICK) == names
    runbook = Path(__file__).parents[2] / RUNBOOK
    headings = {
        line.removeprefix("### ") for line in runbook.read_text().splitlines() if line.startswith("### Caravan")
    }
    assert headings == names

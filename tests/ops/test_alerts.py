"""Alerts, judged by promtool: each fires on series that are sick, and not on those that nearly are.

An hour with an update and a dead stage pages nobody, an outage pages within two minutes. What a real service makes of
the rules: tests/ops/test_watch_deployed.py.
"""

import json
import re
import shutil
import subprocess
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ops.cli import app
from ops.watch.alerts import BURNS, CAUSES, RUNBOOK, alerts, rules
from ops.watch.objectives import objectives

P = "ray_caravan_"
MINUTE = 4  # samples, one every 15 s
HOUR = 60 * MINUTE
CALM, HALF = 15 * MINUTE, 30 * MINUTE  # before something happens
Series = dict[str, str]


def of(name: str, replica: str = "r1", **labels: str) -> str:
    return (
        f"{P}{name}{{"
        + ",".join(f'{k}="{v}"' for k, v in {"application": "c", "replica": replica, **labels}.items())
        + "}"
    )


def counter(*phases: tuple[float, int], start: float = 0) -> str:
    """So much more with every sample, for so many samples."""
    parts, value = [], start
    for rate, samples in phases:
        parts.append(f"{value:g}+{rate:g}x{samples - 1}")
        value += rate * samples
    return " ".join(parts)


def gauge(*phases: tuple[float | None, int]) -> str:
    """None: there is no such series then."""
    return " ".join(f"_x{n}" if value is None else f"{value:g}+0x{n - 1}" for value, n in phases)


def engine(replica: str, before: int = 0, samples: int = 2 * HOUR, steps: int = 300, stages: int = 4) -> Series:
    """One that works well for so many samples, after not being there; two stages a node."""

    def there(value: float) -> str:
        return gauge((None, before), (value, samples)) if before else gauge((value, samples))

    def counts(rate: float) -> str:
        return (f"_x{before} " if before else "") + counter((rate, samples))

    found = {
        of("ready", replica): there(1), of("weights_loaded_ratio", replica): there(1),
        of("last_token_age_seconds", replica): there(0.5), of("running", replica): there(8),
        of("waiting", replica): there(0), of("kv_blocks_used", replica): there(50),
        of("kv_blocks_total", replica): there(100), of("preemptions_total", replica): counts(0),
        of("queue_wait_seconds_count", replica): counts(15), of("recoveries_total", replica, cause="killed"): counts(0),
    }  # fmt: skip
    for stage in range(stages):
        busy = 10 + stage % 2  # no two stages are alike
        found[of("stage_busy_seconds_total", replica, stage=str(stage))] = counts(busy)
        found[of("stage_steps_total", replica, stage=str(stage))] = counts(steps)
        found[of("stage_info", replica, stage=str(stage), node=f"10.0.0.{stage // 2}", gpu=str(stage % 2))] = there(1)
    return found


ERRORS = of("requests_total", "g1", endpoint="chat", outcome="error", status="503")
OVERLOADED = of("refused_total", "g1", tenant="a", reason="overloaded")


def gateway(*, errors: str = "", broken: str = "", samples: int = 2 * HOUR) -> Series:
    """Two requests a second."""
    return {
        of("open_requests", "g1"): gauge((5, samples)),
        of("requests_total", "g1", endpoint="chat", outcome="stop", status="200"): counter((30, samples)),
        ERRORS: errors or counter((0, samples)),
        of("requests_total", "g1", endpoint="probe", outcome="error", status="503"): counter((3, samples)),
        of("requests_total", "g1", endpoint="chat", outcome="rejected", status="400"): counter((9, samples)),
        OVERLOADED: counter((0, samples)),
        of("refused_total", "g1", tenant="a", reason="rate_limit_exceeded"): counter((90, samples)),
        of("streams_broken_total", "g1"): broken or counter((0, samples)),
        **latency("ttft_seconds", "2.5", (30, 30, samples)),
        **latency("inter_token_seconds", "0.1", (3000, 2995, samples)),
    }


def first_tokens(*phases: tuple[float, float, int]) -> Series:
    return latency("ttft_seconds", "2.5", *phases)


def gaps(*phases: tuple[float, float, int]) -> Series:
    return latency("inter_token_seconds", "0.1", *phases)


def latency(name: str, limit: str, *phases: tuple[float, float, int]) -> Series:
    """So many with every sample, and so many of them within the limit."""
    return {
        of(f"{name}_count", "g1"): counter(*((all_, n) for all_, _, n in phases)),
        of(f"{name}_bucket", "g1", le=limit): counter(*((good, n) for _, good, n in phases)),
    }


def all_engines(name: str, values: str) -> Series:
    return {of(name, replica): values for replica in ("r1", "r2")}


HEALTHY: Series = {**engine("r1"), **engine("r2"), **gateway()}
# What is sick after a calm time, after how many minutes the alert must be there, and which ones are.
SICK: dict[str, tuple[Series, float, set[str]]] = {
    "CaravanErrors": (
        {ERRORS: counter((0, CALM), (1.5, HOUR))},
        25, {"CaravanErrors"},  # 5 % of answers
    ),
    "CaravanErrorsSlowly": (
        {ERRORS: counter((0.1, 2 * HOUR))},
        59, {"CaravanErrorsSlowly"},  # 0.3 %, from the beginning
    ),
    "CaravanSlowFirstToken": (first_tokens((30, 30, CALM), (30, 3, HOUR)), 2, {"CaravanSlowFirstToken"}),
    "CaravanSlowFirstTokenSlowly": (first_tokens((30, 28, 2 * HOUR)), 59, {"CaravanSlowFirstTokenSlowly"}),
    "CaravanSlowTokens": (
        gaps((3000, 2995, CALM), (3000, 2000, HOUR)), 30, {"CaravanSlowTokens"},
    ),
    "CaravanSlowTokensSlowly": (
        gaps((3000, 2940, 2 * HOUR)), 59, {"CaravanSlowTokensSlowly"},
    ),
    "CaravanAbsent": ({name: values.replace("x479", "x59") for name, values in HEALTHY.items()}, 7, {"CaravanAbsent"}),
    "CaravanNoPipeline": (all_engines("ready", gauge((1, CALM), (0, HOUR))), 2, {"CaravanNoPipeline"}),
    "CaravanDemandUnserved": (
        all_engines("waiting", gauge((0, CALM), (250, HOUR))) | first_tokens((30, 30, CALM), (0, 0, HOUR)),
        2, {"CaravanDemandUnserved"},
    ),
    "CaravanNoTokens": ({of("last_token_age_seconds"): gauge((0.5, CALM), (45, HOUR))}, 1, {"CaravanNoTokens"}),
    "CaravanStreamsBroken": (
        {of("streams_broken_total", "g1"): counter((0, CALM), (1, 1), (0, HOUR))}, 0.5, {"CaravanStreamsBroken"},
    ),
    "CaravanOverloaded": (
        {OVERLOADED: counter((0, CALM), (40, HOUR))}, 2,
        {"CaravanOverloaded"},
    ),
    "CaravanRefusing": (
        {OVERLOADED: counter((0, CALM), (5, HOUR))}, 12, {"CaravanRefusing"},
    ),
    "CaravanLoadingTooLong": ({of("ready"): gauge((1, CALM), (0, HOUR))}, 31, {"CaravanLoadingTooLong"}),
    "CaravanStageSick": (
        {of("stage_busy_seconds_total", stage="2"): counter((10, CALM), (15, HOUR))}, 11, {"CaravanStageSick"},
    ),
    "CaravanPipelineFlaps": (
        {of("recoveries_total", cause="killed"): counter((0, CALM), (1, 4), (0, HOUR))}, 3, {"CaravanPipelineFlaps"},
    ),
    "CaravanReplicasFlap": (
        {of("weights_loaded_ratio", f"d{i}"): gauge((None, CALM + 8 * i), (1, 8), (None, HOUR)) for i in range(6)}, 18,
        {"CaravanReplicasFlap"},
    ),
    "CaravanCacheFull": (
        {of("kv_blocks_used"): gauge((50, CALM), (99, HOUR)), of("waiting"): gauge((0, CALM), (2, HOUR))}, 16,
        {"CaravanCacheFull"},
    ),
    "CaravanPreemptionStorm": (
        {of("preemptions_total"): counter((0, CALM), (6, HOUR))}, 16, {"CaravanPreemptionStorm"},
    ),
}  # fmt: skip
# What must not be an alarm, and until when.
NEARLY: dict[str, tuple[Series, float]] = {
    "CaravanErrors": ({ERRORS: counter((0, CALM), (2, 2), (0, HOUR))}, 20),
    "CaravanErrorsSlowly": ({ERRORS: counter((0.02, 2 * HOUR))}, 59),
    "CaravanSlowFirstToken": (first_tokens((30, 30, CALM), (30, 10, 4), (30, 30, HOUR)), 20),
    "CaravanSlowFirstTokenSlowly": (first_tokens((30, 29, 2 * HOUR)), 59),
    "CaravanSlowTokens": (gaps((3000, 2995, CALM), (3000, 1600, 4), (3000, 2995, HOUR)), 20),
    "CaravanSlowTokensSlowly": (gaps((3000, 2975, 2 * HOUR)), 59),
    "CaravanAbsent": ({name: "stale" for name in HEALTHY if 'replica="r1"' in name}, 59),
    "CaravanNoPipeline": (  # it loads, slowly
        all_engines("ready", gauge((1, CALM), (0, HOUR)))
        | all_engines("weights_loaded_ratio", gauge((1, CALM)) + " " + counter((0.004, HOUR))), 29,
    ),
    "CaravanDemandUnserved": (all_engines("waiting", gauge((0, CALM), (250, HOUR))), 20),
    "CaravanNoTokens": ({of("last_token_age_seconds"): gauge((0.5, CALM), (20, 1), (29, 1), (0, HOUR))}, 5),
    "CaravanStreamsBroken": ({of("streams_broken_total", "g1"): counter((0, 2 * HOUR), start=64)}, 30),
    "CaravanOverloaded": ({OVERLOADED: counter((0, CALM), (20, 8), (0, HOUR))}, 9),
    "CaravanRefusing": ({OVERLOADED: counter((0, CALM), (20, 8), (0, HOUR))}, 30),
    "CaravanLoadingTooLong": ({of("ready"): gauge((1, CALM), (0, 100), (1, HOUR))}, 50),
    "CaravanStageSick": ({of("stage_busy_seconds_total", stage="2"): counter((10, CALM), (12.5, HOUR))}, 40),
    "CaravanPipelineFlaps": (
        {of("recoveries_total", cause="killed"): counter((0, CALM), (1, 1), (0, 20), (1, 1), (0, HOUR))}, 20,
    ),
    "CaravanReplicasFlap": (  # an update of all
        {of("weights_loaded_ratio", f"d{i}"): gauge((None, CALM), (1, 8), (None, HOUR)) for i in range(2)}, 15,
    ),
    "CaravanCacheFull": ({of("kv_blocks_used"): gauge((50, CALM), (99, HOUR))}, 30),  # and nobody waits
    "CaravanPreemptionStorm": ({of("preemptions_total"): counter((0, CALM), (2, HOUR))}, 30),
}  # fmt: skip
# What promtool once called no alert, each after half a healthy hour.
OUTAGES: dict[str, Series] = {
    "all series are gone": {name: values.replace("x479", "x119") + " stale" for name, values in HEALTHY.items()},
    "stuck loading": all_engines("ready", gauge((1, HALF), (0, HOUR)))
    | all_engines("weights_loaded_ratio", gauge((1, HALF), (0.43, HOUR))),
    "half of all requests end with an error": {
        of("requests_total", "g1", endpoint="chat", outcome="stop", status="200"): counter((30, HALF), (15, HOUR)),
        ERRORS: counter((0, HALF), (15, HOUR)),
    },
    "500 wait and nobody gets a first token": all_engines("waiting", gauge((0, HALF), (250, HOUR)))
    | first_tokens((30, 30, HALF), (0, 0, HOUR)),
    "tokens come ten times too slowly": gaps((3000, 2995, HALF), (300, 0, HOUR)),
    "64 streams break in a counter that was not there": {
        of("streams_broken_total", "g2"): f"_x{HALF} 64+0x{HOUR}",
    },
}


PAGES = 'count(ALERTS{alertstate="firing",severity="page"})'


def case(series: Series, expectations: list[tuple[float, set[str] | None]], severity: str = "") -> dict[str, Any]:
    """promtool's unit test: at these minutes exactly these alerts fire; None: any that pages."""
    labels = f',severity="{severity}"' if severity else ""
    count = f'count by (alertname) (ALERTS{{alertstate="firing"{labels}}})'
    return {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"{PAGES if names is None else count} > bool 0",
                "eval_time": f"{round(minute * 60)}s",
                "exp_samples": [{"labels": "{}", "value": 1}]
                if names is None
                else [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)],
            }
            for minute, names in expectations
        ],
    }  # fmt: skip


def promtool(tmp_path: Path, tests: list[dict[str, Any]], evaluated: str = "15s") -> None:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool (part of Prometheus) is not installed")
    made = rules()
    for group in made["groups"]:
        group["interval"] = evaluated
    (tmp_path / "rules.yml").write_text(json.dumps(made))
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": evaluated, "tests": tests}))
    done = subprocess.run([found, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_on_what_it_is_for_and_no_other_does(tmp_path: Path) -> None:
    assert set(SICK) == {alert.name for alert in alerts(objectives())}
    promtool(
        tmp_path,
        [case(HEALTHY | sick, [(15 + ceil(minute) + 1, names)]) for sick, minute, names in SICK.values()],
        "1m",
    )


def test_no_alert_fires_on_what_is_nearly_sick(tmp_path: Path) -> None:
    assert set(NEARLY) == set(SICK)
    promtool(
        tmp_path,
        [case(HEALTHY | series, [(15 + k, set()) for k in range(int(until) + 1)]) for series, until in NEARLY.values()],
        "1m",
    )  # fmt: skip


def test_an_outage_pages_within_two_minutes(tmp_path: Path) -> None:
    promtool(tmp_path, [case(HEALTHY | sick, [(29.75, set()), (32, None)]) for sick in OUTAGES.values()])


def test_an_hour_with_an_update_and_a_dead_stage_pages_nobody(tmp_path: Path) -> None:
    """Two pipelines are replaced one after the other; then a stage of the second is killed and rebuilt in 12 s."""
    update = 2 * MINUTE  # that a new one takes to load
    series = gateway() | first_tokens((30, 30, HOUR), (30, 26, 2), (30, 30, HOUR))
    series |= gaps((3000, 2995, 100), (3000, 2960, 2), (3000, 2995, 2 * HOUR))
    for i, (old, new) in enumerate((("r1", "r3"), ("r2", "r4"))):
        begun = 80 + 20 * i
        series |= {name: f"{values} stale" for name, values in engine(old, samples=begun + update).items()}
        series |= engine(new, before=begun + update, samples=2 * HOUR)
        series[of("weights_loaded_ratio", new)] = f"_x{begun} " + counter((1 / update, update)) + " " + gauge((1, HOUR))
        series[of("ready", new)] = gauge((None, begun), (0, update), (1, HOUR))
    series[of("ready", "r4")] += " 0 1+0x200"
    series[of("recoveries_total", "r4", cause="killed")] += " 1+0x200"
    series[of("streams_resumed_total", "g1", cause="rebuilding")] = counter((0, HOUR), (32, 1), (0, HOUR))
    promtool(tmp_path, [case(series, [(minute / 2, set()) for minute in range(2 * 60)])])


def test_the_sick_stage_is_named_with_its_node(tmp_path: Path) -> None:
    """One of 4 on one of 4 pipelines, 1.5 times as slow as before."""
    series = {**gateway()}
    for replica in ("r1", "r2", "r3", "r4"):
        series |= engine(replica)
    series[of("stage_busy_seconds_total", "r3", stage="2")] = counter((10, CALM), (15, HOUR))
    test = case(series, [(27, {"CaravanStageSick"})])
    labels = {"application": "c", "replica": "r3", "stage": "2", "node": "10.0.0.1", "gpu": "0", "severity": "ticket"}
    test["alert_rule_test"] = [
        {
            "eval_time": "27m",
            "alertname": "CaravanStageSick",
            "exp_alerts": [
                {
                    "exp_labels": labels,
                    "exp_annotations": {
                        "summary": "Stage 2 of r3 on 10.0.0.1 takes 1.5 times as long for a step as the fastest stage"
                        " of its pipeline",
                        "runbook_url": f"{RUNBOOK}#caravanstagesick",
                    },
                }
            ],
        }
    ]
    promtool(tmp_path, [test])


def test_two_stages_are_enough_to_tell_which_is_sick(tmp_path: Path) -> None:
    series = {**gateway(), **engine("r1", stages=2)}
    series[of("stage_busy_seconds_total", "r1", stage="0")] = counter((10, CALM), (15, HOUR))
    promtool(tmp_path, [case(series, [(15, set()), (27, {"CaravanStageSick"})])])


def test_every_alert_has_its_section_which_says_what_to_look_at_and_what_to_type() -> None:
    runbook = (Path(__file__).parents[2] / RUNBOOK).read_text()
    sections = dict(re.findall(r"^### (Caravan\w+)\n(.*?)(?=^###? |\Z)", runbook, re.MULTILINE | re.DOTALL))
    assert set(sections) == {alert.name for alert in alerts(objectives())}
    for name, text in sections.items():
        assert "**Look:**" in text, name
        assert "**Type:**" in text, name
        assert re.search(r"`[^`]+`", text.partition("**Type:**")[2]), f"{name}: nothing to type"


def test_links_lead_to_the_runbook_wherever_it_is(tmp_path: Path) -> None:
    out = tmp_path / "rules.yml"
    arguments = [
        "alerts",
        "--output",
        str(out),
        "--runbook-url",
        "https://wiki.example/runbook",
        "--first-token-s",
        "5",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    made = [rule for group in json.loads(out.read_text())["groups"] for rule in group["rules"] if "alert" in rule]
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in made}
    assert links["CaravanAbsent"] == "https://wiki.example/runbook#caravanabsent"
    assert len(links) == len(CAUSES) + 2 * len(BURNS)
    assert 'le=\\"5.0\\"' in out.read_text()
    refused = CliRunner().invoke(app, ["alerts", "--first-token-s", "3"])
    assert refused.exit_code != 0
    assert "2.5" in refused.output


def test_having_no_engine_is_no_alarm_where_there_may_be_none() -> None:
    absent = [
        next(
            rule["expr"] for rule in rules(scale_to_zero=zero)["groups"][1]["rules"] if rule["alert"] == "CaravanAbsent"
        )
        for zero in (False, True)
    ]
    assert ["weights_loaded" in expression for expression in absent] == [True, False]


def test_shorter_windows_are_the_same_rules(tmp_path: Path) -> None:
    text = json.dumps(rules(shortened=20))
    assert "[3m]" not in text
    assert "[180s]" in text  # an hour
    (tmp_path / "rules.yml").write_text(text)
    if (found := shutil.which("promtool")) is not None:
        subprocess.run([found, "check", "rules", str(tmp_path / "rules.yml")], check=True, capture_output=True)

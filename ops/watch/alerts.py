"""Alerts for Prometheus: `caravan alerts`. Burn rates are of the table of objectives; ops/runbook.md says what to do.

Rules are evaluated every 15 s and want metrics that are scraped as often, of a Ray that reports them as often.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from deployments.metrics import EXPORTED_PREFIX, METRICS
from ops.watch.objectives import Objective, Severity, burning, objectives, recording_rules

RUNBOOK = "ops/runbook.md"
BY = "application, replica"
EVALUATED = "15s"
SICK = 1.3  # times the fastest stage of its pipeline
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def step_seconds(window: str = "5m", where: str = "") -> str:
    """Seconds of a step, per stage."""
    busy, steps = (f"rate({{{name}}}{where}[{window}])" for name in ("stage_busy_seconds_total", "stage_steps_total"))
    return f"(sum by ({BY}, stage) ({busy}) / (sum by ({BY}, stage) ({steps}) > 0))"


def with_node(expression: str, where: str = "") -> str:
    """With the labels node and gpu of each stage, where they are known."""
    info = f"topk by ({BY}, stage) (1, {{stage_info}}{where})"
    return (
        f"(({expression}) * on ({BY}, stage) group_left (node, gpu) {info}"
        f" or (({expression}) unless on ({BY}, stage) {info}))"
    )


def slowdown(window: str = "5m", where: str = "") -> str:
    """How many times as long as the fastest stage of its pipeline each one takes for a step."""
    step = step_seconds(window, where)
    return f"{step} / on ({BY}) group_left () min by ({BY}) ({step})"


def named(expression: str) -> str:
    """Metrics, {name} without prefix, as they are exported."""
    return re.sub(
        r"\{(" + "|".join(m.name for m in METRICS) + r")\}((?:_bucket|_count)?)", EXPORTED_PREFIX + r"\1\2", expression
    )


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. `expression` names metrics as {name}, without prefix."""

    name: str
    expression: str
    lasts: str  # how long it must hold
    severity: Severity
    summary: str

    @property
    def query(self) -> str:
        return named(self.expression)


BORN = "{streams_broken_total} > 0 unless max_over_time({streams_broken_total}[1h] offset 5m)"
LOADED = "{weights_loaded_ratio}"
NO_ENGINES = f" or absent({LOADED})"
CAUSES: tuple[Alert, ...] = (
    Alert(
        "CaravanAbsent", "absent({open_requests})" + NO_ENGINES, "30s", "page",
        "No gateway, or no engine, reports anything: the service or its metrics are gone",
    ),
    Alert(
        "CaravanNoPipeline",
        f"(sum by (application) ({{ready}}) == 0 or max by (application) ({LOADED}) < 1)"
        f" and on (application) max by (application) (delta({LOADED}[45s])) <= 0", "1m", "page",
        "No pipeline of {{ $labels.application }} works, and none gets further with loading",
    ),
    Alert(
        "CaravanDemandUnserved",
        "(sum by (application) ({waiting}) > sum by (application) ({running}) or"
        " sum by (application) ({waiting}) > 0 unless on (application) sum by (application) ({running}) or"
        " sum by (application) ({open_requests}) > 0 unless on (application) sum by (application) ({ready}) > 0)"
        " unless on (application) sum by (application) (rate({ttft_seconds}_count[1m])) > 0", "45s", "page",
        "Requests to {{ $labels.application }} wait, and none gets a first token",
    ),
    Alert(
        "CaravanNoTokens", f"max by ({BY}) ({{last_token_age_seconds}}) > 30", "30s", "page",
        "Replica {{ $labels.replica }} has made no token for 30 s, not even to prove itself",
    ),
    Alert(
        "CaravanStreamsBroken",
        f"sum by (application) (increase({{streams_broken_total}}[5m])) > 0 or sum by (application) ({BORN}) > 0",
        "0s", "page", "Streams of {{ $labels.application }} ended with an error after they had begun",
    ),
    Alert(
        "CaravanOverloaded",
        'sum by (application) (rate({refused_total}{reason="overloaded"}[1m]))'
        ' > on (application) sum by (application) (rate({requests_total}{outcome=~"stop|length"}[1m]))'
        ' and on (application) sum by (application) (increase({refused_total}{reason="overloaded"}[1m])) > 10',
        "45s", "page", "More requests to {{ $labels.application }} are refused than are answered: its engines are full",
    ),
    Alert(
        "CaravanRefusing", 'sum by (application) (rate({refused_total}{reason="overloaded"}[5m])) > 0', "10m",
        "ticket", "Requests to {{ $labels.application }} are refused because its engines are full",
    ),
    Alert(
        "CaravanLoadingTooLong", f"max by ({BY}) ({{ready}}) == 0 or max by ({BY}) ({LOADED}) < 1", "30m", "ticket",
        "Replica {{ $labels.replica }} has not become ready for half an hour",
    ),
    Alert(
        "CaravanStageSick",
        with_node(
            f"{slowdown()} > {SICK} and on ({BY}, stage)"
            f" sum by ({BY}, stage) (rate({{stage_busy_seconds_total}}[5m])) > 0.2"
        ), "5m", "ticket",
        "Stage {{ $labels.stage }} of {{ $labels.replica }} on {{ $labels.node }} takes {{ $value | printf \"%.1f\" }}"
        " times as long for a step as the fastest stage of its pipeline",
    ),
    Alert(
        "CaravanPipelineFlaps", f"sum by ({BY}) (increase({{recoveries_total}}[30m])) > 2", "0s", "ticket",
        "The pipeline of {{ $labels.replica }} was rebuilt more than twice within half an hour",
    ),
    Alert(
        "CaravanReplicasFlap",
        f"count by (application) (last_over_time({LOADED}[30m])) > 3 * count by (application) ({LOADED})", "0s",
        "ticket", "Engine replicas of {{ $labels.application }} die and are replaced again and again",
    ),
    Alert(
        "CaravanCacheFull",
        f"sum by ({BY}) ({{kv_blocks_used}}) / sum by ({BY}) ({{kv_blocks_total}}) > 0.98"
        f" and on ({BY}) sum by ({BY}) ({{waiting}}) > 0", "15m", "ticket",
        "The KV cache of {{ $labels.replica }} is full, and sequences wait for it",
    ),
    Alert(
        "CaravanPreemptionStorm",
        f"sum by ({BY}) (rate({{preemptions_total}}[5m]))"
        f" > on ({BY}) 0.2 * sum by ({BY}) (rate({{queue_wait_seconds}}_count[5m]))"
        f" and on ({BY}) sum by ({BY}) (rate({{preemptions_total}}[5m])) > 0.05", "10m", "ticket",
        "{{ $labels.replica }} puts one sequence back, to be computed again, for every five that it begins with",
    ),
)  # fmt: skip
BURNS = {"errors": "CaravanErrors", "first_token": "CaravanSlowFirstToken", "inter_token": "CaravanSlowTokens"}


def alerts(table: tuple[Objective, ...]) -> list[Alert]:
    """All of them: the objectives' two each, and the causes'."""
    found = []
    for objective in table:
        name = BURNS[objective.name]
        words = (
            f"of {{{{ $labels.application }}}} {objective.summary}: the budget of {objective.budget:.1%} for 30 days"
        )
        found += [
            Alert(name, burning(objective, "page"), "30s", "page", f"So many {words} is burnt within days or hours"),
            Alert(f"{name}Slowly", burning(objective, "ticket"), "1h", "ticket", f"So many {words} will not do"),
        ]
    return [*found, *CAUSES]


def rules(
    table: tuple[Objective, ...] | None = None,
    *,
    runbook_url: str = RUNBOOK,
    scale_to_zero: bool = False,
    shortened: float = 1.0,
) -> dict[str, Any]:
    """The file that Prometheus reads (`rule_files`).

    `scale_to_zero`: no engine at all is no alarm. `shortened` divides every window, for tests that cannot wait.
    """
    table = table or objectives()
    groups = [
        ("caravan-objectives", recording_rules(table)),
        ("caravan", [_rule(alert, runbook_url, scale_to_zero) for alert in alerts(table)]),
    ]
    return {
        "groups": [
            {
                "name": name,
                "interval": _divided(EVALUATED, shortened),
                "rules": [_shorter(rule, shortened) for rule in made],
            }
            for name, made in groups
        ]
    }


def rules_json(**options: Any) -> str:
    """The same as text: JSON is YAML."""
    return json.dumps(rules(**options), indent=1) + "\n"


def _rule(alert: Alert, runbook_url: str, scale_to_zero: bool) -> dict[str, Any]:
    query = alert.query.replace(named(NO_ENGINES), "") if scale_to_zero else alert.query
    return {
        "alert": alert.name,
        "expr": query,
        "for": alert.lasts,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook_url": f"{runbook_url}#{alert.name.lower()}"},
    }


def _shorter(rule: dict[str, Any], factor: float) -> dict[str, Any]:
    if factor == 1:
        return rule
    expression = re.sub(r"(\[|offset )(\d+[smhd])", lambda m: m[1] + _divided(m[2], factor), rule["expr"])
    return rule | {"expr": expression} | ({"for": _divided(rule["for"], factor)} if "for" in rule else {})


def _divided(duration: str, factor: float) -> str:
    """At least 4 s, but for 0: shorter windows hold no two samples."""
    seconds = int(duration[:-1]) * SECONDS[duration[-1]]
    return duration if factor == 1 else f"{max(4, round(seconds / factor)) if seconds else 0}s"

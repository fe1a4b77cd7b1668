"""Alerts for Prometheus, from the table of metrics: `caravan alerts`. ops/runbook.md says what to do about each."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from deployments.metrics import EXPORTED_PREFIX, METRICS

RUNBOOK = "ops/runbook.md"
BY = "application, replica"
STEP = (  # seconds of a step, per stage
    f"(sum by ({BY}, stage) (rate({{stage_busy_seconds_total}}[5m]))"
    f" / sum by ({BY}, stage) (rate({{stage_steps_total}}[5m])))"
)


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. `expression` names metrics as {name}, without prefix."""

    name: str
    expression: str
    lasts: str  # how long it must hold
    severity: Literal["page", "ticket"]
    summary: str

    @property
    def query(self) -> str:
        return self.expression.format(**{metric.name: EXPORTED_PREFIX + metric.name for metric in METRICS})


ALERTS: tuple[Alert, ...] = (
    Alert(
        "CaravanNoTokens", f"max by ({BY}) ({{last_token_age_seconds}}) > 30", "30s", "page",
        "Replica {{ $labels.replica }} has made no token for 30 s, not even to prove itself",
    ),
    Alert(
        "CaravanStreamsBroken", "sum by (application) (increase({streams_broken_total}[5m])) > 0", "0s", "page",
        "Streams of {{ $labels.application }} ended with an error after they had begun",
    ),
    Alert(
        "CaravanStageSick", f"{STEP} > on ({BY}) group_left () 1.5 * quantile by ({BY}) (0.5, {STEP})", "10m", "ticket",
        "Stage {{ $labels.stage }} of {{ $labels.replica }} takes half as long again as the others",
    ),
    Alert(
        "CaravanPipelineFlaps", f"sum by ({BY}) (increase({{recoveries_total}}[30m])) > 2", "0s", "ticket",
        "The pipeline of {{ $labels.replica }} was rebuilt more than twice within half an hour",
    ),
    Alert(
        "CaravanSlowFirstToken",
        "histogram_quantile(0.95, sum by (application, le) (rate({ttft_seconds}_bucket[5m]))) > 2.5", "10m", "ticket",
        "One request in twenty waits more than 2.5 s for its first token",
    ),
    Alert(
        "CaravanRefusing", 'sum by (application) (rate({refused_total}{{reason="overloaded"}}[5m])) > 0', "10m",
        "ticket", "Requests to {{ $labels.application }} are refused because its engines are full",
    ),
    Alert(
        "CaravanCacheFull", f"sum by ({BY}) ({{kv_blocks_used}}) / sum by ({BY}) ({{kv_blocks_total}}) > 0.98", "15m",
        "ticket", "The KV cache of {{ $labels.replica }} is full: sequences wait or are computed twice",
    ),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The file that Prometheus reads (`rule_files`)."""
    return {"groups": [{"name": "caravan", "rules": [_rule(alert) for alert in ALERTS]}]}


def rules_json() -> str:
    """The same as text: JSON is YAML."""
    return json.dumps(rules(), indent=1) + "\n"


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.query,
        "for": alert.lasts,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook": f"{RUNBOOK}#{alert.name.lower()}"},
    }

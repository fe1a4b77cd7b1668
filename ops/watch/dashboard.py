"""The Grafana dashboard, generated from the table of metrics: `caravan dashboard`."""

import json
from typing import Any

from deployments.metrics import EXPORTED_PREFIX, METRICS, Metric

Json = dict[str, Any]

ROWS = ("Overview", "Latency", "Demand", "Tenants", "Pipeline", "Recovery", "Cache")
SELECTOR = 'application=~"$application",replica=~"$replica"'
RATE = "$__rate_interval"
WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 24, 8, 8
QUANTILES = (0.5, 0.95, 0.99)
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def exported(name: str) -> str:
    """The name on Ray's metrics endpoint."""
    return EXPORTED_PREFIX + name


def dashboard() -> Json:
    """The whole dashboard as Grafana's JSON; the same input gives the same text."""
    panels: list[Json] = []
    y = 0
    for row in ROWS:
        panels.append(
            {"type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "collapsed": False}
        )
        made = _overview() if row == "Overview" else [_panel(m) for m in METRICS if m.row == row]
        width, height = (4, 4) if row == "Overview" else (PANEL_WIDTH, PANEL_HEIGHT)
        per_line = WIDTH // width
        for i, panel in enumerate(made):
            position = {"x": i % per_line * width, "y": y + 1 + i // per_line * height, "w": width, "h": height}
            panels.append({**panel, "gridPos": position})
        y += 1 + -(-len(made) // per_line) * height
    return {
        "uid": "caravan",
        "title": "Caravan",
        "tags": ["caravan", "llm", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": [{"id": i + 1, **panel} for i, panel in enumerate(panels)],
    }


def dashboard_json() -> str:
    return json.dumps(dashboard(), indent=1, sort_keys=True) + "\n"


def expressions(metric: Metric) -> list[tuple[str, str]]:
    """(PromQL, legend) of a metric's panel."""
    name = exported(metric.name)
    by = ", ".join(("replica", *metric.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("replica", *metric.labels))
    if metric.kind == "histogram":
        quantiles = QUANTILES if not metric.labels else (0.95,)
        by = ", ".join(("le", *metric.labels, *(("replica",) if metric.labels else ())))
        legend = "stage {{stage}} {{replica}}" if metric.labels else ""
        return [
            (
                f"histogram_quantile({q}, sum by ({by}) (rate({name}_bucket{{{SELECTOR}}}[{RATE}])))",
                f"p{q * 100:g} {legend}".strip(),
            )
            for q in quantiles
        ]
    if metric.kind == "counter":
        return [(f"sum by ({by}) (rate({name}{{{SELECTOR}}}[{RATE}]))", legend)]
    return [(f"sum by ({by}) ({name}{{{SELECTOR}}})", legend)]


def _panel(metric: Metric) -> Json:
    return {
        "type": "timeseries",
        "title": metric.title,
        "description": metric.help,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": metric.unit, "min": 0, **_thresholds(metric.slo)}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": _targets(expressions(metric)),
    }


def _targets(pairs: list[tuple[str, str]]) -> list[Json]:
    return [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
        for i, (expr, legend) in enumerate(pairs)
    ]


def _thresholds(slo: float | None) -> Json:
    if slo is None:
        return {}
    steps = [{"color": "green", "value": None}, {"color": "red", "value": slo}]
    return {
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": {"thresholdsStyle": {"mode": "dashed"}},
    }


def _overview() -> list[Json]:
    """The numbers that say at a glance whether clients are served."""

    def total(name: str) -> str:
        return f"sum(rate({exported(name)}{{{SELECTOR}}}[{RATE}]))"

    def p95(name: str) -> str:
        return f"histogram_quantile(0.95, sum by (le) (rate({exported(name)}_bucket{{{SELECTOR}}}[{RATE}])))"

    kv = f"sum({exported('kv_blocks_used')}{{{SELECTOR}}}) / sum({exported('kv_blocks_total')}{{{SELECTOR}}})"
    stats: list[tuple[str, str, str, float | None]] = [
        ("Output tokens/s", total("generated_tokens_total"), "short", None),
        ("Requests/s", total("requests_total"), "reqps", None),
        ("TTFT p95", p95("ttft_seconds"), "s", 2.5),
        ("Inter-token p95", p95("inter_token_seconds"), "s", 0.1),
        ("KV in use", kv, "percentunit", 0.9),
        ("Oldest last token", f"max({exported('last_token_age_seconds')}{{{SELECTOR}}})", "s", 30.0),
    ]
    return [
        {
            "type": "stat",
            "title": title,
            "datasource": DATASOURCE,
            "fieldConfig": {"defaults": {"unit": unit, **_thresholds(slo)}, "overrides": []},
            "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
            "targets": _targets([(expr, title)]),
        }
        for title, expr, unit, slo in stats
    ]


def _variables() -> list[Json]:
    def query(name: str, label_filter: str) -> Json:
        return {
            "name": name,
            "type": "query",
            "datasource": DATASOURCE,
            "query": f"label_values({exported('running')}{label_filter}, {name})",
            "includeAll": True,
            "allValue": ".*",  # gateways have replicas of their own, which `running` does not name
            "multi": True,
            "refresh": 2,
            "current": {"text": "All", "value": "$__all"},
        }

    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        query("application", ""),
        query("replica", '{application=~"$application"}'),
    ]

"""The Grafana boards, generated from the tables of metrics and objectives: `caravan dashboard`.

One for the service, which has no choice of replica, so that gateways are always in it; one for a pipeline.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal

from deployments.metrics import EXPORTED_PREFIX, METRICS, Metric
from ops.watch.alerts import SICK, named, slowdown, with_node
from ops.watch.objectives import TIERS, Objective, objectives

Json = dict[str, Any]
Board = Literal["service", "pipeline"]

RATE = "$__rate_interval"
WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 24, 8, 8
QUANTILES = (0.5, 0.95, 0.99)
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECTORS: dict[Board, str] = {
    "service": 'application=~"$application"',
    "pipeline": 'application=~"$application",replica=~"$replica"',
}
# Each metric has its panel on one board: what gateways tell on the service's, what engines tell on the pipeline's.
ROWS: dict[Board, tuple[str, ...]] = {
    "service": ("Latency", "Demand", "Tenants", "Recovery"),
    "pipeline": ("Pipeline", "Demand", "Latency", "Cache", "Recovery"),
}
OWNERS: dict[Board, str] = {"service": "gateway", "pipeline": "engine"}
# What Ray says of each GPU, and NVIDIA's exporter of its clock: title, unit, metric, its label of the index, factor.
GPU_PANELS = (
    ("GPU utilisation of stages", "percent", "ray_node_gpus_utilization", "ip", "GpuIndex", 1),
    ("GPU memory of stages", "mbytes", "ray_node_gram_used", "ip", "GpuIndex", 1),
    ("GPU temperature of stages", "celsius", "ray_node_gpu_temperature_celsius", "ip", "GpuIndex", 1),
    ("GPU power of stages", "watt", "ray_node_gpu_power_milliwatts", "ip", "GpuIndex", 0.001),
    ("GPU clock of stages (NVIDIA's exporter)", "rotmhz", "DCGM_FI_DEV_SM_CLOCK", "instance", "gpu", 1),
)
Pair = tuple[str, str]  # PromQL, legend


def exported(name: str) -> str:
    """The name on Ray's metrics endpoint."""
    return EXPORTED_PREFIX + name


def dashboard(board: Board = "service", runbook_url: str = "ops/runbook.md") -> Json:
    """A whole dashboard as Grafana's JSON; the same input gives the same text."""
    selector = SELECTORS[board]
    made = _service_head(runbook_url) if board == "service" else []
    made.append(("Stages", _stages(selector)))
    if board == "service":
        made.append(("Demand and capacity", _capacity()))
    for row in ROWS[board]:
        made.append((row, [_panel(m, selector) for m in METRICS if m.row == row and m.owner == OWNERS[board]]))
    if board == "pipeline":
        made.append(("GPUs", _gpus(selector)))
    return {
        "uid": "caravan" if board == "service" else "caravan-pipeline",
        "title": "Caravan" if board == "service" else "Caravan: one pipeline",
        "tags": ["caravan", "llm", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": _links(board, runbook_url),
        "templating": {"list": _variables(board)},
        "panels": _placed(made),
    }


def dashboard_json(board: Board = "service", runbook_url: str = "ops/runbook.md") -> str:
    return json.dumps(dashboard(board, runbook_url), indent=1, sort_keys=True) + "\n"


def _placed(rows: Iterable[tuple[str, list[Json]]]) -> list[Json]:
    """Rows one below the other, their panels from left to right."""
    panels: list[Json] = []
    y = 0
    for title, made in rows:
        panels.append(
            {"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "collapsed": False}
        )
        x, height = 0, 0
        y += 1
        for panel in made:
            width, tall = panel.pop("size", (PANEL_WIDTH, PANEL_HEIGHT))
            if x + width > WIDTH:
                x, y, height = 0, y + height, 0
            panels.append({**panel, "gridPos": {"x": x, "y": y, "w": width, "h": tall}})
            x, height = x + width, max(height, tall)
        y += height
    return [{"id": i + 1, **panel} for i, panel in enumerate(panels)]


# -- what comes first -------------------------------------------------------------------------------------------------


def _service_head(runbook_url: str) -> list[tuple[str, list[Json]]]:
    """Is a promise in danger? Does an alert fire?"""
    table = objectives()
    burns = [_stat(o.title, [(_burn(o, "5m"), "burn")], "x", *_tiers(), o.summary) for o in table]
    firing = 'count(ALERTS{alertname=~"Caravan.*",alertstate="firing"}) or vector(0)'
    alerts = _stat("Alerts that fire", [(firing, "alerts")], "short", (1, "red"))
    alerts["links"] = [{"title": "Runbook", "url": runbook_url, "targetBlank": True}]
    over_time = _series("Budget burnt, times what 30 days allow", "x", [(_burn(o, "1h"), o.title) for o in table])
    over_time["size"] = (12, 4)
    for panel in (*burns, alerts):
        panel["size"] = (3, 4)
    return [("Objectives: 1 is what the budget of 30 days allows", [*burns, alerts, over_time])]


def _burn(objective: Objective, window: str) -> str:
    return f'{objective.ratio(window)}{{application=~"$application"}} / {objective.budget:g}'


def _tiers() -> list[tuple[float, str]]:
    colours = {"page": "red", "ticket": "orange"}
    return sorted({(tier.rate, colours[tier.severity]) for tier in TIERS})


def _stages(selector: str) -> list[Json]:
    """Who holds up the others, by name and node."""
    where = f"{{{selector}}}"
    slow = named(with_node(slowdown(RATE, where), where))
    legend = "{{replica}} stage {{stage}} on {{node}} {{gpu}}"
    title = "Slowest stage / fastest stage of its pipeline"
    over_time = _series(title, "x", [(f"topk(8, {slow})", legend)], SICK)
    over_time["description"] = "1: as fast as the fastest. The highest line is the sick stage"
    worst = _table("The slowest now", [(f"topk(8, {slow})", legend)])
    busy = named(f"max by (replica, stage) (rate({{stage_busy_seconds_total}}{where}[{RATE}]))")
    share = _series(
        "Busy share of the busiest stages", "percentunit", [(f"topk(8, {busy})", "{{replica}} stage {{stage}}")]
    )
    return [over_time, worst, share]


def _capacity() -> list[Json]:
    def total(name: str) -> str:
        return f'sum({exported(name)}{{application=~"$application"}})'

    def rate(name: str, more: str = "") -> str:
        return f'sum(rate({exported(name)}{{application=~"$application"{more}}}[{RATE}]))'

    kv = f"{total('kv_blocks_used')} / {total('kv_blocks_total')}"
    answered = rate("requests_total", ',outcome=~"stop|length"')
    refused = rate("refused_total", ',reason="overloaded"')
    return [
        _series(
            "Requests: asked, running, waiting", "short",
            [(total("open_requests"), "open"), (total("running"), "running"), (total("waiting"), "waiting")],
        ),
        _series("Answered and refused for want of room", "reqps", [(answered, "answered"), (refused, "refused")]),
        _series("Pipelines that work, KV in use", "short", [(total("ready"), "pipelines"), (kv, "share of KV")]),
        _series("Output tokens/s of all pipelines", "short", [(rate("generated_tokens_total"), "tokens/s")]),
        _series("Oldest last token", "s", [(total("last_token_age_seconds").replace("sum", "max"), "age")]),
    ]  # fmt: skip


def _gpus(selector: str) -> list[Json]:
    """Each stage's GPU, found by the address of its node and its index there."""
    panels = []
    for title, unit, metric, node, index, factor in GPU_PANELS:
        renamed = f'label_replace({metric}, "node", "$1", "{node}", "([^:]+)(?::.*)?")'
        renamed = f'label_replace({renamed}, "gpu", "$1", "{index}", "(.+)")'
        by_gpu = f"max by (node, gpu) ({renamed})" + (f" * {factor}" if factor != 1 else "")
        joined = f"{exported('stage_info')}{{{selector}}} * on (node, gpu) group_left () ({by_gpu})"
        panels.append(_series(title, unit, [(joined, "{{replica}} stage {{stage}}, {{node}} {{gpu}}")]))
    cpu = 'label_replace(ray_node_cpu_utilization, "node", "$1", "ip", "(.+)")'
    nodes = f"max by (node) ({cpu}) * on (node) (count by (node) ({exported('stage_info')}{{{selector}}}) > bool 0)"
    return [*panels, _series("Processor use of stages' nodes", "percent", [(nodes, "{{node}}")])]


# -- panels -----------------------------------------------------------------------------------------------------------


def expressions(metric: Metric, selector: str) -> list[Pair]:
    """(PromQL, legend) of a metric's panel."""
    name = exported(metric.name)
    by = ", ".join(("replica", *metric.labels))
    legend = " ".join(f"{{{{{label}}}}}" for label in ("replica", *metric.labels))
    if metric.kind == "histogram":
        quantiles = QUANTILES if not metric.labels else (0.95,)
        own = ("replica",) if "stage" in metric.labels else ()
        by, legend = ", ".join(("le", *metric.labels, *own)), " ".join(f"{{{{{x}}}}}" for x in (*own, *metric.labels))
        buckets = f"sum by ({by}) (rate({name}_bucket{{{selector}}}[{RATE}]))"
        return [(f"histogram_quantile({q}, {buckets})", f"p{q * 100:g} {legend}") for q in quantiles]
    if metric.kind == "counter":
        return [(f"sum by ({by}) (rate({name}{{{selector}}}[{RATE}]))", legend)]
    return [(f"sum by ({by}) ({name}{{{selector}}})", legend)]


def _panel(metric: Metric, selector: str) -> Json:
    return _series(metric.title, metric.unit, expressions(metric, selector), metric.slo) | {"description": metric.help}


def _series(title: str, unit: str, pairs: list[Pair], slo: float | None = None) -> Json:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, **_line(slo)}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": _targets(pairs),
    }


def _stat(title: str, pairs: list[Pair], unit: str, *limits: tuple[float, str] | str) -> Json:
    """One number; `limits` are where it takes which colour, and what it means."""
    steps: list[Json] = [{"color": "green", "value": None}]
    steps += [{"color": limit[1], "value": limit[0]} for limit in limits if isinstance(limit, tuple)]
    thresholds = {"mode": "absolute", "steps": steps}
    return {
        "type": "stat",
        "title": title,
        "description": next((limit for limit in limits if isinstance(limit, str)), title),
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "decimals": 1, "thresholds": thresholds}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"},
        "targets": _targets(pairs),
    }


def _table(title: str, pairs: list[Pair]) -> Json:
    hidden = dict.fromkeys(("Time", "__name__", "application"), True)
    return {
        "type": "table",
        "title": title,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"decimals": 2}, "overrides": []},
        "options": {"sortBy": [{"displayName": "Value", "desc": True}]},
        "transformations": [{"id": "organize", "options": {"excludeByName": hidden}}],
        "targets": [{**target, "instant": True, "format": "table"} for target in _targets(pairs)],
    }


def _targets(pairs: list[Pair]) -> list[Json]:
    return [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend.strip(), "datasource": DATASOURCE}
        for i, (expr, legend) in enumerate(pairs)
    ]


def _line(slo: float | None) -> Json:
    if slo is None:
        return {}
    steps = [{"color": "green", "value": None}, {"color": "red", "value": slo}]
    return {
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": {"thresholdsStyle": {"mode": "dashed"}},
    }


def _links(board: Board, runbook_url: str) -> list[Json]:
    other = ("One pipeline", "/d/caravan-pipeline") if board == "service" else ("The service", "/d/caravan")
    pairs: list[Pair] = [("Runbook", runbook_url), other]
    return [{"type": "link", "title": title, "url": url, "keepTime": url.startswith("/d/")} for title, url in pairs]


def _variables(board: Board) -> list[Json]:
    def query(name: str, label_filter: str) -> Json:
        return {
            "name": name,
            "type": "query",
            "datasource": DATASOURCE,
            "query": f"label_values({exported('running')}{label_filter}, {name})",
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "refresh": 2,
            "current": {"text": "All", "value": "$__all"},
        }

    found: list[Json] = [{"name": "datasource", "type": "datasource", "query": "prometheus"}, query("application", "")]
    return found + ([query("replica", '{application=~"$application"}')] if board == "pipeline" else [])


def in_plain(expression: str, choose: Callable[[str], str] = lambda name: ".*", window: str = "1m") -> str:
    """A panel's query without Grafana's variables, as Prometheus can be asked it."""
    for name in ("application", "replica"):
        expression = expression.replace(f"${name}", choose(name))
    return expression.replace(RATE, window)

"""`caravan top`: what every replica and stage is doing now, from the metrics endpoints."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deployments.metrics import EXPORTED_PREFIX

Labels = tuple[tuple[str, str], ...]
Sample = dict[tuple[str, Labels], float]  # (metric name without prefix, labels) -> value
BAR = 12  # characters


@dataclass(slots=True)
class StageView:
    """One stage in the time between two scrapes, as shares of that time."""

    stage: str
    busy: float = 0.0
    waiting: float = 0.0
    transfer: float = 0.0
    step_ms: float = 0.0


@dataclass(slots=True)
class ReplicaView:
    """One engine replica in the time between two scrapes."""

    application: str
    replica: str
    running: float = 0.0
    waiting: float = 0.0
    kv_use: float = 0.0
    last_token_age: float = 0.0
    loaded: float = 0.0
    preemptions: float = 0.0
    output_tokens: float = 0.0  # per second
    stages: list[StageView] = field(default_factory=list)


@dataclass(slots=True)
class ClusterView:
    """Everything one screen shows."""

    output_tokens: float = 0.0  # per second, over all replicas
    prompt_tokens: float = 0.0
    requests: float = 0.0
    ttft_p95: float = math.nan
    replicas: list[ReplicaView] = field(default_factory=list)


def parse(text: str) -> Sample:
    """Our samples from Prometheus text."""
    found: Sample = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(EXPORTED_PREFIX):
                key = sample.name.removeprefix(EXPORTED_PREFIX), tuple(sorted(sample.labels.items()))
                found[key] = sample.value
    return found


def scrape(urls: Sequence[str]) -> Sample:
    """All endpoints at once. Raises `httpx.HTTPError`."""
    merged: Sample = {}
    for url in urls:
        merged |= parse(httpx.get(url, timeout=5).raise_for_status().text)
    return merged


def summarise(previous: Sample, current: Sample, seconds: float) -> ClusterView:
    """Rates over the `seconds` between two scrapes."""

    def rate(key: tuple[str, Labels]) -> float:
        return max(0.0, current[key] - previous.get(key, 0.0)) / seconds if previous else 0.0

    view = ClusterView()
    replicas: dict[tuple[str, str], ReplicaView] = {}
    stages: dict[tuple[str, str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    gauges: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for (name, labels), value in current.items():
        by = dict(labels)
        who = by.get("application", ""), by.get("replica", "")
        if name == "prompt_tokens_total":
            view.prompt_tokens += rate((name, labels))
        elif name == "requests_total":
            view.requests += rate((name, labels))
        elif name.startswith("stage_") and name.endswith("_total"):
            stages[(*who, by.get("stage", "?"))][name] += rate((name, labels))
        elif "le" not in by:
            gauges[who][name] = value
            if name in ("preemptions_total", "generated_tokens_total"):
                gauges[who][name] = rate((name, labels))
    for who, values in gauges.items():
        if "running" in values:
            replicas[who] = _replica(who, values)
    for (application, replica, stage), rates in sorted(stages.items()):
        if (application, replica) in replicas:
            replicas[application, replica].stages.append(_stage(stage, rates))
    view.ttft_p95 = quantile(0.95, "ttft_seconds", previous, current)
    view.replicas = [replicas[who] for who in sorted(replicas)]
    view.output_tokens = sum(replica.output_tokens for replica in view.replicas)
    return view


def _replica(who: tuple[str, str], values: dict[str, float]) -> ReplicaView:
    return ReplicaView(
        *who,
        running=values["running"],
        waiting=values["waiting"],
        kv_use=values["kv_blocks_used"] / (values["kv_blocks_total"] or 1),
        last_token_age=values["last_token_age_seconds"],
        loaded=values["weights_loaded_ratio"],
        preemptions=values["preemptions_total"],
        output_tokens=values["generated_tokens_total"],
    )


def _stage(stage: str, rates: dict[str, float]) -> StageView:
    busy, steps = rates["stage_busy_seconds_total"], rates["stage_steps_total"]
    waiting, transfer = rates["stage_wait_seconds_total"], rates["stage_transfer_seconds_total"]
    # A wait is reported with the step that ends it, so the parts of a short window rarely add up to the window.
    accounted = busy + waiting + transfer or 1.0
    return StageView(stage, busy / accounted, waiting / accounted, transfer / accounted, 1000 * busy / (steps or 1.0))


def quantile(q: float, name: str, previous: Sample, current: Sample) -> float:
    """Upper edge of the histogram bucket that holds quantile `q` of what came between the scrapes; NaN if nothing."""
    counts: dict[float, float] = defaultdict(float)
    for (sample, labels), value in current.items():
        if sample == f"{name}_bucket":
            counts[float(dict(labels)["le"])] += value - previous.get((sample, labels), 0.0)
    total = counts.get(math.inf, 0.0)
    return next((edge for edge in sorted(counts) if counts[edge] >= q * total), math.nan) if total else math.nan


def render(view: ClusterView) -> RenderableType:
    """The screen."""
    ttft = "-" if math.isnan(view.ttft_p95) else f"<= {view.ttft_p95:g} s"
    head = Text(
        f"output {view.output_tokens:.1f} tok/s   prompt {view.prompt_tokens:.1f} tok/s   "
        f"requests {view.requests:.2f}/s   TTFT p95 {ttft}",
        style="bold",
    )
    replicas = Table(
        "replica", "tok/s", "running", "waiting", "KV in use", "last token", "preempted/s", "weights", box=None
    )
    stages = Table("replica", "stage", "busy", "waiting", "transfer", "step", "", box=None)
    for replica in view.replicas:
        age_style = "red" if replica.last_token_age > 30 and replica.running else ""
        replicas.add_row(
            replica.replica,
            f"{replica.output_tokens:.1f}",
            f"{replica.running:.0f}",
            f"{replica.waiting:.0f}",
            bar(replica.kv_use),
            Text(f"{replica.last_token_age:.1f} s ago", style=age_style),
            f"{replica.preemptions:.1f}",
            f"{replica.loaded:.0%}",
        )
        busiest = max((s.busy for s in replica.stages), default=0.0)
        for s in replica.stages:
            slow = len(replica.stages) > 1 and s.busy == busiest > 0.05
            stages.add_row(
                replica.replica,
                s.stage,
                bar(s.busy),
                bar(s.waiting),
                bar(s.transfer),
                f"{s.step_ms:.1f} ms",
                "<- slowest" if slow else "",
            )
    if not view.replicas:
        return Group(head, Text("no engine replica reports metrics yet"))
    return Group(head, Text(), replicas, Text(), stages)


def bar(share: float) -> str:
    """A share of 0 to 1 as a bar with its number."""
    filled = round(min(max(share, 0.0), 1.0) * BAR)
    return "█" * filled + "·" * (BAR - filled) + f"\u00a0{share:.0%}"  # no break between bar and number


def run(urls: Sequence[str], interval: float = 2.0, once: bool = False) -> int:
    """Show the screen until Ctrl-C, or once. Returns the exit status."""
    console = Console()
    previous: Sample = {}
    at = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=False) as live:
        first = True
        while True:
            try:
                current = scrape(urls)
            except httpx.HTTPError as error:
                message = f"cannot read {', '.join(urls)} ({error}): give the right address with --metrics"
                live.update(Text(message, style="red"), refresh=True)
                if once:
                    return 1
            else:
                now = time.monotonic()
                live.update(render(summarise(previous, current, max(now - at, 1e-3))), refresh=True)
                previous, at = current, now
                if once and not first:
                    return 0
                first = False
            time.sleep(interval)

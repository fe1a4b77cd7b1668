"""`caravan top`: what every replica and stage is doing now, from the metrics endpoints."""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

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
RATES = {
    "preemptions_total", "generated_tokens_total", "prefix_cache_queried_tokens_total", "prefix_cache_hit_tokens_total",
    "host_cache_hit_tokens_total",
}  # fmt: skip
SCRAPE_TIMEOUT_S = 5.0
BUSY, CLEARLY = 0.05, 1.1  # a stage that others wait for: its share of the time, and how much more than theirs


@dataclass(slots=True)
class StageView:
    """One stage in the time between two scrapes, as shares of that time."""

    stage: str
    busy: float = 0.0
    waiting: float = 0.0
    transfer: float = 0.0
    step_ms: float = 0.0
    place: str = ""  # its node, and its GPUs there


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
    accepted: float = math.nan  # share of the drafted tokens; NaN: none were
    asked: float = 0.0  # tokens that the cache was asked for, per second
    found: float = 0.0  # and that it held
    found_in_host: float = 0.0  # in host memory
    stages: list[StageView] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        return self.found / self.asked

    @property
    def host_hit_rate(self) -> float:
        return self.found_in_host / self.asked


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


@dataclass(frozen=True, slots=True)
class Scrape:
    """One look at all endpoints."""

    at: float  # of the monotonic clock, in seconds
    samples: dict[str, Sample]  # of each endpoint that answered
    dead: dict[str, str]  # why the others did not

    def merged(self) -> Sample:
        """What all of them say."""
        return {key: value for sample in self.samples.values() for key, value in sample.items()}

    def since(self, previous: "Scrape") -> ClusterView:
        """Rates since then. An endpoint that did not answer then has none yet: its totals are of all its time."""
        before = replace(self, samples={url: previous.samples.get(url, own) for url, own in self.samples.items()})
        return summarise(before.merged(), self.merged(), max(self.at - previous.at, 1e-3))


def scrape(url: str) -> Sample:
    """What one endpoint says. Raises `httpx.HTTPError`, or `ValueError` if these are no metrics."""
    return parse(httpx.get(url, timeout=SCRAPE_TIMEOUT_S).raise_for_status().text)


def scrape_all(urls: Sequence[str]) -> Scrape:
    """All endpoints at once: one that is dead holds up the others for at most `SCRAPE_TIMEOUT_S`."""

    def read(url: str) -> Sample | str:
        try:
            return scrape(url)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return str(error) or type(error).__name__

    with ThreadPoolExecutor(len(urls)) as pool:
        found = dict(zip(urls, pool.map(read, urls), strict=True))
    samples = {url: answer for url, answer in found.items() if not isinstance(answer, str)}
    dead = {url: answer for url, answer in found.items() if isinstance(answer, str)}
    return Scrape(time.monotonic(), samples, dead)


def summarise(previous: Sample, current: Sample, seconds: float) -> ClusterView:
    """Rates over the `seconds` between two scrapes."""

    def rate(key: tuple[str, Labels]) -> float:
        return max(0.0, current[key] - previous.get(key, 0.0)) / seconds if previous else 0.0

    view = ClusterView()
    replicas: dict[tuple[str, str], ReplicaView] = {}
    stages: dict[tuple[str, str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    gauges: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    places: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for (name, labels), value in current.items():
        by = dict(labels)
        who = by.get("application", ""), by.get("replica", "")
        if name == "prompt_tokens_total":
            view.prompt_tokens += rate((name, labels))
        elif name == "requests_total":
            if by.get("endpoint") != "probe":  # load balancers that ask whether it lives
                view.requests += rate((name, labels))
        elif name == "stage_info":
            places[(*who, by["stage"])].append((by["node"], by["gpu"]))
        elif name.startswith("stage_") and name.endswith("_total"):
            stages[(*who, by.get("stage", "?"))][name] += rate((name, labels))
        elif name.startswith("speculation_"):  # of all places in a draft
            gauges[who][name] += rate((name, labels))
        elif "le" not in by:
            gauges[who][name] = value
            if name in RATES:
                gauges[who][name] = rate((name, labels))
    for who, values in gauges.items():
        if "running" in values:
            replicas[who] = _replica(who, values)
    for (application, replica, stage), rates in sorted(stages.items()):
        if (application, replica) in replicas:
            found = place_of(places[application, replica, stage])
            replicas[application, replica].stages.append(_stage(stage, rates, found))
    view.ttft_p95 = quantile(0.95, "ttft_seconds", previous, current)
    view.replicas = [replicas[who] for who in sorted(replicas)]
    view.output_tokens = sum(replica.output_tokens for replica in view.replicas)
    return view


def _replica(who: tuple[str, str], values: dict[str, float]) -> ReplicaView:
    accepted = values["speculation_accepted_tokens_total"]
    return ReplicaView(
        *who,
        running=values["running"],
        waiting=values["waiting"],
        kv_use=values["kv_blocks_used"] / (values["kv_blocks_total"] or 1),
        last_token_age=values["last_token_age_seconds"],
        loaded=values["weights_loaded_ratio"],
        preemptions=values["preemptions_total"],
        asked=values.get("prefix_cache_queried_tokens_total", 0.0),
        found=values.get("prefix_cache_hit_tokens_total", 0.0),
        found_in_host=values.get("host_cache_hit_tokens_total", 0.0),
        output_tokens=values["generated_tokens_total"],
        accepted=accepted / proposed if (proposed := values["speculation_proposed_tokens_total"]) else math.nan,
    )


def place_of(info: Sequence[tuple[str, str]]) -> str:
    """A stage's node, with the GPUs that it has there."""
    node = max((node for node, _ in info), default="")
    gpus = sorted(gpu for where, gpu in info if gpu and where == node)
    return f"{node} GPU {','.join(gpus)}" if gpus else node


def _stage(stage: str, rates: dict[str, float], place: str) -> StageView:
    busy, steps = rates["stage_busy_seconds_total"], rates["stage_steps_total"]
    waiting, transfer = rates["stage_wait_seconds_total"], rates["stage_transfer_seconds_total"]
    # A wait is reported with the step that ends it, so the parts of a short window rarely add up to the window.
    accounted = busy + waiting + transfer or 1.0
    step_ms = 1000 * busy / (steps or 1.0)
    return StageView(stage, busy / accounted, waiting / accounted, transfer / accounted, step_ms, place)


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
        "replica",
        "tok/s",
        "running",
        "waiting",
        "KV in use",
        "found in cache",
        "last token",
        "preempted/s",
        "accepted",
        "weights",
        box=None,
    )
    stages = Table("replica", "stage", "on", "busy", "waiting", "transfer", "step", "", box=None)
    for replica in view.replicas:
        age_style = "red" if replica.last_token_age > 30 and replica.running else ""
        replicas.add_row(
            replica.replica,
            f"{replica.output_tokens:.1f}",
            f"{replica.running:.0f}",
            f"{replica.waiting:.0f}",
            bar(replica.kv_use),
            f"{replica.hit_rate:.0%} ({replica.host_hit_rate:.0%} host)" if replica.asked else "-",
            Text(f"{replica.last_token_age:.1f} s ago", style=age_style),
            f"{replica.preemptions:.1f}",
            "-" if math.isnan(replica.accepted) else f"{replica.accepted:.0%}",
            f"{replica.loaded:.0%}",
        )
        slowest = slowest_stage(replica.stages)
        for s in replica.stages:
            stages.add_row(
                replica.replica,
                s.stage,
                s.place,
                bar(s.busy),
                bar(s.waiting),
                bar(s.transfer),
                f"{s.step_ms:.1f} ms",
                "<- slowest" if s is slowest else "",
            )
    if not view.replicas:
        return Group(head, Text("no engine replica reports metrics yet"))
    return Group(head, Text(), replicas, Text(), stages)


def slowest_stage(stages: Sequence[StageView]) -> StageView | None:
    """The one that the others wait for, if they do: one that is hardly busier than the next is as fast as that."""
    if len(stages) < 2:
        return None
    second, first = sorted(stages, key=lambda stage: stage.busy)[-2:]
    return first if first.busy > BUSY and first.busy > CLEARLY * second.busy else None


def bar(share: float) -> str:
    """A share of 0 to 1 as a bar with its number."""
    filled = round(min(max(share, 0.0), 1.0) * BAR)
    return "█" * filled + "·" * (BAR - filled) + f"\u00a0{share:.0%}"  # no break between bar and number


def run(urls: Sequence[str], interval: float = 2.0, once: bool = False) -> int:
    """Show the screen until Ctrl-C, or once. Returns the exit status: 1 if no endpoint answers that one time."""
    previous: Scrape | None = None
    with Live(console=Console(), auto_refresh=False, transient=False) as live:
        while True:
            current = scrape_all(urls)
            dead = Text("\n".join(f"no answer from {url}: {why}" for url, why in current.dead.items()), style="red")
            if current.samples:
                live.update(Group(render(current.since(previous or current)), dead), refresh=True)
            else:
                live.update(Group(dead, Text("give the right address with --metrics", style="red")), refresh=True)
            if once and (previous is not None or not current.samples):
                return 0 if current.samples else 1
            previous = current
            time.sleep(interval)

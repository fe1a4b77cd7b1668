"""Every metric, said once: name, unit, help, buckets, and the panel that shows it.

Exported through Ray's metrics endpoint as `ray_caravan_<name>`; inside a Serve replica Ray adds the labels application,
deployment and replica. The dashboard, the alerts and `caravan top` (ops/watch) are made from this table.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from cluster.errors import Cause, MoveCause

Kind = Literal["counter", "gauge", "histogram"]
Owner = Literal["gateway", "engine"]
# Of a request, in the order in which it meets them. `route`: the way to the engine and back, beside its queue there.
Part = Literal["body", "tokenise", "grammar", "route", "queue", "prefill", "decode", "detokenise"]

PREFIX = "caravan_"
EXPORTED_PREFIX = "ray_" + PREFIX

# Edges include the service levels exactly: TTFT 2.5 s, inter-token 0.1 s.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
PART_BUCKETS = (
    0.0001,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    120.0,
    600.0,
)
HOST_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05)
SIZE_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `row` and `title` place its panel; `slo` draws a line."""

    name: str  # without prefix; counters end in _total, as exported
    kind: Kind
    owner: Owner
    unit: str  # Grafana's unit id
    help: str
    row: str
    title: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    slo: float | None = None
    known: tuple[str, ...] = ()  # values of a counter's one label: series that begin at 0


def counter(
    name: str, owner: Owner, unit: str, help: str, row: str, title: str, *labels: str, known: tuple[str, ...] = ()
) -> Metric:
    return Metric(name, "counter", owner, unit, help, row, title, labels, known=known)


def gauge(name: str, owner: Owner, unit: str, help: str, row: str, title: str, *labels: str) -> Metric:
    return Metric(name, "gauge", owner, unit, help, row, title, labels)


METRICS: tuple[Metric, ...] = (
    Metric(
        "ttft_seconds", "histogram", "gateway", "s", "Time from a request's first byte to its first token",
        "Latency", "Time to first token", (), TTFT_BUCKETS, 2.5,
    ),
    Metric(
        "inter_token_seconds", "histogram", "gateway", "s", "Time between tokens of one stream",
        "Latency", "Inter-token latency", (), TOKEN_BUCKETS, 0.1,
    ),
    Metric(
        "queue_wait_seconds", "histogram", "engine", "s", "Time from arrival at the engine to the first batch",
        "Latency", "Queue wait", (), TTFT_BUCKETS,
    ),
    Metric(
        "e2e_seconds", "histogram", "gateway", "s", "Time from a request's first byte to its end, by how it ended",
        "Latency", "End to end", ("outcome",), REQUEST_BUCKETS,
    ),
    Metric(
        "request_part_seconds", "histogram", "gateway", "s", "Where the time of requests goes",
        "Latency", "Parts of a request", ("part",), PART_BUCKETS,
    ),
    counter(
        "requests_total", "gateway", "reqps", "Answers by how they ended, with the status of HTTP",
        "Demand", "Requests by outcome", "endpoint", "outcome", "status",
    ),
    counter("prompt_tokens_total", "gateway", "short", "Tokens in prompts", "Demand", "Prompt tokens/s"),
    counter("generated_tokens_total", "engine", "short", "Tokens generated", "Demand", "Output tokens/s"),
    counter(
        "streams_broken_total", "gateway", "short", "Streams that ended with an error after they had begun",
        "Recovery", "Broken streams/s",
    ),
    counter(
        "streams_resumed_total", "gateway", "short",
        "Streams that went on with another engine: theirs was lost, leaves as planned, or rebuilds its pipeline",
        "Recovery", "Resumed streams/s", "cause", known=("lost", *get_args(MoveCause)),
    ),
    Metric(
        "stream_pause_seconds", "histogram", "gateway", "s", "Time a stream had no engine",
        "Recovery", "Pause of resumed streams", (), REQUEST_BUCKETS,
    ),
    counter(
        "recoveries_total", "engine", "short", "Pipelines rebuilt after a stage was killed, failed, hung or cut off",
        "Recovery", "Rebuilt pipelines/s", "cause", known=get_args(Cause),
    ),
    counter(
        "stages_replaced_total", "engine", "short", "Stages replaced; the others kept their weights",
        "Recovery", "Replaced stages/s",
    ),
    Metric(
        "recovery_seconds", "histogram", "engine", "s", "Time from a stage's death to the pipeline's next step",
        "Recovery", "Time to rebuild a pipeline", (), REQUEST_BUCKETS,
    ),
    counter(
        "tenant_requests_total", "gateway", "reqps", "Requests of each tenant by how they ended",
        "Tenants", "Requests by tenant", "tenant", "outcome",
    ),
    counter(
        "tenant_prompt_tokens_total", "gateway", "short", "Tokens in each tenant's prompts",
        "Tenants", "Prompt tokens/s by tenant", "tenant",
    ),
    counter(
        "tenant_generated_tokens_total", "gateway", "short", "Tokens generated for each tenant",
        "Tenants", "Output tokens/s by tenant", "tenant",
    ),
    counter(
        "refused_total", "gateway", "reqps", "Requests refused with 401 or 429, by tenant and reason",
        "Tenants", "Refused requests/s", "tenant", "reason",
    ),
    gauge(
        "open_requests", "gateway", "short", "Requests for answers of engines that gateways have open",
        "Demand", "Open requests",
    ),
    counter(
        "routed_total", "gateway", "reqps",
        "Requests by why they went where they did: prefix: most of the prompt is held there; room: elsewhere more of "
        "it is, but there would be more to wait for; cold: nobody holds any",
        "Demand", "Requests by routing decision", "reason", known=("prefix", "room", "cold"),
    ),
    gauge("running", "engine", "short", "Sequences running", "Demand", "Running sequences"),
    gauge("waiting", "engine", "short", "Sequences waiting for KV room or a slot", "Demand", "Waiting sequences"),
    gauge("waiting_tokens", "engine", "short", "Tokens of waiting sequences", "Demand", "Waiting tokens"),
    gauge("kv_blocks_used", "engine", "short", "KV blocks in use", "Cache", "KV blocks in use"),
    gauge("kv_blocks_total", "engine", "short", "KV blocks there are", "Cache", "KV blocks"),
    counter(
        "preemptions_total", "engine", "short", "Sequences put back to be recomputed for want of KV room",
        "Cache", "Preemptions/s",
    ),
    counter(
        "prefix_cache_queried_tokens_total", "engine", "short", "Tokens looked up in the prefix cache",
        "Cache", "Prefix cache lookups, tokens/s",
    ),
    counter(
        "prefix_cache_hit_tokens_total", "engine", "short", "Tokens found in the prefix cache",
        "Cache", "Prefix cache hits, tokens/s",
    ),
    counter(
        "speculation_proposed_tokens_total", "engine", "short", "Tokens that were drafted, by their place in a draft",
        "Pipeline", "Drafted tokens/s, by place", "place",
    ),
    counter(
        "speculation_accepted_tokens_total", "engine", "short", "Drafted tokens that were what was drawn",
        "Pipeline", "Accepted tokens/s, by place", "place",
    ),
    counter(
        "kv_blocks_evicted_total", "engine", "short", "KV blocks whose content on the device made way",
        "Cache", "KV blocks evicted/s",
    ),
    counter(
        "host_cache_hit_tokens_total", "engine", "short", "Tokens copied back from host memory instead of computed",
        "Cache", "Host tier hits, tokens/s",
    ),
    gauge("host_blocks_used", "engine", "short", "Copies of KV blocks in host memory", "Cache", "Copies in host"),
    gauge("host_blocks_total", "engine", "short", "Copies of KV blocks there is room for", "Cache", "Room for copies"),
    counter(
        "host_blocks_copied_total", "engine", "short", "KV blocks copied to host memory (out) and back (in)",
        "Cache", "KV blocks copied/s", "direction", known=("in", "out"),
    ),
    counter(
        "host_blocks_evicted_total", "engine", "short", "Copies of KV blocks that made way for others",
        "Cache", "Copies evicted/s",
    ),
    counter(
        "host_blocks_damaged_total", "engine", "short",
        "Copies that were not what was put there, or lost with their node: computed again",
        "Cache", "Damaged copies/s",
    ),
    counter("stage_steps_total", "engine", "short", "Steps a stage has computed", "Pipeline", "Steps/s", "stage"),
    counter(
        "stage_busy_seconds_total", "engine", "percentunit", "Time a stage computed",
        "Pipeline", "Busy share of each stage", "stage",
    ),
    counter(
        "stage_wait_seconds_total", "engine", "percentunit", "Time a stage waited for work: the bubble, when loaded",
        "Pipeline", "Waiting share of each stage", "stage",
    ),
    counter(
        "stage_transfer_seconds_total", "engine", "percentunit", "Time a stage was blocked in sending",
        "Pipeline", "Transfer share of each stage", "stage",
    ),
    Metric(
        "stage_step_seconds", "histogram", "engine", "s", "Compute time of one step of one stage",
        "Pipeline", "Step time of each stage (p95): the highest line is the sick stage", ("stage",), STEP_BUCKETS,
    ),
    Metric(
        "step_tokens", "histogram", "engine", "short", "Tokens computed in one step",
        "Pipeline", "Tokens per step", (), SIZE_BUCKETS,
    ),
    Metric(
        "scheduler_seconds", "histogram", "engine", "s", "Scheduler time of one step",
        "Pipeline", "Scheduler time per step", (), HOST_BUCKETS,
    ),
    gauge(
        "stage_info", "engine", "short", "Where each stage runs: always 1, once for each of its GPUs",
        "Pipeline", "Nodes and GPUs of stages", "stage", "node", "gpu",
    ),
    gauge(
        "last_token_age_seconds", "engine", "s", "Time since a token last came out of the last stage",
        "Pipeline", "Age of the last token",
    ),
    gauge("ready", "engine", "short", "Whether the replica's pipeline works, 1 or 0", "Pipeline", "Replicas that work"),
    gauge(
        "weights_loaded_ratio", "engine", "percentunit", "Share of the weights loaded", "Pipeline", "Weights loaded"
    ),
)  # fmt: skip


class Backend(Protocol):
    """What makes the metrics: the module `ray.serve.metrics` fits."""

    Counter: Any
    Gauge: Any
    Histogram: Any


class MetricsRecorder(Protocol):
    """What a gateway needs of `Recorder`."""

    def create(self, name: str, **labels: str) -> None: ...
    def inc(self, name: str, value: float = 1.0, **labels: str) -> None: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class Recorder:
    """The metrics of one owner. An unknown name is a `KeyError`, an unknown label a `ValueError`."""

    def __init__(self, backend: Backend, owner: Owner) -> None:
        own = [m for m in METRICS if m.owner == owner]
        self._metrics = {m.name: self._make(backend, m) for m in own}
        for metric in own:
            if metric.kind == "counter" and not metric.labels:
                self.create(metric.name)
            for value in metric.known:
                self.create(metric.name, **{metric.labels[0]: value})

    @staticmethod
    def _make(backend: Backend, metric: Metric) -> Any:
        name = PREFIX + metric.name
        if metric.kind == "histogram":
            return backend.Histogram(
                name, description=metric.help, boundaries=list(metric.buckets), tag_keys=metric.labels
            )
        if metric.kind == "counter":  # Ray adds _total to counters by itself
            return backend.Counter(name.removesuffix("_total"), description=metric.help, tag_keys=metric.labels)
        return backend.Gauge(name, description=metric.help, tag_keys=metric.labels)

    def create(self, name: str, **labels: str) -> None:
        """Let a counter's series begin at 0: one that appears with its first event shows no increase.

        Ray's own `inc` refuses 0; what stands behind it does not.
        """
        self._metrics[name]._record(0.0, tags=labels)

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        if value > 0:  # Ray's counters refuse 0
            self._metrics[name].inc(value, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].observe(value, tags=labels)

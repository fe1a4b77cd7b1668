"""A day of load on simulated pipelines: `python -m ops.bench.scaling.day --output day.json --plot day.png`.

Scaler and admission are the real code, bounds and delays are Serve's own; what is simulated are clients, the clock,
routing to the emptiest, and pipelines as fluids: Llama 2 70B on two H200s, 600 s to load. Beside it runs what Serve
does by itself, which counts requests, for two numbers to count to.
"""

import json
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from deployments.gateway.admission import Capacity, expected_wait
from deployments.gateway.crowd import Answer, Crowd
from deployments.routing.autoscaling import follow_demand

DAY_S, STEP_S = 86_400, 5
PROMPT, OUTPUT = 400, 250  # tokens of the mean request
PREFILL_RATE, MAX_SEQS, KV_TOKENS = 9000.0, 512, 350_000
STEP_OF_ONE_S, STEP_OF_ALL_S = 0.040, 0.138  # a decode step of 1 sequence, and of 512
LOAD_S, LAG_S, WINDOW_S, TARGET_S = 600, 10, 20, 30.0
MOST = 64
BATCHES = 6  # requests of a step are routed in so many parts

Json = dict[str, Any]


def arrivals(now: float) -> float:
    """Requests/s: a working day, two bursts, a steep ramp, and a night with next to nothing."""
    hour = now / 3600
    if hour < 5:
        return 0.0 if 1 <= hour < 4 else 1.0
    rate = 5 + 180 * math.exp(-(((hour - 13) / 3.5) ** 2))
    if 9.5 <= hour < 9.75:
        rate *= 2.5  # a burst of a quarter of an hour
    if 16 <= hour < 17:
        rate += 120 * min(1.0, (hour - 16) * 6)  # a ramp of ten minutes
    if 20 <= hour < 20.2:
        rate += 60
    return rate


@dataclass(slots=True)
class Pipe:
    """One pipeline, as a fluid."""

    ready_at: float
    running: float = 0.0
    waiting: float = 0.0
    prefilled: float = 0.0  # prompts/s in the last step

    @property
    def decode_rate(self) -> float:
        step = STEP_OF_ONE_S + (STEP_OF_ALL_S - STEP_OF_ONE_S) * self.running / MAX_SEQS
        return self.running / step if self.running >= 1 else 1 / STEP_OF_ONE_S

    def pass_time(self, seconds: float) -> None:
        """Prompts first, as chunks do; answers with what is left of the time."""
        seats = min(MAX_SEQS, KV_TOKENS / (PROMPT + OUTPUT)) - self.running
        begun = max(0.0, min(self.waiting, seats, PREFILL_RATE * seconds / PROMPT))
        share = begun * PROMPT / (PREFILL_RATE * seconds)
        self.waiting -= begun
        self.running += begun
        self.prefilled = begun / seconds
        speed = self.decode_rate * (1 - 0.9 * share) / max(1.0, self.running)
        self.running *= math.exp(-speed * seconds / OUTPUT)
        if self.running < 0.05:
            self.running = 0.0


@dataclass(slots=True)
class Cluster:
    """All pipelines, what they report, and what became of requests."""

    nodes: int = MOST
    pipes: list[Pipe] = field(default_factory=list)
    offered: float = 0.0
    refused: float = 0.0
    waits: list[tuple[float, float]] = field(default_factory=list)  # seconds, and how many requests

    def running(self, now: float) -> list[Pipe]:
        return [pipe for pipe in self.pipes if pipe.ready_at <= now]

    def scale(self, target: int, now: float) -> None:
        """Serve's part: who loads goes first, and what a pipeline has goes to the others."""
        target = min(target, self.nodes)
        while len(self.pipes) < target:
            self.pipes.append(Pipe(now + LOAD_S))
        while len(self.pipes) > target:
            self.lose(max(self.pipes, key=lambda pipe: (pipe.ready_at > now, -pipe.running)), now)

    def lose(self, pipe: Pipe, now: float) -> None:
        self.pipes.remove(pipe)
        others = self.running(now)
        for other in others:
            other.waiting += (pipe.running + pipe.waiting) / len(others)

    def wait(self, now: float) -> float:
        """As admission reckons it."""
        running = self.running(now)
        if not running:
            return 0.0
        crowd, count = Crowd(), sum(round(pipe.running) for pipe in running)
        for i in range(8):
            crowd.add(Answer(PROMPT, OUTPUT, 1 + i * OUTPUT // 8), (i + 1) * count // 8 - i * count // 8)
        crowd.add(Answer(PROMPT, OUTPUT), round(sum(pipe.waiting for pipe in running)))
        n = len(running)
        decode = sum(pipe.decode_rate for pipe in running)
        capacity = Capacity(n * PREFILL_RATE, decode, n * MAX_SEQS, n * KV_TOKENS)
        return expected_wait(crowd, [Answer(PROMPT, OUTPUT)], capacity, OUTPUT)

    def take(self, requests: float, now: float) -> float:
        """Route them, or refuse them; returns how many were refused. Where none runs, gateways hold 512."""
        self.offered += requests
        running = self.running(now)
        refused = 0.0
        for _ in range(BATCHES if requests else 0):
            part = requests / BATCHES
            if not running or self.wait(now) > TARGET_S:
                refused += part
                continue
            best = min(running, key=lambda pipe: (pipe.waiting, pipe.running))
            room = best.running < MAX_SEQS - 1
            rate = min(PREFILL_RATE / PROMPT, math.inf if room else best.decode_rate / OUTPUT)
            self.waits.append((best.waiting / rate, part))
            best.waiting += part
        self.refused += refused
        return refused


class Clock:
    """Serve's `time`, where its delays look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


Policy = Callable[[Json, float, int, int], int]  # reports, requests open, running, target -> target


def our_policy(config: Any) -> Policy:
    """`follow_demand`, in Serve's wrapper of delays."""
    from ray.serve import autoscaling_policy

    engine_key, gateway_key = Key("Engine"), Key("Gateway")
    wrapped = autoscaling_policy._apply_app_level_autoscaling_config(follow_demand)
    states: dict[Any, Any] = {}

    def decide(reports: Json, requests: float, running: int, target: int) -> int:
        nonlocal states
        common = {"config": config, "total_num_requests": 0}
        contexts = {
            gateway_key: SimpleNamespace(
                current_num_replicas=1, target_num_replicas=1, policy_state=states.get(gateway_key, {}),
                aggregated_metrics=reports["gateway"], **common,
            ),
            engine_key: SimpleNamespace(
                current_num_replicas=running, target_num_replicas=target, policy_state=states.get(engine_key, {}),
                aggregated_metrics=reports["engine"] if running else {}, **common,
            ),
        }  # fmt: skip
        decisions, states = wrapped(contexts)
        return int(decisions[engine_key])

    return decide


@dataclass(frozen=True, slots=True)
class Key:
    """A deployment, as Serve's contexts are found by."""

    name: str


def serves_policy(config: Any) -> Policy:
    """What Serve does without us: so many requests open for each replica."""
    from ray.serve import autoscaling_policy

    wrapped = autoscaling_policy._apply_autoscaling_config(autoscaling_policy.default_autoscaling_policy)
    state: Json = {}

    def decide(reports: Json, requests: float, running: int, target: int) -> int:
        nonlocal state
        context = SimpleNamespace(
            current_num_replicas=running, target_num_replicas=target, policy_state=state, config=config,
            total_num_requests=requests,
        )  # fmt: skip
        decision, state = wrapped(context)
        wanted: int = math.ceil(decision)
        return wanted

    return decide


def reports_of(cluster: Cluster, now: float, refused_per_s: float) -> Json:
    """What replicas say to Serve."""
    running = cluster.running(now)
    held = 0.0 if running else min(512.0, refused_per_s * TARGET_S)
    engine: Json = {}
    for i, pipe in enumerate(running):
        values = {
            "running": pipe.running, "running_tokens": pipe.running * (PROMPT + OUTPUT / 2), "waiting": pipe.waiting,
            "waiting_tokens": pipe.waiting * PROMPT, "requests": pipe.running + pipe.waiting, "mean_output": OUTPUT,
            "prefilled_per_s": pipe.prefilled * PROMPT, "prefill_rate": PREFILL_RATE, "decode_rate": pipe.decode_rate,
            "max_seqs": MAX_SEQS, "kv_tokens": KV_TOKENS,
        }  # fmt: skip
        for name, value in values.items():
            engine.setdefault(name, {})[i] = float(value)
    gateway = {
        "held": held, "held_tokens": held * PROMPT, "refused_per_s": refused_per_s if running else 0.0,
        "refused_tokens_per_s": (refused_per_s if running else 0.0) * PROMPT, "target_s": TARGET_S, "cpu": 0.5,
    }  # fmt: skip
    return {"engine": engine, "gateway": {name: {0: value} for name, value in gateway.items()}}


def mean_of(reports: list[Json]) -> Json:
    """Over the window, as Serve's controller takes it."""
    latest = reports[-1]
    found: Json = {"engine": {}, "gateway": {}}
    for owner in found:
        for name, values in latest[owner].items():
            found[owner][name] = {
                key: sum(r[owner].get(name, {}).get(key, value) for r in reports) / len(reports)
                for key, value in values.items()
            }
    return found


def simulate(make: Callable[[Any], Policy], min_replicas: int, max_replicas: int, target_requests: float) -> Json:
    """One day under one policy."""
    from ray.serve import autoscaling_policy
    from ray.serve.config import AutoscalingConfig

    clock = Clock()
    config = AutoscalingConfig(
        min_replicas=min_replicas, max_replicas=max_replicas, upscale_delay_s=20.0, downscale_delay_s=900.0,
        look_back_period_s=float(WINDOW_S), target_ongoing_requests=target_requests,
    )  # fmt: skip
    real, autoscaling_policy.time = autoscaling_policy.time, clock
    try:
        return _day(Cluster(), make(config), clock, min_replicas, max_replicas)
    finally:
        autoscaling_policy.time = real


def _day(cluster: Cluster, decide: Policy, clock: Clock, least: int, most: int) -> Json:
    target, changes, pipe_seconds = max(least, 1), 0, 0.0
    cluster.pipes = [Pipe(0.0) for _ in range(target)]
    history: deque[Json] = deque(maxlen=(LAG_S + WINDOW_S) // STEP_S)
    trace = []
    while clock.now < DAY_S:
        now = clock.now
        if now == 14 * 3600:  # a rack is gone, with a third of what runs
            for pipe in cluster.running(now)[: len(cluster.running(now)) // 3]:
                cluster.lose(pipe, now)
            cluster.scale(target, now)
        refused = cluster.take(arrivals(now) * STEP_S, now) / STEP_S
        for pipe in cluster.running(now):
            pipe.pass_time(STEP_S)
        history.append(reports_of(cluster, now, refused))
        seen = list(history)[: max(1, len(history) - LAG_S // STEP_S)]
        running = len(cluster.running(now))
        requests = sum(pipe.running + pipe.waiting for pipe in cluster.pipes) + (arrivals(now) > 0 and not running)
        wanted = max(least, min(most, decide(mean_of(seen), requests, running, target)))
        changes += wanted != target
        target = wanted
        cluster.scale(target, now)
        pipe_seconds += len(cluster.pipes) * STEP_S
        if now % 60 == 0:
            trace.append([now / 3600, round(arrivals(now), 1), target, running, round(refused, 2)])
        clock.now += STEP_S
    return {
        "offered": round(cluster.offered), "refused_percent": round(100 * cluster.refused / cluster.offered, 2),
        "wait_s": {str(p): round(percentile(cluster.waits, p / 100), 1) for p in (50, 90, 99)},
        "pipeline_hours": round(pipe_seconds / 3600, 1), "changes": changes, "trace": trace,
    }  # fmt: skip


def percentile(waits: list[tuple[float, float]], share: float) -> float:
    ordered, reached = sorted(waits), 0.0
    whole = sum(weight for _, weight in waits)
    for seconds, weight in ordered:
        reached += weight
        if reached >= share * whole:
            return seconds
    return 0.0


def draw(results: dict[str, Json], path: Path) -> None:
    """Load, pipelines and refusals over the day."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (load, pipes, refused) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 9))
    for name, result in results.items():
        hours, offered, targets, running, refusals = zip(*result["trace"], strict=True)
        load.plot(hours, offered, color="black", linewidth=1)
        lines = pipes.plot(hours, targets, label=f"{name}: target, {result['pipeline_hours']} pipeline hours")
        pipes.plot(hours, running, color=lines[0].get_color(), linestyle=":")
        refused.plot(
            hours, refusals, color=lines[0].get_color(), label=f"{name}: {result['refused_percent']} % refused"
        )
    load.set_ylabel("requests/s")
    pipes.set_ylabel("pipelines (dotted: ready)")
    refused.set_ylabel("refused/s")
    refused.set_xlabel("hour")
    pipes.legend()
    refused.legend()
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main(
    output: Annotated[Path | None, typer.Option(help="JSON of the result")] = None,
    plot: Annotated[Path | None, typer.Option(help="picture of the day")] = None,
    min_replicas: Annotated[int, typer.Option(help="pipelines that always run")] = 1,
    max_replicas: Annotated[int, typer.Option(help="pipelines that may run")] = MOST,
) -> None:
    """A day of load under the scaler, and under Serve's own policy."""
    results = {"follow_demand": simulate(our_policy, min_replicas, max_replicas, 1.0)}
    for count in (256.0, 410.0):
        results[f"Serve, {count:g} requests each"] = simulate(serves_policy, min_replicas, max_replicas, count)
    for name, result in results.items():
        typer.echo(f"{name}: {json.dumps({k: v for k, v in result.items() if k != 'trace'})}")
    if output is not None:
        output.write_text(json.dumps(results) + "\n")
    if plot is not None:
        draw(results, plot)


if __name__ == "__main__":
    typer.run(main)

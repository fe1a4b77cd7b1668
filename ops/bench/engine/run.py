"""The engine alone, on requests given all at once: no HTTP in front.

`caravan bench offline` is made of this, and so is the engine's part of `make bench`.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.engine import Engine, RecoveryReport, StepReport
from cluster.errors import CaravanError, StageDied
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.sequence import Request, TokenEvent
from deployments.config import AppConfig
from deployments.placement import bundles
from model.batch import StageTiming
from model.heap import freeze_heap
from model.sampling_params import SamplingParams
from ops.bench.service.load import percentiles
from ops.interrupt import held_back

Json = dict[str, Any]
Work = tuple[list[int], int]  # a prompt, and how many tokens it shall get


@dataclass(slots=True)
class Progress:
    """One request, in seconds of `time.perf_counter`."""

    added: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Run:
    """A listener that times what it hears and lets others wait for it. Steps are numbered from the engine's start."""

    requests: dict[str, Progress] = field(default_factory=dict)
    timings: list[StageTiming] = field(default_factory=list)  # of the steps since `expect`
    reports: list[StepReport] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)  # when each of `reports` came
    first_step: int = 0  # number of the first of `reports`
    kv_use: float = 0.0  # largest share of the KV blocks in use since `expect`
    blocks: BlockManager | None = None
    recoveries: list[RecoveryReport] = field(default_factory=list)
    error: CaravanError | None = None
    _open: int = 0
    _begun: int = 0
    _until: Callable[["Run"], bool] = field(default=lambda run: False)  # what `wait` waits for
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def expect(self, request_ids: list[str]) -> None:
        with self._changed:
            now = time.perf_counter()
            self.first_step += len(self.reports)
            self.requests = {request_id: Progress(now) for request_id in request_ids}
            self.timings, self.reports, self.ended, self.kv_use = [], [], [], 0.0
            self._open, self._begun = len(request_ids), 0

    def wait(self, until: Callable[["Run"], bool] | None = None) -> None:
        """Until every request is finished, or until `until` holds. Raises what stopped the engine."""
        with self._changed:
            self._until = until or (lambda run: run.finished == len(run.requests))
            self._changed.wait_for(lambda: self.error is not None or self._until(self))
        if self.error is not None:
            raise self.error

    @property
    def finished(self) -> int:
        return len(self.requests) - self._open

    @property
    def begun(self) -> int:
        """Requests that have their first token."""
        return self._begun

    def on_tokens(self, events: list[TokenEvent]) -> None:
        now = time.perf_counter()
        with self._changed:
            for event in events:
                progress = self.requests.get(event.request_id)
                if progress is None:
                    continue  # of a run before, stopped in the middle
                self._begun += not progress.tokens
                progress.first = progress.first or now
                progress.last = now
                progress.tokens += 1
                progress.token_ids.append(event.token_id)
                self._open -= event.finish_reason is not None

    def on_step(self, report: StepReport) -> None:
        with self._changed:
            self.reports.append(report)
            self.ended.append(time.perf_counter())
            if self.blocks is not None:
                self.kv_use = max(self.kv_use, 1 - self.blocks.num_free / self.blocks.num_blocks)
            # Not at every step: whoever wakes up wants the interpreter just when the engine chooses its next batch.
            if self._until(self):
                self._changed.notify_all()

    def on_timing(self, timing: StageTiming) -> None:
        if timing.step_id >= self.first_step:
            self.timings.append(timing)

    def on_death(self, death: StageDied) -> None:
        pass

    def on_recovery(self, report: RecoveryReport) -> None:
        self.recoveries.append(report)

    def on_failure(self, error: CaravanError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()


@contextmanager
def own_ray(config: AppConfig) -> Iterator[None]:
    """A private Ray with room for one engine of `config`, gone afterwards."""
    import ray

    cpus = sum(bundle["CPU"] for bundle in bundles(config))
    directory = tempfile.mkdtemp(prefix="cv", dir="/tmp")  # short: unix socket paths have 107 characters
    try:
        with held_back():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, int(cpus) + 1),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=directory,
            )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def placed(config: AppConfig) -> Iterator[Any]:
    """The placement group of one engine in this process's Ray, which is to be started before.

    Raises `ValueError` if this Ray has less than the configuration asks for.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted, there = bundles(config), ray.cluster_resources()
    for resource in ("CPU", "GPU"):
        need = sum(bundle.get(resource, 0.0) for bundle in wanted)
        if need > there.get(resource, 0.0):
            raise ValueError(
                f"one pipeline needs {need:g} {resource}s, this machine has {there.get(resource, 0.0):g}: "
                "lower pipeline.stages or resources"
            )
    group = placement_group(wanted)
    ray.get(group.ready(), timeout=60)
    try:
        yield group
    finally:
        remove_placement_group(group)


@contextmanager
def engine_in(config: AppConfig, group: Any, run: Run | None = None) -> Iterator[tuple[Engine, Run]]:
    """An engine with its stage actors in `group`."""
    from cluster.launch import launch_engine

    run = run or Run()
    engine = launch_engine(config, group, 1, run)
    run.blocks = engine.scheduler.blocks
    freeze_heap()
    try:
        yield engine, run
    finally:
        engine.close()


@contextmanager
def running_engine(config: AppConfig) -> Iterator[tuple[Engine, Run]]:
    """An engine with its stage actors in this process's Ray, which is to be started before."""
    with placed(config) as group, engine_in(config, group) as both:
        yield both


def submit(engine: Engine, run: Run, requests: list[Work], name: str, concurrency: int = 0) -> list[str]:
    """Give all requests to the engine, greedy, end of text ignored; returns their ids.

    With `concurrency`, at most so many are open at a time: returns when the last one has been added.
    """
    ids = [f"{name}-{i}" for i in range(len(requests))]
    run.expect(ids)
    for i, (request_id, (prompt, max_tokens)) in enumerate(zip(ids, requests, strict=True)):
        if concurrency:
            run.wait(lambda run, added=i: added - run.finished < concurrency)  # type: ignore[misc]
            run.requests[request_id].added = time.perf_counter()
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        engine.add(Request(request_id=request_id, token_ids=prompt, sampling=sampling))
    return ids


def serve_all(engine: Engine, run: Run, requests: list[Work], name: str, concurrency: int = 0) -> Json:
    """All requests at once, or at most `concurrency` of them; what came of it."""
    started = time.perf_counter()
    preemptions = engine.scheduler.stats().preemptions
    submit(engine, run, requests, name, concurrency)
    run.wait()
    seconds = time.perf_counter() - started
    done = list(run.requests.values())
    output, prompts = sum(p.tokens for p in done), sum(len(prompt) for prompt, _ in requests)
    assert output == sum(max_tokens for _, max_tokens in requests), "every request gets all of its tokens"
    return {
        "requests": len(requests),
        "concurrency": concurrency or len(requests),
        "seconds": round(seconds, 3),
        "prompt_tokens": prompts,
        "output_tokens": output,
        "request_throughput": round(len(requests) / seconds, 2),
        "output_throughput": round(output / seconds, 1),
        "total_token_throughput": round((output + prompts) / seconds, 1),
        "ttft_s": percentiles([p.first - p.added for p in done]),
        "inter_token_latency_s": percentiles([(p.last - p.first) / (p.tokens - 1) for p in done if p.tokens > 1]),
        "end_to_end_latency_s": percentiles([p.last - p.added for p in done]),
        "scheduler_ms": scheduler_ms(run.reports),
        "steps": len(run.reports),
        "tokens_per_step": round(sum(r.num_tokens for r in run.reports) / len(run.reports), 1),
        "preemptions": engine.scheduler.stats().preemptions - preemptions,
        "kv_use_peak": round(run.kv_use, 3),
        "stages": stage_shares(run.timings, engine.pipeline.depth),
        "trace": trace(run.reports, run.timings, engine.pipeline.depth),
    }


def trace(reports: list[StepReport], timings: list[StageTiming], stages: int) -> list[list[float]]:
    """Tokens and sequences of every step, then of each stage the ms it was busy, waiting and transferring."""
    rows: list[list[float]] = [[r.num_tokens, r.num_seqs] for r in reports]
    for stage in range(stages):
        own = [t for t in timings if t.stage == stage]
        for row, t in zip(rows, own, strict=False):
            row += [round(1000 * seconds, 2) for seconds in (t.finished - t.started, t.wait, t.transfer)]
    return rows


def scheduler_ms(reports: list[StepReport]) -> dict[str, float]:
    """Percentiles of the host's time per step in choosing it and in taking in what came of it."""
    return {name: 1000 * seconds for name, seconds in percentiles([r.scheduler_seconds for r in reports]).items()}


def busy_seconds(timings: list[StageTiming], stages: int) -> list[float]:
    """Of each stage in all of these steps."""
    return [sum(t.finished - t.started for t in timings if t.stage == stage) for stage in range(stages)]


def stage_shares(timings: list[StageTiming], stages: int) -> list[dict[str, float]]:
    """Busy, waiting and transfer share of each stage, from its first of these steps to its last.

    The bubble is what is not busy.
    """
    shares = []
    for stage, busy in enumerate(busy_seconds(timings, stages)):
        own = [t for t in timings if t.stage == stage]
        parts = {
            "busy": busy,
            "waiting": sum(t.wait for t in own[1:]),  # before its first step a stage waits for work, not in it
            "transfer": sum(t.transfer for t in own[1:]),
        }
        total = sum(parts.values()) or 1.0
        shares.append({name: round(seconds / total, 3) for name, seconds in parts.items()})
        shares[-1]["bubble"] = round(1 - parts["busy"] / total, 3)
    return shares

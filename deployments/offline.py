"""The engine alone, on a list of requests given all at once or as batches of equal ones: no HTTP in front.

`caravan bench offline` is made of this, and so is the engine's part of `make bench`.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cluster.engine import Engine, StepReport
from cluster.errors import CaravanError
from cluster.sequence import Request, TokenEvent
from deployments.app import bundles
from deployments.config import AppConfig
from model.batch import StageTiming
from model.sampling_params import SamplingParams
from ops import workload
from ops.load import percentiles

Json = dict[str, Any]


@dataclass(slots=True)
class Progress:
    """One request, in seconds of `time.perf_counter`."""

    added: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class Run:
    """A listener that times what it hears and knows when all of it is done."""

    requests: dict[str, Progress] = field(default_factory=dict)
    timings: list[StageTiming] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    error: CaravanError | None = None
    _open: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def expect(self, request_ids: list[str]) -> None:
        now = time.perf_counter()
        self.requests = {request_id: Progress(now) for request_id in request_ids}
        self.timings, self.reports = [], []
        self._open = len(request_ids)
        self._done.clear()

    def wait(self) -> None:
        """Until every request is finished. Raises what stopped the engine."""
        self._done.wait()
        if self.error is not None:
            raise self.error

    @property
    def finished(self) -> int:
        return len(self.requests) - self._open

    def on_tokens(self, events: list[TokenEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            progress = self.requests[event.request_id]
            progress.first = progress.first or now
            progress.last = now
            progress.tokens += 1
            self._open -= event.finish_reason is not None
        if self._open == 0:
            self._done.set()

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_timing(self, timing: StageTiming) -> None:
        self.timings.append(timing)

    def on_failure(self, error: CaravanError) -> None:
        self.error = error
        self._done.set()


@contextmanager
def running_engine(config: AppConfig) -> Iterator[tuple[Engine, Run]]:
    """An engine with its stage actors in this process's Ray, which is to be started before."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from cluster.launch import launch_engine

    group = placement_group(bundles(config))
    ray.get(group.ready(), timeout=60)
    run = Run()
    engine = launch_engine(config, group, 1, run)
    try:
        yield engine, run
    finally:
        engine.close()
        remove_placement_group(group)


def serve_all(engine: Engine, run: Run, requests: list[tuple[list[int], int]], name: str) -> Json:
    """All requests (prompt, output tokens) at once, greedy, end of text ignored; what came of it."""
    ids = [f"{name}-{i}" for i in range(len(requests))]
    run.expect(ids)
    started = time.perf_counter()
    for request_id, (prompt, max_tokens) in zip(ids, requests, strict=True):
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
        engine.add(Request(request_id=request_id, token_ids=prompt, sampling=sampling))
    run.wait()
    seconds = time.perf_counter() - started
    done = list(run.requests.values())
    output = sum(p.tokens for p in done)
    assert output == sum(max_tokens for _, max_tokens in requests), "every request gets all of its tokens"
    own = [t for t in run.timings if t.stage == 0]
    return {
        "requests": len(requests),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(len(prompt) for prompt, _ in requests),
        "output_tokens": output,
        "output_throughput": round(output / seconds, 1),
        "total_token_throughput": round((output + sum(len(p) for p, _ in requests)) / seconds, 1),
        "ttft_s": percentiles([p.first - p.added for p in done]),
        "inter_token_latency_s": percentiles([(p.last - p.first) / (p.tokens - 1) for p in done if p.tokens > 1]),
        "scheduler_ms": {k: 1000 * v for k, v in percentiles([r.scheduler_seconds for r in run.reports]).items()},
        "steps": len(run.reports),
        "tokens_per_step": round(sum(r.num_tokens for r in run.reports) / len(run.reports), 1),
        "preemptions": engine.scheduler.stats().preemptions,
        "stages": stage_shares(run.timings, engine.pipeline.depth),
        # [tokens, sequences, ms] of every step of the first stage
        "trace": [
            [r.num_tokens, r.num_seqs, round(1000 * (t.finished - t.started), 2)]
            for r, t in zip(run.reports, own, strict=False)
        ],
    }


def batch_latency(engine: Engine, run: Run, size: int, prompt_tokens: int = 64, new_tokens: int = 128) -> Json:
    """Milliseconds per token of `size` equal streams in steady decode."""
    requests = [(workload.prompt(90_000 + 1000 * size + i, prompt_tokens), new_tokens) for i in range(size)]
    result = serve_all(engine, run, requests, f"batch{size}")
    return {
        "batch": size,
        "ms_per_token": 1000 * result["inter_token_latency_s"]["p50"],
        "tokens_per_step": result["tokens_per_step"],
        "stages": result["stages"],
    }


def stage_shares(timings: list[StageTiming], stages: int) -> list[dict[str, float]]:
    """Busy, waiting and transfer share of each stage over the run."""
    shares = []
    for stage in range(stages):
        own = [t for t in timings if t.stage == stage]
        parts = {
            "busy": sum(t.finished - t.started for t in own),
            "waiting": sum(t.wait for t in own),
            "transfer": sum(t.transfer for t in own),
        }
        total = sum(parts.values()) or 1.0
        shares.append({name: round(seconds / total, 3) for name, seconds in parts.items()})
    return shares


def bench_offline(config: AppConfig, num_requests: int, batch_sizes: list[int]) -> Json:
    """The list of ops/workload.py, then single batches."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with running_engine(config) as (engine, run):
        stats = engine.scheduler.stats()
        result: Json = {"kv_tokens": stats.kv_blocks_total * config.cache.block_size, "batches": []}
        serve_all(engine, run, [(workload.prompt(80_000 + i, 32), 8) for i in range(4)], "warm")
        result["batches"] = [batch_latency(engine, run, size) for size in batch_sizes]
        if num_requests:
            lengths = workload.lengths(num_requests)
            requests = [(workload.prompt(i, n), out) for i, (n, out) in enumerate(lengths)]
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            with Progress(*columns, TimeElapsedColumn()) as bar:
                task = bar.add_task("requests", total=num_requests)
                stop = threading.Event()

                def show() -> None:
                    while not stop.wait(0.5):
                        bar.update(task, completed=run.finished)

                threading.Thread(target=show, daemon=True).start()
                result["list"] = serve_all(engine, run, requests, "list")
                stop.set()
                bar.update(task, completed=num_requests)
    return result


def offline_table(title: str, result: Json) -> Table:
    """For people."""
    table = Table("", "", title=title, show_header=False)
    table.add_row("KV tokens", f"{result['kv_tokens']:,}")
    for batch in result["batches"]:
        table.add_row(f"batch {batch['batch']}", f"{batch['ms_per_token']:.2f} ms/token")
    if "list" in result:
        done = result["list"]
        table.add_row(f"{done['requests']} requests at once", f"{done['output_throughput']:,.0f} output tok/s")
        table.add_row("", f"{done['total_token_throughput']:,.0f} total tok/s, {done['seconds']:.1f} s")
        table.add_row("scheduler, p50 / p99", "{p50:.2f} / {p99:.2f} ms a step".format(**done["scheduler_ms"]))
        for i, stage in enumerate(done["stages"]):
            table.add_row(f"stage {i}", ", ".join(f"{name} {share:.1%}" for name, share in stage.items()))
    return table

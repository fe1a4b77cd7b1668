"""`caravan bench offline`: the engine alone on the fixed list, on single batches, in steady decode, beside its floor.

What a figure could be at best is measured too, on the devices of the stages, just before (model/roofline.py).
"""

import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rich.table import Table

from cluster.config import in_8_bits, read_model
from cluster.engine import Engine
from cluster.launch import model_len, stage_layers
from deployments.config import AppConfig
from model.config import ModelConfig, balanced_counts
from model.kv_cache import FLOAT8
from model.roofline import Rates, StageWork
from ops.bench import workload
from ops.bench.engine.run import (
    Json,
    Run,
    Work,
    busy_seconds,
    engine_in,
    own_ray,
    placed,
    scheduler_ms,
    serve_all,
    stage_shares,
    submit,
    trace,
)
from ops.bench.service.load import percentiles

BATCH_PROMPT, BATCH_NEW = 64, 128  # tokens of each stream of a batch, as peers are measured
WINDOW_STEPS = 64  # decode steps of every sequence that a steady figure is the mean of


class Probe:
    """An actor that measures the device it was given; all stages' probes measure at once, for they share machines."""

    def __init__(self, config: AppConfig) -> None:
        import torch

        torch.set_num_threads(config.pipeline.threads)
        self._config = config

    def device(self) -> str:
        """Its name; also the sign that the process is up."""
        import torch

        if self._config.pipeline.device == "cuda":
            return torch.cuda.get_device_name()
        return platform.processor() or platform.machine()

    def measure(self) -> Rates:
        import torch

        from model import roofline

        pipeline, model = self._config.pipeline, self._config.model
        fp8 = model.quantization == "fp8"
        return roofline.measure(getattr(torch, model.dtype), torch.device(pipeline.device), fp8)


def measure_devices(config: AppConfig, group: Any) -> tuple[list[str], list[Rates]]:
    """Name and rates of the device in each stage's bundle of `group`."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    probe: Any = ray.remote(Probe)
    probes = []
    for i in range(1, config.pipeline.stages + 1):
        bundle = group.bundle_specs[i]
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "scheduling_strategy": place}
        probes.append(probe.options(**options).remote(config))
    names = ray.get([p.device.remote() for p in probes])
    rates = ray.get([p.measure.remote() for p in probes])
    ray.wait([p.__ray_terminate__.remote() for p in probes], num_returns=len(probes), timeout=30)
    return names, rates


class Floor:
    """The least time that the pipeline needs by what its devices can do."""

    def __init__(self, config: AppConfig, model: ModelConfig, rates: list[Rates]) -> None:
        import torch

        dtype, fp8 = getattr(torch, config.model.dtype), in_8_bits(config.model, model)
        kv_dtype = FLOAT8 if config.cache.dtype == "fp8" else dtype
        parts = stage_layers(config, model)
        self.layers = [part.stop - part.start for part in parts]  # of each stage
        self._work = [StageWork.of(model, part, dtype, fp8, kv_dtype) for part in parts]
        self._rates = rates
        self._devices = config.pipeline.tensor_parallel  # of each stage, which share its work

    def step_s(self, tokens: float, samples: float, context_tokens: float = 0.0) -> list[float]:
        """Seconds of one step, for each stage."""
        return [
            work.floor_s(rates, tokens, samples, context_tokens) / self._devices
            for work, rates in zip(self._work, self._rates, strict=True)
        ]

    def steps_s(self, run: Run) -> float:
        """Seconds of all steps of `run` on the slowest stage: no pipeline can be faster than that."""
        steps = [self.step_s(r.num_tokens, r.num_seqs) for r in run.reports]
        return max(map(sum, zip(*steps, strict=True)))

    def measured_split(self, busy_s: list[float]) -> list[int]:
        """The layers of each stage that would take equally long, by what each took for those it has.

        The head's part of the last stage's time is its part of that stage's weights.
        """
        rest = [seconds * work.head_share for seconds, work in zip(busy_s, self._work, strict=True)]
        layer = [(seconds - r) / n for seconds, r, n in zip(busy_s, rest, self.layers, strict=True)]
        return balanced_counts(sum(self.layers), layer, rest)

    def limit(self, done: Json) -> float:
        """Output tok/s of a list if nothing but its multiplications took time: all in one step of the slowest stage."""
        seconds = max(self.step_s(done["prompt_tokens"] + done["output_tokens"], done["output_tokens"]))
        return float(done["output_tokens"] / seconds)


def list_figures(engine: Engine, run: Run, floor: Floor, requests: list[Work], concurrency: int) -> Json:
    """The list at once, or so many of it."""
    done = serve_all(engine, run, requests, "list", concurrency)
    floor_s = floor.steps_s(run)
    return {
        **done,
        "floor_s": round(floor_s, 3),
        "share_of_floor": round(floor_s / done["seconds"], 3),
        "limit_output_throughput": round(floor.limit(done), 1),
    }


def batch_figures(engine: Engine, run: Run, floor: Floor, vocab_size: int, size: int, longest: int) -> Json:
    """Milliseconds per token of `size` equal streams in steady decode. A token passes all stages: so does its floor."""
    prompt, new = min(BATCH_PROMPT, longest), min(BATCH_NEW, longest)
    requests = [(workload.prompt(90_000 + 1000 * size + i, prompt, vocab_size), new) for i in range(size)]
    result = serve_all(engine, run, requests, f"batch{size}")
    at_once = -(-size // engine.pipeline.depth)  # of one cohort
    floor_ms = 1000 * sum(floor.step_s(at_once, at_once))
    measured = 1000 * result["inter_token_latency_s"]["p50"]
    return {
        "batch": size,
        "ms_per_token": measured,
        "floor_ms_per_token": round(floor_ms, 3),
        "share_of_floor": round(floor_ms / measured, 3),
        "output_throughput": result["output_throughput"],
        "tokens_per_step": result["tokens_per_step"],
        "stages": result["stages"],
    }


def steady_figures(engine: Engine, run: Run, floor: Floor, vocab_size: int, num_seqs: int, context: int) -> Json:
    """`num_seqs` sequences that all decode, with about `context` tokens each: a window in which nothing begins or ends.

    Raises `ValueError` if the engine cannot hold them.
    """
    scheduler, depth = engine.scheduler, engine.pipeline.depth
    prompt = max(1, context - WINDOW_STEPS // 2)
    # Sequences whose prompts come first decode on while the others' are computed.
    prefill_steps = -(-num_seqs * prompt // scheduler.max_num_batched_tokens) * 2
    needed = prompt + prefill_steps + 2 * WINDOW_STEPS
    room = scheduler.blocks.num_blocks * scheduler.blocks.block_size // num_seqs
    if num_seqs > scheduler.max_num_seqs or needed > min(room, scheduler.max_model_len):
        raise ValueError(
            f"--steady {num_seqs}x{context} needs {num_seqs} sequences of {needed} tokens, the engine holds "
            f"{scheduler.max_num_seqs} of {min(room, scheduler.max_model_len)}: ask for less, or raise "
            "scheduler.max_num_seqs, model.max_model_len or the cache"
        )
    requests = [(workload.prompt(50_000 + i, prompt, vocab_size), needed - prompt) for i in range(num_seqs)]
    ids = submit(engine, run, requests, "steady")
    run.wait(lambda r: r.begun == num_seqs)
    first = len(run.reports) + 2 * (depth + 1)  # let the last prompts' steps drain
    last = first + WINDOW_STEPS * depth  # a step takes one cohort of `depth`
    run.wait(lambda r: len(r.reports) > last)
    context_now = sum(len(p) + run.requests[i].tokens for i, (p, _) in zip(ids, requests, strict=True)) / num_seqs
    assert run.finished == 0, "a sequence ended within the window"
    for request_id in ids:
        engine.abort(request_id)
    time.sleep(0.2)  # what is in flight comes back
    return steady_window(run, floor, first, last, depth, context_now - WINDOW_STEPS / 2)


def steady_window(run: Run, floor: Floor, first: int, last: int, depth: int, context: float) -> Json:
    """Figures of the steps `first` to `last` of `run`, in which every sequence has about `context` tokens."""
    reports = run.reports[first:last]
    ended = run.ended[first - 1 : last]
    seconds, gaps = ended[-1] - ended[0], [1000 * (after - before) for before, after in pairwise(ended)]
    tokens = sum(r.num_tokens for r in reports)
    at_once = tokens / len(reports)
    floor_s = max(floor.step_s(at_once, at_once, at_once * context))
    window = range(run.first_step + first, run.first_step + last)
    timings = [t for t in run.timings if t.step_id in window]
    return {
        "num_seqs": round(at_once * depth),
        "context_tokens": round(context),
        "steps": len(reports),
        "all_decode": all(r.num_tokens == r.num_seqs for r in reports),
        "output_throughput": round(tokens / seconds, 1),
        "ms_per_step": round(1000 * seconds / len(reports), 3),
        "step_ms": {**percentiles(gaps), "longest": max(gaps)},  # one that is late, or all a little
        "floor_ms_per_step": round(1000 * floor_s, 3),
        "share_of_floor": round(floor_s * len(reports) / seconds, 3),
        "scheduler_ms": scheduler_ms(reports),
        "stages": stage_shares(timings, depth),
        "split": floor.layers,
        "measured_split": floor.measured_split(busy_seconds(timings, depth)),
        "trace": trace(reports, timings, depth),
    }


def bench_offline(
    config: AppConfig,
    num_requests: int,
    batch_sizes: list[int],
    steady: tuple[int, int] | None,
    longest: int,
    concurrency: int = 0,
    which: workload.ListName = "mixed",
) -> Json:
    """All that was asked for, in a Ray of its own. Raises `ValueError` for what the user must change."""
    model = read_model(config.model)
    vocab_size = min(workload.VOCAB_SIZE, model.vocab_size)
    longest = min(longest, model_len(config, model) // 2)
    with own_ray(config), placed(config) as group:
        devices, rates = measure_devices(config, group)
        floor = Floor(config, model, rates)
        started = time.monotonic()
        with engine_in(config, group) as (engine, run):
            result: Json = {
                "devices": devices,
                "versions": versions(),
                "rates": [asdict(r) for r in rates],
                "policy": config.scheduler.policy,
                "start_s": round(time.monotonic() - started, 1),
                "kv_tokens": engine.scheduler.stats().kv_blocks_total * config.cache.block_size,
            }
            serve_all(engine, run, [(workload.prompt(80_000 + i, 32, vocab_size), 8) for i in range(4)], "warm")
            result["batches"] = [batch_figures(engine, run, floor, vocab_size, size, longest) for size in batch_sizes]
            if steady is not None:
                result["steady"] = steady_figures(engine, run, floor, vocab_size, *steady)
            if num_requests:
                with progress_shown(run, num_requests):
                    requests = workload.requests(which, num_requests, vocab_size, longest)
                    result["list"] = {"name": which, **list_figures(engine, run, floor, requests, concurrency)}
    return result


def versions() -> Json:
    """Of what computes."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "ray")}}


@contextmanager
def progress_shown(run: Run, total: int) -> Iterator[None]:
    """A bar of the finished requests."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("requests", total=total)
        stop = threading.Event()

        def show() -> None:
            while not stop.wait(0.5):
                bar.update(task, completed=run.finished)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bar.update(task, completed=run.finished)


def offline_table(title: str, result: Json) -> Table:
    """For people."""
    table = Table("", "", "floor", "share of it", title=title)
    table.add_row("ready after", f"{result['start_s']:.1f} s")
    table.add_row("KV tokens", f"{result['kv_tokens']:,}")
    slowest = min(result["rates"], key=lambda r: float(r["bytes_per_s"]))
    rates = f"{slowest['bytes_per_s'] / 1e9:,.0f} GB/s copied, {slowest['flops'] / 1e12:,.2f} TFLOP/s"
    if slowest["float8_flops"] is not None:
        rates += f", in 8 bits {slowest['float8_flops'] / 1e12:,.2f}"
    table.add_row("a stage's device", rates)
    for batch in result["batches"]:
        floor = f"{batch['floor_ms_per_token']:.2f} ms"
        figure = f"{batch['ms_per_token']:.2f} ms/token"
        table.add_row(f"batch {batch['batch']}", figure, floor, f"{batch['share_of_floor']:.1%}")
    if "steady" in result:
        _add_steady(table, result["steady"])
    if "list" in result:
        _add_list(table, result["list"], result["policy"])
    return table


def _add_steady(table: Table, steady: Json) -> None:
    name = f"steady decode, {steady['num_seqs']} sequences of {steady['context_tokens']} tokens"
    floor = f"{steady['floor_ms_per_step']:.2f} ms"
    table.add_row(name, f"{steady['ms_per_step']:.2f} ms a step", floor, f"{steady['share_of_floor']:.1%}")
    gaps = "p50 {p50:.2f}, p99 {p99:.2f}, longest {longest:.2f} ms".format(**steady["step_ms"])
    table.add_row("", f"{steady['output_throughput']:,.0f} output tok/s", gaps)
    table.add_row("scheduler, p50 / p99", "{p50:.2f} / {p99:.2f} ms a step".format(**steady["scheduler_ms"]))
    _add_stages(table, steady["stages"])
    if len(steady["split"]) > 1:
        table.add_row("pipeline.split", f"{steady['split']}", f"by these steps: {steady['measured_split']}")


def _add_list(table: Table, done: Json, policy: str) -> None:
    table.add_row(
        f"{done['requests']} requests, {done['concurrency']} at once, {policy}",
        f"{done['output_throughput']:,.0f} output tok/s",
        f"at most {done['limit_output_throughput']:,.0f}",
        f"{done['output_throughput'] / done['limit_output_throughput']:.1%}",
    )
    took = f"{done['total_token_throughput']:,.0f} total tok/s, {done['seconds']:.1f} s"
    table.add_row("", took, f"{done['floor_s']:.1f} s for its steps", f"{done['share_of_floor']:.1%}")
    table.add_row("KV use, at most", f"{done['kv_use_peak']:.1%}, {done['preemptions']} preemptions")
    table.add_row("scheduler, p50 / p99", "{p50:.2f} / {p99:.2f} ms a step".format(**done["scheduler_ms"]))
    _add_stages(table, done["stages"])


def _add_stages(table: Table, stages: list[dict[str, float]]) -> None:
    for i, stage in enumerate(stages):
        table.add_row(f"  stage {i}", ", ".join(f"{name} {share:.1%}" for name, share in stage.items()))

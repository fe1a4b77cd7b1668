"""`make bench`: the engine alone, the same through HTTP, and the peers, one after another in one run.

The work: `--streams` prompts of 100 random tokens at once, 128 greedy tokens each, end of text ignored. Every figure is
output tokens over the seconds from the first submission to the last token, prompts included; the median of `--rounds`.
"""

import asyncio
import json
import random
import statistics
import time
from collections import deque
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from rich.console import Console
from rich.table import Table

from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request
from deployments.config import AppConfig, parse_app_config
from model.batch import Batch, StepOutput
from model.sampling_params import SamplingParams
from ops.bench.engine.run import own_ray, running_engine, serve_all
from ops.bench.peers import servers
from ops.bench.service import load
from ops.bench.service.load import percentiles
from ops.interrupt import end_on_signals

PROMPT_TOKENS, NEW_TOKENS = 100, 128
CACHE_BYTES = 128 << 20  # more than a core has caches of its own
console = Console()


def prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids: what they say is of no matter to speed, and no two rounds share a prefix."""
    rng = random.Random(seed)
    return [[rng.randrange(20, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def bench_engine(config: AppConfig, stages: int, streams: list[int], rounds: int) -> dict[str, Any]:
    """The engine with `stages` stage actors, nothing in front of it: medians of `rounds` after one to warm up."""
    split = config.pipeline.split if stages == config.pipeline.stages else "auto"
    pipeline = config.pipeline.model_copy(update={"stages": stages, "split": split})
    config = config.model_copy(update={"pipeline": pipeline})
    speeds: dict[int, float] = {}
    with running_engine(config) as (engine, run):
        for n in streams:
            results = [
                serve_all(engine, run, [(p, NEW_TOKENS) for p in prompts(n, 49_000, 1000 * n + r)], f"{stages}-{n}-{r}")
                for r in range(rounds + 1)
            ][1:]
            speeds[n], last = statistics.median(r["output_throughput"] for r in results), results[-1]
    return {"tokens_per_s": speeds, "scheduler_ms": last["scheduler_ms"]["p50"], "stages": last["stages"]}


def engine_alone(config: AppConfig, stages: int, streams: list[int], rounds: int) -> dict[str, Any]:
    """`bench_engine` in a Ray of its own."""
    console.print(f"engine alone, {stages} stage(s) ...")
    with own_ray(config):
        return bench_engine(config, stages, streams, rounds)


def bench_scheduler(num_seqs: int, depth: int, cold: bool = False, steps: int = 400) -> dict[str, float]:
    """Milliseconds of scheduler time per step (schedule and update) in steady decode, with no model behind it.

    `cold`: between steps the processor's caches forget what the scheduler keeps, as they do while a GPU computes.
    """
    scheduler = Scheduler(
        BlockManager(num_seqs * 40, 16), depth=depth, max_num_seqs=num_seqs, max_num_batched_tokens=2048,
        max_model_len=4096,
    )  # fmt: skip
    for i, prompt in enumerate(prompts(num_seqs, 49_000, 1)):
        sampling = SamplingParams(max_tokens=500, seed=0, temperature=0.0)
        scheduler.add(Request(request_id=str(i), token_ids=prompt, sampling=sampling))
    in_flight: deque[Batch] = deque()
    seconds = []
    others = np.zeros(CACHE_BYTES if cold else 0, np.uint8)  # what else there is in memory
    for _ in range(steps):
        others += 1
        started = time.perf_counter()
        while len(in_flight) <= depth and (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
        done = in_flight.popleft()
        scheduler.update(done, StepOutput(done.epoch, done.step_id, [7] * len(done.sample_rows), {}))
        seconds.append(time.perf_counter() - started)
    steady = percentiles(seconds[steps // 4 :])
    return {name: round(1000 * value, 3) for name, value in steady.items()}


def bench_http(url: str, model: str, streams: int, rounds: int) -> list[load.Summary]:
    """The same work through HTTP, streamed, after one round to warm up."""
    summaries = []
    for r in range(rounds + 1):
        bodies = [
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "logit_bias": {"2": -100},  # no early end
                "stream_options": {"include_usage": True},
            }
            for prompt in prompts(streams, 49_000, 7_000_000 + r)
        ]
        summary, _ = asyncio.run(load.run(f"{url}/v1/completions", bodies, streams))
        if summary.failed:
            raise RuntimeError(f"{summary.failed} of {summary.requests} requests failed")
        summaries.append(summary)
    return summaries[1:]


def main(
    config: Annotated[Path, typer.Option(help="the configuration whose model and cache to use")] = Path(
        "ray_config.yaml"
    ),
    streams: Annotated[int, typer.Option(help="requests at once")] = 8,
    rounds: Annotated[int, typer.Option(help="measured rounds; the median counts")] = 3,
    parts: Annotated[str, typer.Option(help="any of engine, http, peers")] = "engine,http,peers",
    output: Annotated[Path | None, typer.Option(help="write the result as JSON here")] = None,
) -> None:
    """Measure this machine: ours and the peers in one run."""
    from model.weights import resolve_path
    from ops.local import await_ready, ray_head

    args = yaml.safe_load(config.read_text("utf-8"))["applications"][0]["args"]
    app = parse_app_config(args)
    result: dict[str, Any] = {"date": date.today().isoformat(), "streams": streams, "rounds": rounds}
    for n in (64, 256):
        result[f"scheduler_{n}_ms"] = bench_scheduler(n, depth=2)
    result["scheduler_256_one_stage_ms"] = bench_scheduler(256, depth=1)
    result["scheduler_256_one_stage_cold_ms"] = bench_scheduler(256, depth=1, cold=True)
    if "engine" in parts:
        for stages in (1, 2):
            result[f"engine_{stages}"] = engine_alone(app, stages, [1, streams], rounds)
    if "http" in parts:
        console.print("the deployed service over HTTP ...")
        with ray_head(2) as head:
            url = "http://127.0.0.1:8000"
            head.serve("deploy", str(config))
            await_ready(head, url)
            summaries = bench_http(url, app.model.name, streams, rounds)
            result["http"] = {
                "tokens_per_s": {streams: statistics.median(s.output_throughput for s in summaries)},
                "ttft_p50_s": statistics.median(s.ttft_s["p50"] for s in summaries),
                "inter_token_p50_s": statistics.median(s.inter_token_latency_s["p50"] for s in summaries),
            }
            head.serve("shutdown", "-y")
    if "engine" in parts and "http" in parts:  # once more: the machine's speed drifts from minute to minute
        result["engine_2_after_http"] = engine_alone(app, 2, [streams], rounds)
    if "peers" in parts:
        path = resolve_path(app.model.path)
        for name in servers.PEERS:
            console.print(f"{name} ...")
            try:
                speeds = {
                    n: n * NEW_TOKENS / servers.run_peer(name, path, prompts(n, 49_000, 5), NEW_TOKENS, threads=2)
                    for n in (1, streams)
                }
            except RuntimeError as error:
                console.print(f"[yellow]{error}[/yellow]")
                continue
            result[name] = {"tokens_per_s": speeds}
    console.print(table(result, streams))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def table(result: dict[str, Any], streams: int) -> Table:
    """For people."""
    shown = Table("", "1 stream, tok/s", f"{streams} streams, tok/s", "notes", title=f"{result['date']}, 2 cores")
    for name, entry in result.items():
        if name.startswith("scheduler_"):
            shown.add_row(name, "", "", "a step: " + ", ".join(f"{k} {v} ms" for k, v in entry.items()))
        elif isinstance(entry, dict):
            speeds = entry["tokens_per_s"]
            cells = [f"{speeds[n]:.1f}" if n in speeds else "" for n in (1, streams)]
            notes = "; ".join(f"{k} {v}" for k, v in entry.items() if k != "tokens_per_s")
            shown.add_row(name, *cells, notes)
    return shown


if __name__ == "__main__":
    end_on_signals()
    typer.run(main)

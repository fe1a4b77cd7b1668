"""`make bench`: the engine alone, the same through HTTP, and the peers, one after another in one run.

The work: `--streams` prompts of 100 random tokens at once, 128 greedy tokens each, end of text ignored. Every figure is
output tokens over the seconds from the first submission to the last token, prompts included; the median of `--rounds`.
"""

import asyncio
import json
import random
import statistics
import threading
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from cluster.engine import Engine, StepReport
from cluster.errors import CaravanError
from cluster.sequence import Request, TokenEvent
from deployments.config import AppConfig, parse_app_config
from model.batch import StageTiming
from model.sampling_params import SamplingParams
from ops import load, peers

PROMPT_TOKENS, NEW_TOKENS = 100, 128
console = Console()


class Finish:
    """A listener that knows when everything is done."""

    def __init__(self) -> None:
        self.scheduler_seconds: list[float] = []
        self.timings: list[StageTiming] = []
        self._open = 0
        self._done = threading.Event()
        self.error: CaravanError | None = None

    def expect(self, count: int) -> None:
        self._open = count
        self._done.clear()

    def wait(self) -> None:
        self._done.wait()
        if self.error is not None:
            raise self.error

    def on_tokens(self, events: list[TokenEvent]) -> None:
        self._open -= sum(event.finish_reason is not None for event in events)
        if self._open == 0:
            self._done.set()

    def on_step(self, report: StepReport) -> None:
        self.scheduler_seconds.append(report.scheduler_seconds)

    def on_timing(self, timing: StageTiming) -> None:
        self.timings.append(timing)

    def on_failure(self, error: CaravanError) -> None:
        self.error = error
        self._done.set()


def prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids: what they say is of no matter to speed, and no two rounds share a prefix."""
    rng = random.Random(seed)
    return [[rng.randrange(20, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def engine_rounds(engine: Engine, listener: Finish, streams: int, rounds: int) -> list[float]:
    """Tokens per second of each round, after one to warm up."""
    speeds = []
    for r in range(rounds + 1):
        listener.expect(streams)
        started = time.perf_counter()
        for i, prompt in enumerate(prompts(streams, 49_000, 1000 * streams + r)):
            sampling = SamplingParams(max_tokens=NEW_TOKENS, seed=0, temperature=0.0)
            engine.add(Request(request_id=f"{streams}-{r}-{i}", token_ids=prompt, sampling=sampling))
        listener.wait()
        speeds.append(streams * NEW_TOKENS / (time.perf_counter() - started))
    return speeds[1:]


def bench_engine(config: AppConfig, stages: int, streams: list[int], rounds: int) -> dict[str, Any]:
    """The engine with `stages` stage actors in this process's Ray, nothing in front of it."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from cluster.launch import launch_engine

    split = config.pipeline.split if stages == config.pipeline.stages else "auto"
    pipeline = config.pipeline.model_copy(update={"stages": stages, "split": split})
    config = config.model_copy(update={"pipeline": pipeline})
    group = placement_group([{"CPU": 0.1}, *[{"CPU": 0.3}] * stages])
    ray.get(group.ready(), timeout=60)
    listener = Finish()
    engine = launch_engine(config, group, 1, listener)
    try:
        speeds = {n: statistics.median(engine_rounds(engine, listener, n, rounds)) for n in streams}
    finally:
        engine.close()
        remove_placement_group(group)
    return {
        "tokens_per_s": speeds,
        "scheduler_ms": 1000 * statistics.median(listener.scheduler_seconds),
        "stages": stage_shares(listener.timings, stages),
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
    import ray

    from deployments.local import await_ready, ray_head
    from model.weights import resolve_path

    args = yaml.safe_load(config.read_text("utf-8"))["applications"][0]["args"]
    app = parse_app_config(args)
    result: dict[str, Any] = {"date": date.today().isoformat(), "streams": streams, "rounds": rounds}
    if "engine" in parts:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        for stages in (1, 2):
            console.print(f"engine alone, {stages} stage(s) ...")
            counts = [1, streams]
            result[f"engine_{stages}"] = bench_engine(app, stages, counts, rounds)
        ray.shutdown()
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
    if "peers" in parts:
        path = resolve_path(app.model.path)
        for name in peers.PEERS:
            console.print(f"{name} ...")
            try:
                speeds = {
                    n: n * NEW_TOKENS / peers.run_peer(name, path, prompts(n, 49_000, 5), NEW_TOKENS, threads=2)
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
        if isinstance(entry, dict):
            speeds = entry["tokens_per_s"]
            cells = [f"{speeds[n]:.1f}" if n in speeds else "" for n in (1, streams)]
            notes = "; ".join(f"{k} {v}" for k, v in entry.items() if k != "tokens_per_s")
            shown.add_row(name, *cells, notes)
    return shown


if __name__ == "__main__":
    typer.run(main)

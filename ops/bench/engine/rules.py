"""`caravan bench rules`: what penalties, logit_bias, logprobs and sampling cost beside greedy decoding, on all streams.

Three looks: what a step sends; the real scheduler before stages that only take time, the worst of several arrivals;
and the engine with its stages as threads of this process, in turns with its greedy peer.
"""

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

from cluster.engine import Engine
from cluster.local_pipeline import LocalPipeline
from cluster.pipeline import max_in_flight
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request, TokenEvent
from cluster.transport import ControlClient, ControlServer, Ready, StepOrder, Wakeup, encode
from deployments.config import AppConfig
from model.batch import Batch, StepOutput
from model.config import split_layers
from model.llama import Decoder
from model.sampling_params import SamplingParams
from model.stage import Stage
from model.weights import open_checkpoint, resolve_path
from ops.bench.engine.fairness import step_seconds
from ops.bench.engine.simulated import SimulatedStages

Json = dict[str, Any]
KINDS: dict[str, Json] = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logit_bias": {"temperature": 0.0, "logit_bias": {7 * i: 0.5 for i in range(100)}},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
}
BLOCK, PROMPT, LONG = 16, 64, 99_000  # tokens


def scheduler_of(depth: int, num_seqs: int, num_blocks: int, longest: int) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK, prefix_caching=False)
    return Scheduler(
        blocks, depth=depth, max_num_seqs=num_seqs, max_num_batched_tokens=2048, max_model_len=longest
    )  # fmt: skip


def requests(kind: str, count: int, output: int, seed: int = 0) -> Iterator[Request]:
    rng = random.Random(seed)
    for i in range(count):
        prompt = [rng.randrange(1000) for _ in range(PROMPT)]
        yield Request(
            request_id=str(i), token_ids=prompt, sampling=SamplingParams(max_tokens=output, seed=i, **KINDS[kind])
        )


def wire_figures(kind: str, with_long: bool, depth: int = 4, steps: int = 50) -> Json:
    """What each of 256 sequences' decode steps sends, over real sockets; medians."""
    scheduler = scheduler_of(depth, 256, 32_000, 100_000)
    if with_long:
        sampling = SamplingParams(max_tokens=500, seed=0, temperature=0.0)
        scheduler.add(Request(request_id="long", token_ids=[5] * LONG, sampling=sampling))
    for request in requests(kind, 256 - with_long, 500):
        scheduler.add(request)
    in_flight: deque[Batch] = deque()

    def step() -> Batch:
        while len(in_flight) < max_in_flight(depth) and (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
        batch = in_flight.popleft()
        scheduler.update(batch, StepOutput(batch.epoch, batch.step_id, [7] * len(batch.sample_rows), {}))
        return batch

    while (batch := step()).num_seqs < 256 // depth or batch.num_tokens > batch.num_seqs:
        pass
    server = ControlServer("127.0.0.1", depth, Wakeup())
    clients = [ControlClient(server.address(i), i) for i in range(depth)]
    sizes, seconds = [], []
    try:
        for i, client in enumerate(clients):
            client.send(Ready(0, i))
            server.receive(5.0)
        for _ in range(steps):
            order = StepOrder(step(), 5.0)
            sizes.append(len(encode(order)))
            started = time.perf_counter()
            server.send(order)
            for client in clients:
                client.receive()
            seconds.append(time.perf_counter() - started)
    finally:
        for client in clients:
            client.close()
        server.close()
    return {
        "kind": kind,
        "sequences": 256,
        "longest": LONG if with_long else PROMPT,
        "stages": depth,
        "kilobytes": round(max(sizes) / 1000, 1),
        "ms": round(1000 * statistics.median(seconds), 2),
    }


def simulated_rate(kind: str, depth: int, seed: int, count: int = 256, seconds: float = 20.0) -> float:
    """Tokens a second of streams that arrive one by one within a second, in the time after it."""
    rng, scheduler = random.Random(seed), scheduler_of(depth, count, 64_000, 4096)
    arrivals = sorted((rng.random(), i) for i in range(count))
    waiting = deque((at, request) for (at, _), request in zip(arrivals, requests(kind, count, 4000), strict=True))
    stages, now, tokens = SimulatedStages(depth, step_seconds), 0.0, 0
    in_flight: deque[tuple[Batch, float]] = deque()
    while now < seconds:
        while len(in_flight) < max_in_flight(depth) and (batch := scheduler.schedule()) is not None:
            in_flight.append((batch, stages.compute(batch, now)))
        if waiting and (not in_flight or waiting[0][0] < in_flight[0][1]):
            now, request = waiting.popleft()
            scheduler.add(request)
            continue
        batch, now = in_flight.popleft()
        output = StepOutput(batch.epoch, batch.step_id, [7] * len(batch.sample_rows), {})
        events = scheduler.update(batch, output)
        tokens += len(events) if now > seconds / 2 else 0
    return tokens / (seconds / 2)


def simulated_figures(kind: str, depth: int, seeds: int) -> Json:
    """The worst and the median of several arrivals, each beside the same of greedy streams."""
    ratios = [simulated_rate(kind, depth, i) / simulated_rate("greedy", depth, i) for i in range(seeds)]
    return {
        "kind": kind,
        "stages": depth,
        "arrivals": seeds,
        "worst": round(min(ratios), 4),
        "median": round(statistics.median(ratios), 4),
    }


class Counter:
    """A listener that counts tokens and knows when all streams have ended."""

    def __init__(self, streams: int) -> None:
        self.ended, self._left = threading.Event(), streams

    def on_tokens(self, events: list[TokenEvent]) -> None:
        self._left -= sum(event.finish_reason is not None for event in events)
        if not self._left:
            self.ended.set()

    def __getattr__(self, name: str) -> Any:  # of what else an engine reports nothing is wanted
        return lambda *_: None


def engine_figures(config: AppConfig, stages: int, streams: int, output: int, turns: int) -> list[Json]:
    """Each kind's share of the greedy tokens a second, in turns; medians."""
    checkpoint = open_checkpoint(resolve_path(config.model.path))
    dtype, device = getattr(torch, config.model.dtype), torch.device(config.pipeline.device)
    decoders = [
        Decoder(checkpoint.config, part, checkpoint.tensors(part.tensor_names(checkpoint.config)), dtype, device, 2048)
        for part in split_layers(checkpoint.config, stages)
    ]
    num_blocks = streams * -(-(PROMPT + output) // BLOCK) + 1
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    engine = Engine(
        scheduler_of(stages, streams, num_blocks, 2048),
        LocalPipeline([Stage(decoder, num_blocks, BLOCK, streams) for decoder in decoders]),
        Counter(1),
    )
    engine.start()
    try:
        for kind in KINDS:  # what is loaded at its first use is loaded
            _rate(engine, kind, streams, 2)
        for _ in range(turns):
            for kind in KINDS:
                rates[kind].append(_rate(engine, kind, streams, output))
    finally:
        engine.close()
    greedy = rates["greedy"]
    shares = {kind: [a / b for a, b in zip(found, greedy, strict=True)] for kind, found in rates.items()}
    return [
        {
            "kind": kind,
            "stages": stages,
            "streams": streams,
            "tokens_per_s": round(statistics.median(rates[kind]), 1),
            "of_greedy": round(statistics.median(shares[kind]), 3),
            "shares": [round(share, 3) for share in shares[kind]],
        }
        for kind in KINDS
    ]


def _rate(engine: Engine, kind: str, streams: int, output: int) -> float:
    counter = Counter(streams)
    engine._listener = counter
    started = time.monotonic()
    for request in requests(kind, streams, output):
        engine.add(request)
    counter.ended.wait()
    return streams * output / (time.monotonic() - started)


def bench_rules(config: AppConfig, streams: int, output: int, turns: int, seeds: int) -> Json:
    return {
        "wire": [wire_figures(kind, with_long) for kind in KINDS for with_long in (False, True)],
        "simulated": [simulated_figures(kind, depth, seeds) for depth in (2, 4) for kind in KINDS if kind != "greedy"],
        "engine": [row for depth in (2, 4) for row in engine_figures(config, depth, streams, output, turns)],
    }


def rules_table(result: Json) -> Table:
    """For people."""
    table = Table("look", "stages", "kind", "", title="penalties and the rest beside greedy decoding")
    for row in result["wire"]:
        what = f"{row['kilobytes']} kB a step, {row['ms']} ms to all; longest context {row['longest']:,}"
        table.add_row("256 sequences, sent", str(row["stages"]), row["kind"], what)
    for row in result["simulated"]:
        what = f"{row['worst']:.1%} of greedy at worst of {row['arrivals']} arrivals"
        table.add_row("simulated stages", str(row["stages"]), row["kind"], what)
    for row in result["engine"]:
        what = f"{row['tokens_per_s']} tokens/s, {row['of_greedy']:.1%} of greedy"
        table.add_row(f"engine, {row['streams']} streams", str(row["stages"]), row["kind"], what)
    return table

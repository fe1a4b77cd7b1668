"""`caravan bench adapters`: what LoRA adapters cost a step, and what it costs others when one is swapped in.

The engine alone, its one stage a thread of this process, with adapters made up at random and read from files. The peer
is the same engine without room for adapters, over the same weights; kinds take turns.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file

from cluster.engine import Engine, StepReport
from cluster.local_pipeline import LocalPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import AdapterRef, Request
from deployments.config import AppConfig
from model.adapters import CONFIG, SAFE, STEMS, AdapterFiles, product_shape
from model.adapters.store import AdapterArgs, StageAdapters
from model.config import ModelConfig, split_layers
from model.group import DecoderGroup
from model.llama import Decoder
from model.sampling_params import SamplingParams
from model.stage import Stage
from model.weights import open_checkpoint, resolve_path
from model.weights.dummy import DummyCheckpoint
from model.weights.hf import LAYER_NAMES
from ops.bench.engine.rules import Counter

Json = dict[str, Any]
BLOCK, PROMPT, LONGEST = 16, 32, 1024
PLACES_S = 300.0  # that loading all adapters may take


class Clock(Counter):
    """How long each step took in which all streams were decoded."""

    def __init__(self, streams: int) -> None:
        super().__init__(streams)
        self.streams, self.seconds, self.mixed = streams, list[float](), list[float]()

    def on_step(self, report: StepReport) -> None:
        if report.num_tokens == report.num_seqs == self.streams:
            self.seconds.append(report.seconds)
        elif report.num_prefill_tokens:
            self.mixed.append(report.seconds)


def write_adapter(path: Path, config: ModelConfig, rank: int, seed: int, dtype: torch.dtype) -> AdapterRef:
    """A random one for all products, as PEFT would write it."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.n_layers):
        for stem in STEMS:
            outputs, inputs = product_shape(config, f"layers.{layer}.{stem}")
            module = f"base_model.model.model.layers.{layer}.{LAYER_NAMES[stem]}"
            for which, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                tensors[f"{module}.lora_{which}.weight"] = (torch.rand(shape, generator=generator) / 50).to(dtype)
    path.mkdir()
    save_file(tensors, path / SAFE)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return AdapterRef(AdapterFiles(path).digest(), str(path))


@contextmanager
def opened(stage: Stage, streams: int, num_blocks: int, adapters: int) -> Iterator[Engine]:
    blocks = BlockManager(num_blocks, BLOCK, prefix_caching=False)
    scheduler = Scheduler(
        blocks, depth=1, max_num_seqs=streams, max_num_batched_tokens=512, max_model_len=LONGEST, max_adapters=adapters
    )
    engine = Engine(scheduler, LocalPipeline([stage]), Counter(1), max_host_adapters=10_000)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def run_streams(engine: Engine, adapters: list[AdapterRef | None], tokens: int) -> Clock:
    """A stream with each of these, all at once."""
    clock = Clock(len(adapters))
    engine._listener = clock
    for i, adapter in enumerate(adapters):
        sampling = SamplingParams(max_tokens=tokens, seed=0, temperature=0.0)
        prompt = [(7 * i + j) % 100 for j in range(PROMPT)]
        engine.add(Request(request_id=str(i), token_ids=prompt, sampling=sampling, adapter=adapter))
    clock.ended.wait()
    return clock


def swap_figures(engine: Engine, refs: list[AdapterRef], streams: int, rounds: int) -> Json:
    """Short streams one after another beside long ones: of adapters that have slots, and of such that need one each."""
    found: Json = {}
    sampling = SamplingParams(max_tokens=LONGEST - 2 * PROMPT, seed=0, temperature=0.0)
    for kind, chosen in (("resident", refs[:1]), ("swapped in", refs)):
        long = Clock(streams - 1)
        engine._listener = long
        for i in range(streams - 1):
            engine.add(Request(request_id=f"long-{i}", token_ids=[i] * PROMPT, sampling=sampling))
        firsts, before = [], engine.scheduler.adapters.num_placed
        time.sleep(0.5)
        long.mixed.clear()
        for i in range(rounds):
            clock = Clock(1)
            clock.seconds, clock.mixed = long.seconds, long.mixed
            clock.streams = streams
            engine._listener = clock
            short = SamplingParams(max_tokens=2, seed=0, temperature=0.0)
            ref = chosen[i % len(chosen)]
            started = time.monotonic()
            engine.add(Request(request_id=f"{kind}-{i}", token_ids=[3] * PROMPT, sampling=short, adapter=ref))
            clock.ended.wait()
            firsts.append(time.monotonic() - started)
            time.sleep(0.02)
        engine._listener = long
        for i in range(streams - 1):
            engine.abort(f"long-{i}")
        while engine.scheduler.has_work:
            time.sleep(0.01)
        found[kind] = {
            "swaps": engine.scheduler.adapters.num_placed - before,
            "two_tokens_ms": _ms(firsts),
            "mixed_step_ms": _ms(long.mixed),
        }
    return found


def _ms(seconds: list[float]) -> Json:
    ordered = sorted(seconds)
    return {
        "median": round(1000 * statistics.median(ordered), 2),
        "most": round(1000 * ordered[-1], 2),
        "count": len(ordered),
    }


def bench_adapters(config: AppConfig, streams: int, rank: int, on_device: int, tokens: int, turns: int) -> Json:
    model = config.model
    device = torch.device(config.pipeline.device)
    dummy = model.load_format == "dummy"
    checkpoint: Any = (
        DummyCheckpoint(open_config(config), device=device) if dummy else open_checkpoint(resolve_path(model.path))
    )
    shape: ModelConfig = checkpoint.config
    (layers,) = split_layers(shape, 1)
    dtype = getattr(torch, model.dtype)
    decoder = Decoder(shape, layers, checkpoint.tensors(layers.tensor_names(shape)), dtype, device, LONGEST)
    group = DecoderGroup([decoder])
    num_blocks = streams * LONGEST // BLOCK + 1
    plain = Stage(group, num_blocks, BLOCK, streams)
    adapters = StageAdapters(group, AdapterArgs(on_device, rank))
    roomy = Stage(group, num_blocks, BLOCK, streams, adapters=adapters)
    for stage in (plain, roomy) if device.type == "cuda" else ():
        stage.capture(512, lambda done, total: None)
    steps: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="adapters-") as where:
        refs = [write_adapter(Path(where) / str(i), shape, rank, i, dtype) for i in range(2 * on_device)]
        with opened(plain, streams, num_blocks, 0) as peer, opened(roomy, streams, num_blocks, on_device) as engine:
            started = time.monotonic()
            for ref in refs:
                engine.load_adapter(ref).result(PLACES_S)
            load_s = (time.monotonic() - started) / len(refs)
            kinds: dict[str, tuple[Engine, list[AdapterRef | None]]] = {
                "no room": (peer, [None] * streams),
                "none": (engine, [None] * streams),
                "one": (engine, [refs[0]] * streams),
                "all": (engine, [refs[i % on_device] for i in range(streams)]),
            }
            for turn in range(turns + 1):  # the first loads what is loaded at its first use
                for kind, (on, given) in kinds.items():
                    clock = run_streams(on, given, tokens)
                    if turn:
                        steps.setdefault(kind, []).append(statistics.median(clock.seconds))
            swaps = swap_figures(engine, refs, streams, 3 * on_device)
    base = steps["no room"]
    return {
        "model": model.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": model.dtype,
        "streams": streams,
        "rank": rank,
        "adapters": on_device,
        "slots_gb": round(sum(slots.num_bytes for slots in adapters.slots) / 1e9, 3),
        "load_ms": round(1000 * load_s, 1),
        "steps": [
            {
                "kind": kind,
                "ms": round(1000 * statistics.median(found), 3),
                "of_no_room": round(statistics.median(a / b for a, b in zip(found, base, strict=True)), 4),
                "each": [round(1000 * one, 3) for one in found],
            }
            for kind, found in steps.items()
        ],
        "swaps": swaps,
    }


def open_config(config: AppConfig) -> ModelConfig:
    from cluster.config import read_model

    return read_model(config.model)


def adapters_table(result: Json) -> Table:
    """For people."""
    title = f"{result['model']}, {result['streams']} streams, rank {result['rank']}, on {result['device']}"
    table = Table("a decode step", "ms", "of an engine without room for any", title=title)
    names = {"no room": "no room for adapters", "none": "no stream has one", "one": "one adapter for all"}
    for row in result["steps"]:
        name = names.get(row["kind"], f"{result['adapters']} adapters")
        table.add_row(name, f"{row['ms']:.2f}", f"{row['of_no_room']:.1%}")
    for kind, row in result["swaps"].items():
        most = row["mixed_step_ms"]
        table.add_row(f"a step with a prompt, adapter {kind}", f"{most['median']} (at most {most['most']})", "")
    return table

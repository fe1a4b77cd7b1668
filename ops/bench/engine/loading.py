"""`caravan bench load`: what it costs a stage to read its share of a checkpoint.

A checkpoint of random weights is written once, as Hugging Face stores it (several safetensors files). Then every
stage, in a process of its own and with none of the files in the page cache, reads its share and builds its layers;
beside it a process that does nothing but read the same tensors with safetensors. Bytes are the kernel's
(/proc/self/io), peak memory is the growth of the process's high-water mark (/proc/self/status).
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from model.config import ModelConfig, StageLayers, split_layers

Json = dict[str, Any]
SHARD_BYTES = 500_000_000


def shape_of(gigabytes: float) -> ModelConfig:
    """A model of about this size in bfloat16, with as many layers as it takes."""
    one_layer = ModelConfig(
        dim=2048, n_layers=1, n_heads=16, n_kv_heads=4, head_dim=128, hidden_dim=5632, vocab_size=32_000,
        norm_eps=1e-5, rope_theta=10_000.0, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    layers = math.ceil((gigabytes * 1e9 / 2 - 2 * one_layer.embedding_parameters) / one_layer.layer_parameters)
    return replace(one_layer, n_layers=max(layers, 4))


def write_checkpoint(config: ModelConfig, directory: Path) -> int:
    """As Hugging Face stores a model: config.json, index, shards. Returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from model.weights.dummy import DummyCheckpoint
    from model.weights.hf import INDEX, stored_as

    names = split_layers(config, 1)[0].tensor_names(config)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, total = {}, 0
    for name, tensor in DummyCheckpoint(config).tensors(names):
        if sum(t.nbytes for t in shards[-1].values()) > SHARD_BYTES:
            save_file(shards[-1], directory / f"model-{len(shards):05d}.safetensors")
            shards[-1].clear()
            shards.append({})
        shards[-1][stored_as(name)] = tensor.bfloat16()
        weight_map[stored_as(name)] = f"model-{len(shards):05d}.safetensors"
        total += 2 * tensor.numel()
    save_file(shards[-1], directory / f"model-{len(shards):05d}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    return total


def hf_config(config: ModelConfig) -> Json:
    """config.json of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
    }


def build_stage(path: Path, stage: StageLayers) -> object:
    """What a stage does at its start; returns what it then holds."""
    import torch

    from model.heap import freed_blocks_returned
    from model.llama import Decoder
    from model.weights import open_checkpoint

    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors(stage.tensor_names(checkpoint.config))
    with freed_blocks_returned():
        return Decoder(checkpoint.config, stage, tensors, torch.bfloat16, torch.device("cpu"), 16)


def read_plainly(path: Path, stage: StageLayers) -> object:
    """The same tensors, by safetensors alone."""
    from safetensors import safe_open

    from model.weights.hf import INDEX, read_config, stored_as

    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    held = []
    for name in map(stored_as, stage.tensor_names(read_config(path))):
        with safe_open(path / weight_map[name], framework="pt") as stored:
            held.append(stored.get_tensor(name).clone())
    return held


def measured(work: Callable[[Path, StageLayers], object], path: Path, stage: StageLayers) -> Json:
    """Bytes from the disk, growth of the peak memory, seconds. In a fresh process, with the files out of the cache."""
    import torch

    torch.set_num_threads(1)
    _warm_up()
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, bytes_before, started = _memory("VmRSS"), _read_bytes(), time.perf_counter()
    held = work(path, stage)
    seconds = time.perf_counter() - started
    result = {"read_bytes": _read_bytes() - bytes_before, "peak_bytes": _memory("VmHWM") - before, "seconds": seconds}
    del held
    return result


def _warm_up() -> None:
    """Build a small model: the code that this brings into memory is not what is measured."""
    import tempfile

    config = replace(shape_of(0), dim=64, n_layers=4, vocab_size=64, hidden_dim=64)
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(config, Path(directory))
        for stage in split_layers(config, 2):
            build_stage(Path(directory), stage)
            read_plainly(Path(directory), stage)


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def bench_load(gigabytes: float, stages: int, directory: Path) -> Json:
    """Write the checkpoint into `directory` and measure every stage."""
    config = shape_of(gigabytes)
    with Console().status("writing a checkpoint"):
        total = write_checkpoint(config, directory)
    results = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for stage in track(split_layers(config, stages), "reading"):
            names = stage.tensor_names(config)
            sizes = [2 * math.prod(config.tensor_shape(name)) for name in names]
            row: Json = {"share_bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}
            row["plain"] = pool.apply(measured, (read_plainly, directory, stage))
            row["stage"] = pool.apply(measured, (build_stage, directory, stage))
            results.append(row)
    return {"checkpoint_bytes": total, "stages": results}


def load_table(result: Json) -> Table:
    """For people."""
    table = Table(
        "stage", "share", "read / share", "peak memory / (share + largest tensor)", "seconds", "plain read, seconds",
        title=f"a checkpoint of {result['checkpoint_bytes'] / 1e9:.2f} GB, read by {len(result['stages'])} stages",
    )  # fmt: skip
    for i, row in enumerate(result["stages"]):
        share, stage, plain = row["share_bytes"], row["stage"], row["plain"]
        table.add_row(
            str(i),
            f"{share / 1e9:.3f} GB",
            f"{stage['read_bytes'] / share:.3f}",
            f"{stage['peak_bytes'] / (share + row['largest_tensor_bytes']):.3f}",
            f"{stage['seconds']:.2f}",
            f"{plain['seconds']:.2f}",
        )
    return table

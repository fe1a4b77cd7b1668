"""How much memory each stage needs, and how many tokens its KV cache holds: arithmetic, no device is asked."""

from dataclasses import dataclass

import torch

from cluster.config import EngineConfig, in_8_bits
from cluster.launch import model_len, stage_layers
from model.config import ModelConfig
from model.kv_cache import FLOAT8, KVCache
from model.memory import CONTEXT_BYTES, GRAPH_BYTES

# Memory as the driver says it, of the GPUs that Ray knows by these names.
GPU_BYTES = {
    "T4": 16.1e9, "V100": 16.9e9, "A10G": 24.1e9, "L4": 24.1e9, "A100-40G": 42.9e9, "L40S": 48.3e9, "A100-80G": 85.9e9,
    "A100": 85.9e9, "H100": 85.5e9, "H20": 102.6e9, "RTX-PRO-6000": 102.6e9, "H200": 150.7e9, "B200": 192.3e9,
    "GB200": 198.7e9, "B300": 288.9e9, "GB300": 298.4e9,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StageSize:
    """Of one stage, on each of its devices; the first one has most."""

    weight_bytes: int
    activation_bytes: int  # of the largest step, and what a process keeps beside torch
    kv_bytes_per_token: int

    def kv_tokens(self, device_bytes: float, fraction: float) -> int:
        """Room in the cache of a device with so much memory, of which `fraction` may be used; below 0 if it lacks."""
        return int((fraction * device_bytes - self.weight_bytes - self.activation_bytes) // self.kv_bytes_per_token)

    def device_bytes(self, tokens: int, fraction: float) -> float:
        """Memory of the smallest device whose cache holds `tokens`."""
        return (self.weight_bytes + self.activation_bytes + tokens * self.kv_bytes_per_token) / fraction


def stage_sizes(config: EngineConfig, model: ModelConfig) -> list[StageSize]:
    """Of every stage. Raises `ValueError` for a split that is none."""
    cuda, devices = config.pipeline.device == "cuda", config.pipeline.tensor_parallel
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    kv_dtype = FLOAT8 if config.cache.dtype == "fp8" else dtype
    fp8 = in_8_bits(config.model, model)
    sizes = []
    for part in stage_layers(config, model):
        names = part.tensor_names(model)
        sliced = sum(model.tensor_bytes(name, dtype.itemsize, fp8) for name in names if name.startswith("layers."))
        rest = sum(model.tensor_bytes(name, dtype.itemsize, fp8) for name in names if not name.startswith("layers."))
        layers = part.stop - part.start
        sizes.append(
            StageSize(
                weight_bytes=sliced // devices + rest,
                activation_bytes=_activations(config, model, part.is_last)
                + (CONTEXT_BYTES + GRAPH_BYTES if cuda else 0),
                kv_bytes_per_token=KVCache.bytes_per_block(model, layers, 1, kv_dtype) // devices,
            )
        )
    return sizes


def _activations(config: EngineConfig, model: ModelConfig, samples: bool) -> int:
    """About what the largest step holds at once: hidden states and feed-forward in 16 bits; logits in 32, thrice."""
    scheduler = config.scheduler
    hidden = 2 * scheduler.max_num_batched_tokens * (4 * model.dim + 3 * model.hidden_dim)
    return hidden + (12 * scheduler.max_num_seqs * model.vocab_size if samples else 0)


def smallest_that_fits(config: EngineConfig, model: ModelConfig, device_bytes: float) -> int | None:
    """The least number of stages whose devices hold the model and one sequence; None if no number does."""
    needed = model_len(config, model)
    for stages in range(1, model.n_layers + 1):
        pipeline = config.pipeline.model_copy(update={"stages": stages, "split": "auto"})
        other = config.model_copy(update={"pipeline": pipeline})
        rooms = [size.kv_tokens(device_bytes, config.cache.memory_fraction) for size in stage_sizes(other, model)]
        if min(rooms) >= needed:
            return stages
    return None


def too_small(config: EngineConfig, model: ModelConfig, gpu: str | None) -> str | None:
    """Why GPUs of this kind cannot hold the model as it is cut, and what would fit; None if they can.

    Without a kind: if no GPU can that there is.
    """
    known = gpu if gpu in GPU_BYTES else max(GPU_BYTES, key=lambda name: GPU_BYTES[name])
    size, fraction, least = GPU_BYTES[known], config.cache.memory_fraction, model_len(config, model)
    sizes = stage_sizes(config, model)
    worst = max(sizes, key=lambda stage: stage.device_bytes(least, fraction))
    if worst.device_bytes(least, fraction) <= size:
        return None
    return (
        f"pipeline.stages: {len(sizes)}: a stage needs {worst.device_bytes(least, fraction) / 1e9:.0f} GB of its GPU "
        f"({worst.weight_bytes / 1e9:.1f} for weights, {worst.activation_bytes / 1e9:.1f} beside them, "
        f"{least * worst.kv_bytes_per_token / 1e9:.1f} for one sequence of {least} tokens, in {fraction:g} of it); "
        f"{'an' if known[0] in 'AHL' else 'a'} {known}{'' if gpu in GPU_BYTES else ', the largest there is,'} has "
        f"{size / 1e9:.0f}. What fits: {_what_fits(config, model, size)}"
    )


def _what_fits(config: EngineConfig, model: ModelConfig, size: float) -> str:
    ways = []
    for quantization in dict.fromkeys((config.model.quantization, "fp8")):
        if quantization == "fp8" and model.int4 is not None:
            continue
        changed = config.model.model_copy(update={"quantization": quantization})
        stages = smallest_that_fits(config.model_copy(update={"model": changed}), model, size)
        if stages is not None:
            how = " with model.quantization: fp8" if quantization != config.model.quantization else ""
            ways.append(f"pipeline.stages: {stages}{how}")
    return " or ".join(ways) or "nothing; lower model.max_model_len, or take larger GPUs"

"""What a device can do at best, measured, and the least time that a stage needs on it: the floor.

The floor of a step is the longer of two times: reading the stage's weights once, with the keys and values that the step
attends to, at the rate of a large copy; and its multiplications at the rate of a large product. (The roofline model:
Williams, Waterman, Patterson, CACM 52(4), 2009.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.config import ModelConfig, StageLayers
from model.kernels import Activations, kernels_for
from model.kv_cache import KVCache
from model.layers import compute_dtype, make_linear

MEASURED_S = 0.3  # each rate is looked at for this long
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far more than any cache holds
PRODUCT = {"cuda": (8192, 8192, 8192), "cpu": (512, 2048, 2048)}  # tokens, in, out


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one device, while its neighbours are as busy as it is."""

    bytes_per_s: float  # of a large copy: bytes read and bytes written
    flops: float  # multiplications and additions per second of a large product in the layers' type


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a step asks of one stage, whatever computes it."""

    weight_bytes: int  # read once by every step; an embedding lookup reads next to nothing
    flops_per_token: float  # in the layers: two for each weight
    flops_per_sample: float  # in the head
    kv_bytes_per_token: int  # read for each token of context

    @classmethod
    def of(
        cls, config: ModelConfig, part: StageLayers, dtype: torch.dtype, fp8: bool, kv_dtype: torch.dtype | None = None
    ) -> "StageWork":
        """Of the layers `part`, weights in `dtype`, 8 bits or the config's 4 (not the head), and keys in `kv_dtype`."""
        layers = part.stop - part.start
        weights = layers * config.layer_parameters
        head = config.embedding_parameters if part.is_last else 0
        return cls(
            weight_bytes=layers * config.layer_bytes(1 if fp8 else dtype.itemsize) + head * dtype.itemsize,
            flops_per_token=2.0 * weights,
            flops_per_sample=2.0 * head,
            kv_bytes_per_token=KVCache.bytes_per_block(config, layers, 1, kv_dtype or dtype),
        )

    def floor_s(self, rates: Rates, tokens: float, samples: float, context_tokens: float = 0.0) -> float:
        """Seconds of a step that computes `tokens`, samples `samples` and attends to `context_tokens` in all."""
        reading = (self.weight_bytes + context_tokens * self.kv_bytes_per_token) / rates.bytes_per_s
        return max(reading, (tokens * self.flops_per_token + samples * self.flops_per_sample) / rates.flops)


def measure(dtype: torch.dtype, device: torch.device, fp8: bool) -> Rates:
    """The rates of `device` with linear layers as a stage would make them."""
    rates = Rates(_copy_rate(device), _product_rate(dtype, device, fp8))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # whoever asks wants the memory next
    return rates


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _product_rate(dtype: torch.dtype, device: torch.device, fp8: bool) -> float:
    tokens, width_in, width_out = PRODUCT[device.type]
    layer = make_linear(torch.randn(width_out, width_in, device=device, dtype=dtype), dtype, device, fp8)
    x: Activations = torch.randn(tokens, width_in, device=device).to(compute_dtype(dtype, device))
    if fp8:
        assert isinstance(x, torch.Tensor)
        x = kernels_for(device).quantize_rows(x)
    return 2.0 * tokens * width_in * width_out / _seconds(lambda: layer(x), device)


@torch.inference_mode()
def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Mean time of one call, after some that nobody counts."""

    def timed(count: int) -> float:
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            work()
        _synchronize(device)
        return (time.perf_counter() - started) / count

    timed(2)
    return timed(max(3, round(MEASURED_S / timed(1))))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

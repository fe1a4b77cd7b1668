"""What a device can do at best, measured, and the least time that a stage needs on it: the floor.

The floor of a step is the longer of two times: reading the stage's weights once, with the keys and values that the step
attends to, at the rate of a large copy; and its multiplications at the rate of a large product. (The roofline model:
Williams, Waterman, Patterson, CACM 52(4), 2009.)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.config import ModelConfig, StageLayers, product_of
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
    flops: float  # multiplications and additions per second of a large product in the model's type
    float8_flops: float | None = None  # the same in 8 bits, for layers that have products so


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a step asks of one stage, whatever computes it."""

    weight_bytes: int  # read once by every step; an embedding lookup reads next to nothing
    flops_per_token: float  # in the layers: two for each weight that is not in 8 bits
    float8_flops_per_token: float  # of those in 8 bits
    flops_per_sample: float  # in the head
    head_share: float  # of the weights' bytes
    kv_bytes_per_token: int  # read for each token of context

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        part: StageLayers,
        dtype: torch.dtype,
        fp8: frozenset[str] = frozenset(),
        kv_dtype: torch.dtype | None = None,
    ) -> "StageWork":
        """Of the layers `part`: weights in 8 bits where `fp8` says so, in `dtype` or the config's 4 bits elsewhere, the
        head in `dtype`, keys in `kv_dtype`.
        """
        layers = part.stop - part.start
        names = [name for name in part.tensor_names(config) if name.startswith("layers.")]
        in_8_bits = sum(math.prod(config.tensor_shape(name)) for name in names if product_of(name) in fp8)
        head = config.embedding_parameters if part.is_last else 0
        reading = sum(config.tensor_bytes(name, dtype.itemsize, fp8) for name in names)
        return cls(
            weight_bytes=reading + head * dtype.itemsize,
            flops_per_token=2.0 * (layers * config.layer_parameters - in_8_bits),
            float8_flops_per_token=2.0 * in_8_bits,
            flops_per_sample=2.0 * head,
            head_share=head * dtype.itemsize / (reading + head * dtype.itemsize),
            kv_bytes_per_token=KVCache.bytes_per_block(config, layers, 1, kv_dtype or dtype),
        )

    def floor_s(self, rates: Rates, tokens: float, samples: float, context_tokens: float = 0.0) -> float:
        """Seconds of a step that computes `tokens`, samples `samples` and attends to `context_tokens` in all."""
        reading = (self.weight_bytes + context_tokens * self.kv_bytes_per_token) / rates.bytes_per_s
        multiplying = (tokens * self.flops_per_token + samples * self.flops_per_sample) / rates.flops
        if self.float8_flops_per_token:
            assert rates.float8_flops is not None, "rates measured without 8 bits"
            multiplying += tokens * self.float8_flops_per_token / rates.float8_flops
        return max(reading, multiplying)


def measure(dtype: torch.dtype, device: torch.device, fp8: bool) -> Rates:
    """The rates of `device` with linear layers as a stage would make them, with `fp8` those in 8 bits too."""
    in_8_bits = _product_rate(dtype, device, fp8=True) if fp8 else None
    rates = Rates(_copy_rate(device), _product_rate(dtype, device, fp8=False), in_8_bits)
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

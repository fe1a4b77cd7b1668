"""The linear layer in its forms, and the table of the rotary embedding.

Legend: T tokens, D head dim.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch.nn.functional import linear, pad

from model.config import ModelConfig
from model.float8 import quantize_weight
from model.kernels import Activations, Int4Weight, Kernels, Quantized, kernels_for
from model.packing import unpacked

TORCH_INT4_GROUPS = (32, 64, 128, 256)  # sizes that torch's product in 4 bits knows
PACKED_FOR_ROWS = 8  # the batch that oneDNN lays weights out for; others work as well


class Linear(Protocol):
    """y = x W^T for x [T, in], W [out, in]; also of what a layer has before it, which some forms do at once."""

    num_parameters: int

    def __call__(self, x: Activations) -> torch.Tensor: ...

    def after_norm(
        self, kernels: Kernels, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the norm of x + residual, and the sum; see `Kernels.add_rms_norm`."""
        ...

    def after_gate(self, kernels: Kernels, gate_up: torch.Tensor) -> torch.Tensor:
        """Of silu(gate) * up; see `Kernels.silu_and_mul`."""
        ...


class Additions(Protocol):
    """What the adapters of one step add to the products of its layers."""

    def on(self, linear: Linear, layer: int, product: str) -> Linear:
        """A product of the stage's layer number `layer`, with what is added to it."""
        ...


class StepByStep:
    """What comes before a linear layer as an operation of its own."""

    takes_8_bits = False

    def __call__(self, x: Activations) -> torch.Tensor:
        raise NotImplementedError

    def after_norm(
        self, kernels: Kernels, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = kernels.add_rms_norm(x, residual, norm, eps, self.takes_8_bits)
        return self(normed), total

    def after_gate(self, kernels: Kernels, gate_up: torch.Tensor) -> torch.Tensor:
        return self(kernels.silu_and_mul(gate_up, self.takes_8_bits))


class DenseLinear(StepByStep):
    """The plain form: what every other form is compared with."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.num_parameters = weight.numel() + (bias.numel() if bias is not None else 0)

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return linear(x, self.weight, self.bias)


class CudaLinear:
    """The same by the fastest kernel for each number of rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._kernels = kernels_for(weight.device)
        self._weight = weight.contiguous()
        self._bias = bias
        self.num_parameters = weight.numel() + (bias.numel() if bias is not None else 0)

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return self._biased(self._kernels.linear(x, self._weight))

    def after_norm(
        self, kernels: Kernels, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        product, total = kernels.linear_after_norm(x, residual, norm, eps, self._weight)
        return self._biased(product), total

    def after_gate(self, kernels: Kernels, gate_up: torch.Tensor) -> torch.Tensor:
        return self._biased(kernels.linear_after_gate(gate_up, self._weight))

    def _biased(self, product: torch.Tensor) -> torch.Tensor:
        return product if self._bias is None else product + self._bias


class Float8Linear(StepByStep):
    """Weights in float8, one scale per output row; inputs in float8 too, one scale per token; results in `compute`."""

    takes_8_bits = True

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, compute: torch.dtype = torch.bfloat16
    ) -> None:
        self._kernels = kernels_for(weight.device)
        self._weight = quantize_weight(weight)
        self._bias, self._compute = bias, compute
        self.num_parameters = weight.numel() + (bias.numel() if bias is not None else 0)

    def __call__(self, x: Activations) -> torch.Tensor:
        quantized = x if isinstance(x, Quantized) else self._kernels.quantize_rows(x)
        product = self._kernels.float8_linear(quantized, self._weight).to(self._compute)  # bfloat16 is all it gives
        return product if self._bias is None else product + self._bias


class Int4Linear(StepByStep):
    """Weights in 4 bits, as the checkpoint has them; inputs and sums are not.

    words [out, ...], scales and zeros [out, G]: see `Int4Weight`. The product may be several that read the same input,
    of `rows` outputs each; `orders` [products, in] says in which order each has its inputs. x comes in `compute`.
    """

    def __init__(
        self,
        words: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        rows: list[int],
        inputs: int,
        compute: torch.dtype,
        orders: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self._bias = bias
        self.num_parameters = len(words) * inputs + (bias.numel() if bias is not None else 0)
        if orders is None or bool((orders == orders[0]).all()):  # usually: the order is that of the inputs' sizes
            rows = [len(words)]
        parts = zip(*(torch.split(tensor, rows) for tensor in (words, scales, zeros)), strict=True)
        weights = [Int4Weight(w, s.t().contiguous(), z.t().contiguous()) for w, s, z in parts]
        self._products = [int4_product(weight, inputs, compute) for weight in weights]
        self._orders = [None] * len(rows) if orders is None else list(orders[: len(rows)])

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        products = [
            product(x if order is None else x.index_select(1, order))
            for product, order in zip(self._products, self._orders, strict=True)
        ]
        product = products[0] if len(products) == 1 else torch.cat(products, 1)
        return product if self._bias is None else product + self._bias


class PaddedLinear(StepByStep):
    """A product with all its `inputs` of which only some are here, from `start` on: the others count as zeros."""

    def __init__(self, product: Linear, start: int, inputs: int) -> None:
        self._product, self._start, self._inputs = product, start, inputs
        self.num_parameters = product.num_parameters

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return self._product(pad(x, (self._start, self._inputs - self._start - x.shape[1])))


class PackedFloat16Linear(StepByStep):
    """Weights in float16, packed for FBGEMM; activations and sums stay float32.

    A decode step on a CPU reads every weight once, so half the bytes is twice the speed; and FBGEMM packs the weights
    once where a BLAS packs them at every call. Weights are rounded to 11 bits, nothing else is.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.num_parameters = weight.numel() + (bias.numel() if bias is not None else 0)
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)

    def __call__(self, x: Activations) -> torch.Tensor:
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y


class PackedBfloat16Linear(StepByStep):
    """Weights and activations in bfloat16, the weights laid out once for oneDNN's kernels (AMX, AVX512-BF16)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.num_parameters = weight.numel() + (bias.numel() if bias is not None else 0)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), PACKED_FOR_ROWS)
        self._bias = bias

    @staticmethod
    def available() -> bool:
        """Whether this processor multiplies bfloat16 by itself."""
        here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return bool(here and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def __call__(self, x: Activations) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def int4_product(weight: Int4Weight, inputs: int, compute: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest product with `weight`, of x [T, inputs] in `compute`; see `Kernels.int4_linear`."""
    groups, out = weight.scales.shape
    size = inputs // groups
    if weight.words.device.type == "cpu" and compute == torch.bfloat16 and size in TORCH_INT4_GROUPS and out % 16 == 0:
        laid_out = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked(weight.words)[:, :inputs].int(), 1)
        scales = weight.scales.float()  # torch computes (q - 8) * scale + shift
        levels = torch.stack((scales, (8 - weight.zeros) * scales), -1).bfloat16()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, laid_out, size, levels)
    return partial(kernels_for(weight.words.device).int4_linear, weight=weight)


def make_linear(
    weight: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    fp8: bool = False,
    bias: torch.Tensor | None = None,
) -> Linear:
    """The fastest form for this dtype and device that computes the same as `DenseLinear`, up to rounding."""
    compute = compute_dtype(dtype, device)
    bias = bias.to(device, compute) if bias is not None else None
    if fp8:
        return Float8Linear(weight.to(device, dtype), bias, compute)
    if device.type == "cpu" and compute == torch.bfloat16:
        return PackedBfloat16Linear(weight, bias)
    if device.type == "cpu" and dtype != torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines:
        return PackedFloat16Linear(weight, bias)
    return (CudaLinear if device.type == "cuda" else DenseLinear)(weight.to(device, compute), bias)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type of activations and KV: on a CPU a 16-bit type that it does not multiply by itself is storage only."""
    if device.type != "cpu" or (dtype == torch.bfloat16 and PackedBfloat16Linear.available()):
        return dtype
    return torch.float32


def rotary_table(length: int, config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Cosine and sine of position * frequency, [length, D / 2, 2] float32 (arXiv 2104.09864, eq. 15)."""
    frequencies = rotary_frequencies(length, config, device)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotary_frequencies(length: int, config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Frequency of each pair of dimensions for contexts of up to `length` tokens, [D / 2] float32; see `RopeScaling`.

    theta^(-2j / D) without scaling.
    """
    theta, d, scaling = config.rope_theta, config.head_dim, config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and length > scaling.original_max_position_embeddings:
        stretched = scaling.factor * length / scaling.original_max_position_embeddings - (scaling.factor - 1)
        theta *= stretched ** (d / (d - 2))
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2, device=device).float() / d)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "divisors":
        return frequencies / torch.tensor(scaling.divisors, dtype=torch.float32, device=device)
    # llama3: turns that a frequency makes within the original context decide how much of it is kept.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor

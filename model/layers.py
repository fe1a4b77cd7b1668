"""The linear layer in its forms, and the table of the rotary embedding.

Legend: T tokens, D head dim.
"""

from typing import Protocol

import torch
from torch.nn.functional import linear

from model.kernels import Activations, Quantized, kernels_for


class Linear(Protocol):
    """y = x W^T for x [T, in], W [out, in]."""

    num_parameters: int

    def __call__(self, x: Activations) -> torch.Tensor: ...


class DenseLinear:
    """The plain form: what every other form is compared with."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.num_parameters = weight.numel()

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return linear(x, self.weight)


class Float8Linear:
    """Weights in float8, one scale per output row; inputs in float8 too, one scale per token."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._kernels = kernels_for(weight.device)
        self._weight = self._kernels.quantize_rows(weight.contiguous())
        self.num_parameters = weight.numel()

    def __call__(self, x: Activations) -> torch.Tensor:
        quantized = x if isinstance(x, Quantized) else self._kernels.quantize_rows(x)
        return self._kernels.float8_linear(quantized, self._weight)


class PackedFloat16Linear:
    """Weights in float16, packed for FBGEMM; activations and sums stay float32.

    A decode step on a CPU reads every weight once, so half the bytes is twice the speed; and FBGEMM packs the weights
    once where a BLAS packs them at every call. Weights are rounded to 11 bits, nothing else is.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_parameters = weight.numel()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: Activations) -> torch.Tensor:
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y


def make_linear(weight: torch.Tensor, dtype: torch.dtype, device: torch.device, fp8: bool = False) -> Linear:
    """The fastest form for this dtype and device that computes the same as `DenseLinear`, up to rounding."""
    if fp8:
        return Float8Linear(weight.to(device, dtype))
    if device.type == "cpu" and dtype == torch.float16 and "fbgemm" in torch.backends.quantized.supported_engines:
        return PackedFloat16Linear(weight)
    return DenseLinear(weight.to(device, compute_dtype(dtype, device)))


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type of activations and KV: on a CPU float16 is storage only, arithmetic is float32."""
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Cosine and sine of position * theta^(-2j / D), [length, D / 2, 2] float32 (arXiv 2104.09864, eq. 15)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), -1)

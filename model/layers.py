"""The linear layer in its forms, and the table of the rotary embedding.

Legend: T tokens, D head dim.
"""

from typing import Protocol

import torch
from torch.nn.functional import linear


class Linear(Protocol):
    """y = x W^T for x [T, in], W [out, in]."""

    num_parameters: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class DenseLinear:
    """The plain form: what every other form is compared with."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.num_parameters = weight.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


class Float8Linear:
    """Weights in float8 (e4m3), one scale per output row; inputs are quantised on the way, one scale per token."""

    def __init__(self, weight: torch.Tensor) -> None:
        from model.kernels.fused import quantize_rows

        self.num_parameters = weight.numel()
        quantized, scales = quantize_rows(weight.contiguous())
        self._weight, self._scales = quantized.t(), scales.t()  # [in, out] column-major, [1, out]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from model.kernels.fused import quantize_rows

        quantized, scales = quantize_rows(x)
        return torch._scaled_mm(
            quantized, self._weight, scales, self._scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )


class PackedFloat16Linear:
    """Weights in float16, packed for FBGEMM; activations and sums stay float32.

    A decode step on a CPU reads every weight once, so half the bytes is twice the speed; and FBGEMM packs the weights
    once where a BLAS packs them at every call. Weights are rounded to 11 bits, nothing else is.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_parameters = weight.numel()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
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

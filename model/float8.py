"""A weight in 8 bits, made at load."""

import torch

from model.kernels import Quantized
from model.kernels.reference import ReferenceKernels

CANDIDATES = 8  # scales that are tried for each row
PART = 2**24  # elements looked at together: what is made on the way takes some 20 bytes for each


def quantize_weight(weight: torch.Tensor) -> Quantized:
    """weight [out, in] in e4m3 with a scale for each row: of several that fit, the one with the least squared error.

    Between two powers of two e4m3 has 8 equal steps. What falls right above a power of two is rounded by up to 1/16 of
    itself, right below by 1/32; the scale decides which elements these are. Twice the scale decides the same again.
    """
    parts = [_quantized(part.float()) for part in torch.split(weight, max(1, PART // weight.shape[1]))]
    values = torch.cat([_bytes(part.values) for part in parts]).view(torch.float8_e4m3fn)
    return Quantized(values, torch.cat([part.scales for part in parts]))


def _quantized(weight: torch.Tensor) -> Quantized:
    best = ReferenceKernels().quantize_rows(weight)  # with the least scales that fit
    least, error = best.scales, _squared_error(weight, best)
    for i in range(1, CANDIDATES):
        scales = least * 2 ** (i / CANDIDATES)
        tried = Quantized((weight / scales).to(torch.float8_e4m3fn), scales)
        error_now = _squared_error(weight, tried)
        better = error_now < error
        values = torch.where(better, _bytes(tried.values), _bytes(best.values))
        best = Quantized(values.view(torch.float8_e4m3fn), torch.where(better, scales, best.scales))
        error = torch.where(better, error_now, error)
    return best


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """torch can do little with float8 values, but all with their bytes."""
    return values.view(torch.uint8)


def _squared_error(weight: torch.Tensor, found: Quantized) -> torch.Tensor:
    """Of each row [out, 1]."""
    return (found.values.float() * found.scales - weight).square_().sum(1, keepdim=True)

"""Linear layers for a few rows, where all that counts is to read the weights at full speed.

On Hopper those of 2 to 32 rows are mostly cut otherwise: see `stream_k`.

Legend: T tokens, n columns of the result, k elements summed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.kernels.early import await_inputs, early, let_next_start


class Tiling(NamedTuple):
    """How a product is cut."""

    columns: int  # of the result, per program
    depth: int  # elements of a row per turn
    warps: int
    stages: int  # turns whose weights are on their way at once


def bfloat16_tiling(rows: int, n: int, k: int) -> Tiling | None:
    """How to cut a product in 16 bits where our kernels beat the library; measured on an H200."""
    if rows > 16 or k % 64:
        return None
    if rows == 1:
        return Tiling(8, 1024, 4, 3) if n <= 8192 else Tiling(16, 256, 4, 5) if n < 24_000 else Tiling(32, 256, 4, 5)
    return Tiling(32, 512, 4, 4) if n <= 8192 else Tiling(32, 256, 4, 4) if n < 24_000 else Tiling(64, 256, 4, 3)


def float8_tiling(rows: int, n: int, k: int) -> Tiling | None:
    """The same in 8 bits."""
    if rows > 64 or k % 64:
        return None
    if rows == 1:
        return Tiling(8, 512, 4, 4) if n > 16_384 else Tiling(16, 512, 4, 4)
    if rows <= 16:
        return Tiling(64, 256, 4, 4) if n > 16_384 else Tiling(32, 256, 4, 4)
    if rows <= 32:
        return Tiling(64, 256, 8, 4) if n > 16_384 else None
    return Tiling(128, 128, 4, 4) if n > 16_384 else Tiling(128, 256, 4, 4) if n > 8192 else Tiling(64, 256, 4, 5)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, tiling: Tiling,
    x_scales: torch.Tensor | None = None, weight_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [T, k] times weight [n, k] transposed -> [T, n]; float8 inputs come with their scales and give bfloat16."""
    (rows, k), n = x.shape, len(weight)
    scaled = x_scales is not None
    out = torch.empty(rows, n, dtype=torch.bfloat16 if scaled else x.dtype, device=x.device)
    scales = (x, weight) if x_scales is None or weight_scales is None else (x_scales, weight_scales)
    if rows == 1:
        _vector(x, weight, out, tiling, scales=scales, scaled=scaled)
        return out
    _skinny_linear[(triton.cdiv(n, tiling.columns),)](
        x, weight, *scales, out, rows, n, k, scaled, max(16, triton.next_power_of_2(rows)),
        tiling.columns, tiling.depth, num_warps=tiling.warps, num_stages=tiling.stages, **early(),
    )  # fmt: skip
    return out


def vector_after_norm(
    x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float, weight: torch.Tensor, tiling: Tiling
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Kernels.linear_after_norm` of one row."""
    out = torch.empty(1, len(weight), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x)  # not in place: all programs read the residual
    _vector(x, weight, out, tiling, second=residual, norm=norm, eps=eps, total=total)
    return out, total


def vector_after_gate(gate_up: torch.Tensor, weight: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """`Kernels.linear_after_gate` of one row."""
    out = torch.empty(1, len(weight), dtype=gate_up.dtype, device=gate_up.device)
    _vector(gate_up, weight, out, tiling, second=gate_up[:, gate_up.shape[1] // 2 :], gated=True)
    return out


def _vector(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, tiling: Tiling, *,
    second: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 0.0,
    total: torch.Tensor | None = None, gated: bool = False,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None, scaled: bool = False,
) -> None:  # fmt: skip
    """`second` is what is added to x before the norm, or with `gated` what the activated x is multiplied with."""
    n, k = weight.shape
    x_scales, weight_scales = scales or (x, x)
    _vector_linear[(triton.cdiv(n, tiling.columns),)](
        x, x if second is None else second, x if norm is None else norm, x if total is None else total,
        weight, x_scales, weight_scales, out, eps, n, k,
        second is not None and not gated, norm is not None, gated, scaled,
        tiling.columns, tiling.depth, tiling.stages, num_warps=tiling.warps, **early(),
    )  # fmt: skip


@triton.jit
def _vector_linear(
    x, second, norm, total, weight, x_scales, weight_scales, out, eps, n, k,
    added: tl.constexpr, normed: tl.constexpr, gated: tl.constexpr, scaled: tl.constexpr,
    columns: tl.constexpr, depth: tl.constexpr, stages: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One row: no matrix unit, which would multiply 15 empty rows more.

    What comes before the product is done on the way: an operation of its own is a kernel that reads no weights.
    """
    if not scaled:
        let_next_start(early)
    await_inputs(early)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    i = tl.arange(0, depth)
    to_w = weight + column[:, None].to(tl.int64) * k + i[None, :]
    acc = tl.zeros([columns, depth], tl.float32)
    squares = tl.zeros([depth], tl.float32)
    for start in tl.range(0, k, depth, num_stages=stages):
        left = i < k - start
        a = tl.load(x + start + i, mask=left, other=0.0)
        b = tl.load(to_w + start, mask=(column < n)[:, None] & left[None, :], other=0.0)
        if added:
            before = tl.load(second + start + i, mask=left, other=0.0)
            a = (a.to(tl.float32) + before.to(tl.float32)).to(a.dtype)
            tl.store(total + start + i, a, mask=left & (tl.program_id(0) == 0))
        if gated:
            up = tl.load(second + start + i, mask=left, other=0.0)
            exact = a.to(tl.float32)
            a = (exact / (1.0 + tl.exp(-exact))).to(a.dtype) * up
        value = a.to(tl.float32)
        if normed:
            squares += value * value
            value *= tl.load(norm + start + i, mask=left, other=0.0).to(tl.float32)
        acc += value[None, :] * b.to(tl.float32)
    if scaled:
        let_next_start(early)
    result = tl.sum(acc, 1)
    if normed:
        result /= tl.sqrt(tl.sum(squares, 0) / k + eps)
    if scaled:
        result *= tl.load(x_scales) * tl.load(weight_scales + column, mask=column < n, other=0.0)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < n)


@triton.jit(do_not_specialize=["rows"])
def _skinny_linear(
    x, weight, x_scales, weight_scales, out, rows, n, k,
    scaled: tl.constexpr, block: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    # In 8 bits the next product's programs would take the places of this one's unevenly: they come at its end.
    if not scaled:
        let_next_start(early)
    await_inputs(early)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row = tl.arange(0, block)
    i = tl.arange(0, depth)
    to_x = x + row[:, None] * k + i[None, :]
    to_w = weight + column[:, None].to(tl.int64) * k + i[None, :]
    acc = tl.zeros([block, columns], tl.float32)
    for start in range(0, k, depth):
        left = i[None, :] < k - start
        a = tl.load(to_x + start, mask=(row < rows)[:, None] & left, other=0.0)
        b = tl.load(to_w + start, mask=(column < n)[:, None] & left, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    if scaled:
        let_next_start(early)
        scale = tl.load(x_scales + row, mask=row < rows, other=0.0)[:, None]
        acc *= scale * tl.load(weight_scales + column, mask=column < n, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], acc.to(out.dtype.element_ty), mask=inside)

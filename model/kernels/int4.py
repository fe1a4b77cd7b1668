"""Products with weights in 4 bits: for few rows from the packed weights, for many from a copy in 16 bits.

Legend: T tokens, n columns of the result, k elements summed, G groups. For the order in words see `Int4Weight`.

Four bits under the right exponent are a 16-bit float: 128 + q in bfloat16, 1024 + q in float16, exactly. The sums are
over those; what is too much is taken off once for each group, and the scales come in there too.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.config import INT4_BLOCK
from model.kernels import Int4Weight
from model.kernels.early import await_inputs, early, let_next_start

MAX_ROWS = 64  # with more, the copy in 16 bits pays
PLANE = 32  # neighbouring inputs that one shift unpacks
WORDS = INT4_BLOCK // 8


class Int4Tiling(NamedTuple):
    """How a product is cut."""

    columns: int  # of the result, per program
    warps: int
    stages: int  # turns whose weights are on their way at once
    blocks: int = 1  # of 128 inputs, per turn


def int4_tiling(rows: int, n: int) -> Int4Tiling | None:
    """How to cut a product where the packed weights beat their copy in 16 bits."""
    if rows > MAX_ROWS:
        return None
    if rows == 1:
        return Int4Tiling(8, 2, 3, 4) if n > 8192 else Int4Tiling(4, 4, 4, 4)
    return Int4Tiling(64, 4, 6) if n > 8192 else Int4Tiling(32, 4, 6)


def skinny_int4_linear(x: torch.Tensor, weight: Int4Weight, tiling: Int4Tiling) -> torch.Tensor:
    """See `Kernels.int4_linear`; x in 16 bits."""
    (rows, k), n = x.shape, len(weight.words)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows == 1:
        _int4_vector[(triton.cdiv(n, tiling.columns),)](
            x, *weight, out, n, k, *_groups(weight, k), tiling.columns, tiling.blocks, tiling.stages,
            num_warps=tiling.warps, **early(),
        )  # fmt: skip
        return out
    block = min(64, max(16, triton.next_power_of_2(rows)))
    magic, offset = (0x43004300, 128) if x.dtype == torch.bfloat16 else (0x64006400, 1024)
    _int4_linear[(triton.cdiv(n, tiling.columns), triton.cdiv(rows, block))](
        x, *weight, out, rows, n, k, *_groups(weight, k), magic, offset, block, tiling.columns,
        num_warps=tiling.warps, num_stages=tiling.stages, **early(),
    )  # fmt: skip
    return out


def dequantize(weight: Int4Weight, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights in `dtype`, [n, k]."""
    n = len(weight.words)
    out = torch.empty(n, k, dtype=dtype, device=weight.words.device)
    groups, size, _ = _groups(weight, k)
    grid = (triton.cdiv(n, 64), triton.cdiv(k, INT4_BLOCK))
    _dequantize_int4[grid](*weight, out, n, k, groups, size, 64, num_warps=4)
    return out


def _groups(weight: Int4Weight, k: int) -> tuple[int, int, int]:
    """Number of groups, their size, and the planes in a row that surely belong to the same one."""
    groups = len(weight.scales)
    size = k // groups
    return groups, size, INT4_BLOCK // PLANE if groups == 1 else math.gcd(size, INT4_BLOCK) // PLANE


@triton.jit
def _of_group(values, start, column, n, groups, size):
    """The group of the inputs from `start` on; past the last input there are only zeros to multiply."""
    group = tl.minimum(start // size, groups - 1)
    return tl.load(values + group * n + column, mask=column < n, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _int4_linear(
    x, words, scales, zeros, out, rows, n, k, groups, size, run: tl.constexpr,
    magic: tl.constexpr, offset: tl.constexpr, block: tl.constexpr, columns: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    let_next_start(early)
    await_inputs(early)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row = tl.program_id(1) * block + tl.arange(0, block)
    i = tl.arange(0, 32)
    turns = tl.cdiv(k, 128)
    to_x = x + row[:, None] * k + i[None, :]
    to_w = words + column[:, None].to(tl.int64) * (turns * 16) + tl.arange(0, 16)[None, :]
    acc = tl.zeros([block, columns], tl.float32)
    for turn in range(turns):
        w = tl.load(to_w + turn * 16, mask=(column < n)[:, None], other=0)
        part = tl.zeros([block, columns], tl.float32)
        seen = tl.zeros([block, 32], tl.float32)
        for j in tl.static_range(4):
            start = turn * 128 + 32 * j
            a = tl.load(to_x + start, mask=(row < rows)[:, None] & (i < k - start)[None, :], other=0.0)
            pairs = ((w >> (4 * j)) & 0x000F000F) | magic
            first = pairs.to(tl.int16).to(a.dtype, bitcast=True)
            second = (pairs >> 16).to(tl.int16).to(a.dtype, bitcast=True)
            part = tl.dot(a, tl.trans(tl.interleave(first, second)), part)
            seen += a.to(tl.float32)
            if (j + 1) % run == 0:
                zero = _of_group(zeros, start, column, n, groups, size) + offset
                exact = part - zero[None, :] * tl.sum(seen, 1)[:, None]
                acc += exact * _of_group(scales, start, column, n, groups, size)[None, :]
                part = tl.zeros([block, columns], tl.float32)
                seen = tl.zeros([block, 32], tl.float32)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _int4_vector(
    x, words, scales, zeros, out, n, k, groups, size, run: tl.constexpr,
    columns: tl.constexpr, blocks: tl.constexpr, stages: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One row: no matrix unit, which would multiply 15 empty rows more. Four bits become 128 + q in float32."""
    let_next_start(early)
    await_inputs(early)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    block = tl.arange(0, blocks)
    i = tl.arange(0, 16)
    turns = tl.cdiv(k, 128)
    to_w = words + (column[:, None].to(tl.int64) * turns + block[None, :])[:, :, None] * 16 + i[None, None, :]
    acc = tl.zeros([columns, blocks, 16], tl.float32)
    for turn in tl.range(0, turns, blocks, num_stages=stages):
        left = block < turns - turn
        w = tl.load(to_w + turn * 16, mask=((column < n)[:, None] & left[None, :])[:, :, None], other=0)
        part = tl.zeros([columns, blocks, 16], tl.float32)
        seen = tl.zeros([blocks, 16], tl.float32)
        for j in tl.static_range(4):
            start = (turn + block) * 128 + 32 * j
            for h in tl.static_range(2):
                at = start[:, None] + 2 * i[None, :] + h
                a = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
                bits = w << 16 - 4 * j if h == 0 else w >> 4 * j
                part += a[None, :, :] * ((bits & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)
                seen += a
            if (j + 1) % run == 0:
                group = tl.minimum(start // size, groups - 1)[None, :] * n + column[:, None]
                inside = (column < n)[:, None] & left[None, :]
                zero = tl.load(zeros + group, mask=inside, other=0).to(tl.float32)[:, :, None] + 128
                scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)[:, :, None]
                acc += (part - zero * seen[None, :, :]) * scale
                part = tl.zeros([columns, blocks, 16], tl.float32)
                seen = tl.zeros([blocks, 16], tl.float32)
    result = tl.sum(tl.sum(acc, 2), 1)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < n)


@triton.jit
def _dequantize_int4(words, scales, zeros, out, n, k, groups, size, columns: tl.constexpr):
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    turn = tl.program_id(1)
    row = column[:, None].to(tl.int64)
    i = tl.arange(0, 32)
    to_w = words + row * (tl.cdiv(k, 128) * 16) + turn * 16 + tl.arange(0, 16)[None, :]
    w = tl.load(to_w, mask=(column < n)[:, None], other=0)
    for j in tl.static_range(4):
        start = turn * 128 + 32 * j
        pairs = (w >> (4 * j)) & 0x000F000F
        q = tl.interleave(pairs & 15, pairs >> 16).to(tl.float32)
        zero = _of_group(zeros, start, column, n, groups, size)[:, None]
        exact = (q - zero) * _of_group(scales, start, column, n, groups, size)[:, None]
        inside = (column < n)[:, None] & (i < k - start)[None, :]
        tl.store(out + row * k + start + i[None, :], exact.to(out.dtype.element_ty), mask=inside)

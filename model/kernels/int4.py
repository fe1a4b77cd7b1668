"""Products with weights in 4 bits: for few rows from the packed weights, for many from a copy in 16 bits.

Legend: T tokens, n columns of the result, k elements summed, G groups. For the order in words see `Int4Weight`.

Four bits under the right exponent are a 16-bit float, 128 + q in bfloat16 and 1024 + q in float16, exactly, and what is
left when the same of the zero is taken off is exact too: two weights for three instructions.
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
PLANES = INT4_BLOCK // PLANE


class Int4Tiling(NamedTuple):
    """How a product is cut."""

    rows: int  # per program
    columns: int  # of the result, per program
    depth: int  # blocks of inputs per turn, each with its own warps
    warps: int
    stages: int  # turns whose weights are on their way at once


def int4_tiling(rows: int) -> Int4Tiling | None:
    """How to cut a product where the packed weights beat their copy in 16 bits."""
    if rows > MAX_ROWS:
        return None
    return Int4Tiling(16 if rows <= 16 else 32, 32, 8, 8, 3)


def skinny_int4_linear(x: torch.Tensor, weight: Int4Weight, tiling: Int4Tiling) -> torch.Tensor:
    """See `Kernels.int4_linear`; x in 16 bits."""
    (rows, k), n = x.shape, len(weight.words)
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    even = k % (tiling.depth * INT4_BLOCK) == 0
    _int4_linear[(triton.cdiv(n, tiling.columns), triton.cdiv(rows, tiling.rows))](
        x, *weight, out, rows, n, k, *_groups(weight, k), even, tiling.rows, tiling.columns, tiling.depth,
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
    return groups, size, PLANES if groups == 1 else math.gcd(size, INT4_BLOCK) // PLANE


@triton.jit
def _of_group(values, start, column, n, groups, size):
    """Scales or zeros of the inputs from `start` on; past the last input it does not matter which."""
    return tl.load(values + tl.minimum(start // size, groups - 1) * n + column)


@triton.jit
def _less_zero(nibbles, zeros, half: tl.constexpr):
    """q - zero for the two q at the ends of both halves of each word, as two floats; `zeros` are two floats already."""
    asm: tl.constexpr = (
        "{.reg .b32 q; lop3.b32 q, $1, 0x000F000F, 0x64006400, 0xEA; sub.f16x2 $0, q, $2;}"
        if half
        else "{.reg .b32 q; lop3.b32 q, $1, 0x000F000F, 0x43004300, 0xEA; sub.bf16x2 $0, q, $2;}"
    )
    return tl.inline_asm_elementwise(asm, "=r,r,r", [nibbles, zeros], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["rows"])
def _int4_linear(
    x, words, scales, zeros, out, rows, n, k, groups, size, run: tl.constexpr, even: tl.constexpr,
    block: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """`depth` blocks of inputs are summed each for itself, by other warps, and added at the end.

    Scales come in after each `run` planes. With `run` 4, a block of one group, they are read one turn ahead.
    """
    let_next_start(early)
    await_inputs(early)
    half: tl.constexpr = x.dtype.element_ty == tl.float16
    magic: tl.constexpr = 0x64006400 if half else 0x43004300
    blocks = tl.cdiv(k, 128)
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row = tl.program_id(1) * block + tl.arange(0, block)
    d = tl.arange(0, depth)
    i = tl.arange(0, 32)
    near = tl.minimum(column, n - 1)[None, :]  # what is past the end is computed like the last, and not stored
    to_x = x + row[None, :, None] * k + i[None, None, :]
    to_w = words + near[:, :, None].to(tl.int64) * (blocks * 16) + tl.arange(0, 16)[None, None, :]
    acc = tl.zeros([depth, block, columns], tl.float32)
    scale = _of_group(scales, d[:, None] * 128, near, n, groups, size)
    zero = _of_group(zeros, d[:, None] * 128, near, n, groups, size)
    for turn in range(0, blocks, depth):
        at = turn + d
        w = tl.load(to_w + ((at if even else tl.minimum(at, blocks - 1)) * 16)[:, None, None])
        if run == 4:
            next_scale = _of_group(scales, (at + depth)[:, None] * 128, near, n, groups, size)
            next_zero = _of_group(zeros, (at + depth)[:, None] * 128, near, n, groups, size)
        part = tl.zeros([depth, block, columns], tl.float32)
        for j in tl.static_range(4):
            start = (at * 128 + 32 * j)[:, None]
            inside = (row < rows)[None, :, None]
            if not even:
                inside = inside & (start + i[None, :] < k)[:, None, :]
            a = tl.load(to_x + start[:, :, None], mask=inside, other=0.0)
            if run < 4 and j % run == 0:
                scale = _of_group(scales, start, near, n, groups, size)
                zero = _of_group(zeros, start, near, n, groups, size)
            pairs = _less_zero(w >> (4 * j), (zero.to(tl.int32) * 0x00010001 + magic)[:, :, None], half)
            first = pairs.to(tl.int16).to(a.dtype, bitcast=True)
            second = (pairs >> 16).to(tl.int16).to(a.dtype, bitcast=True)
            part = tl.dot(a, tl.permute(tl.interleave(first, second), (0, 2, 1)), part)
            if (j + 1) % run == 0:
                acc += part * scale.to(tl.float32)[:, None, :]
                part = tl.zeros([depth, block, columns], tl.float32)
        if run == 4:
            scale, zero = next_scale, next_zero
    whole = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], tl.sum(acc, 0).to(out.dtype.element_ty), mask=whole)


@triton.jit
def _dequantize_int4(words, scales, zeros, out, n, k, groups, size, columns: tl.constexpr):
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    turn = tl.program_id(1)
    near = tl.minimum(column, n - 1)
    i = tl.arange(0, 32)
    w = tl.load(words + near[:, None].to(tl.int64) * (tl.cdiv(k, 128) * 16) + turn * 16 + tl.arange(0, 16)[None, :])
    for j in tl.static_range(4):
        start = turn * 128 + 32 * j
        pairs = (w >> (4 * j)) & 0x000F000F
        q = tl.interleave(pairs & 15, pairs >> 16)
        exact = (q - _of_group(zeros, start, near, n, groups, size)[:, None]).to(tl.float32)
        exact *= _of_group(scales, start, near, n, groups, size)[:, None].to(tl.float32)
        inside = (column < n)[:, None] & (i < k - start)[None, :]
        to_out = out + column[:, None].to(tl.int64) * k + start + i[None, :]
        tl.store(to_out, exact.to(out.dtype.element_ty), mask=inside)

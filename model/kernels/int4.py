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
from torch.nn.functional import pad

from model.config import INT4_BLOCK
from model.kernels import Int4Weight
from model.kernels.device import MAX_TICKETS, has_warp_groups, tickets
from model.kernels.early import early
from model.kernels.int4_product import product_of_groups, product_of_warps

MAX_ROWS = 256  # with more, the copy in 16 bits pays
MAX_SPLITS = 4
PLANE = 32  # neighbouring inputs that one shift unpacks
PLANES = INT4_BLOCK // PLANE


class Int4Tiling(NamedTuple):
    """How a product is cut."""

    rows: int  # per program
    columns: int  # of the result, per program
    depth: int  # blocks of inputs per turn, each with its own warps
    across: int  # warps side by side over the columns
    stages: int  # turns whose words and inputs are on their way at once
    splits: int = 1  # parts of the inputs, each with its own programs
    grouped: bool = False  # by groups of four warps, as only Hopper can


def int4_tiling(rows: int, n: int) -> Int4Tiling | None:
    """How to cut a product where the packed weights beat their copy in 16 bits; measured on an H100."""
    if rows > MAX_ROWS:
        return None
    narrow = n <= 8192
    if rows <= 8:
        return _split(rows, n, 264, Int4Tiling(8, 32, 4, 1, 3) if narrow else Int4Tiling(8, 32, 4, 2, 4))
    if rows <= 16:
        return _split(rows, n, 200, Int4Tiling(16, 64, 4, 2, 3) if narrow else Int4Tiling(16, 64, 2, 4, 4))
    if rows <= 32:
        return _split(rows, n, 200, Int4Tiling(32, 64, 2, 4, 3) if narrow else Int4Tiling(32, 128, 1, 4, 3))
    if not has_warp_groups():
        return _split(rows, n, 200, Int4Tiling(64, 64, 1, 4, 3))
    across = 4 if narrow and (rows > 64 or n > 4096) else 8
    return _split(rows, n, 130 if rows <= 64 else 200, Int4Tiling(64, 128, 1, across, 3, grouped=True))


def _split(rows: int, n: int, enough: int, tiling: Int4Tiling) -> Int4Tiling:
    """In as many parts, a power of 2, as make `enough` programs."""
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(n, tiling.columns)
    return tiling._replace(splits=min(MAX_SPLITS, int(triton.next_power_of_2(triton.cdiv(enough, tiles)))))


def skinny_int4_linear(x: torch.Tensor, weight: Int4Weight, tiling: Int4Tiling) -> torch.Tensor:
    """See `Kernels.int4_linear`; x in 16 bits."""
    (rows, k), n = x.shape, len(weight.words)
    block, columns, depth, across, stages, splits, grouped = tiling
    grid = triton.cdiv(rows, block), triton.cdiv(n, columns), splits
    tiles = grid[0] * grid[1]
    assert splits == 1 or tiles <= MAX_TICKETS
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    sums = tiles, splits, block, columns
    partial = torch.empty(sums, dtype=torch.float32, device=x.device) if splits > 1 else out
    whole = x if k % INT4_BLOCK == 0 else pad(x, (0, -k % INT4_BLOCK))
    tensors = whole, *weight, out, partial, tickets(x.device)
    shape = rows, n, triton.cdiv(k, INT4_BLOCK), *_groups(weight, k), block, columns
    if grouped:
        product_of_groups[grid](*tensors, *shape, across, stages, splits, num_warps=across, **early())
    else:
        product_of_warps[grid](*tensors, *shape, depth, across, stages, splits, num_warps=depth * across, **early())
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

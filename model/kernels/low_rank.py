"""What adapters add to a product, for tokens of several adapters at once: first all A x, then y += B (A x).

Legend: T tokens, N blocks of tokens, M tokens of a block, P parts of the product, R rank.

Tokens of one adapter are taken together, M at a time, so that each of its matrices is read once for all of them. Sums
over the inputs are cut in splits, as many programs as fill the device, and added up by those that need them.
"""

import torch
import triton
import triton.language as tl

from model.kernels import RANKS, AdapterRows, LowRank
from model.kernels.early import await_inputs, early, let_next_start

DEPTH, DEEPER = 512, 1024  # inputs of a split; deeper ones of many inputs, where a block is small
COLUMNS = 128  # outputs of a program


def shrink(x: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
    """See `Kernels.shrink`: [splits, N * M, P, R] float32."""
    k, parts, blocks = x.shape[1], product.parts, rows.blocks.shape[1]
    depth = DEEPER if k > 8192 and rows.most <= 16 else DEPTH
    splits = triton.cdiv(k, depth)
    out = torch.empty(splits, blocks * rows.most, len(parts), product.max_rank, dtype=torch.float32, device=x.device)
    places = [part.a for part in parts]
    _shrink[(blocks, len(parts) * splits, product.max_rank // RANKS)](
        x, product.values, product.ranks, product.widths, rows.order, rows.blocks, out, x.stride(0),
        product.values.stride(0), product.ranks.stride(0), rows.blocks.stride(0), k, parts[0].index, *_three(places),
        len(parts), splits, product.max_rank, rows.most, RANKS, depth, _precision(x), num_warps=4, **early(),
    )  # fmt: skip
    return out


def expand(y: torch.Tensor, shrunk: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
    """See `Kernels.expand`."""
    parts, (splits, _, _, max_rank), blocks = product.parts, shrunk.shape, rows.blocks.shape[1]
    tiles = [triton.cdiv(part.outputs, COLUMNS) for part in parts]
    _expand[(blocks, sum(tiles))](
        y, product.values, product.ranks, product.widths, rows.order, rows.blocks, shrunk, y.stride(0),
        product.values.stride(0), product.ranks.stride(0), rows.blocks.stride(0), parts[0].index,
        *_three([part.b for part in parts]), *_three([part.outputs for part in parts]), *_three(tiles)[:2],
        blocks * rows.most, len(parts), splits, max_rank, rows.most, RANKS, COLUMNS, _precision(y), num_warps=4,
        **early(),
    )  # fmt: skip
    return y


def _three(values: list[int]) -> list[int]:
    """A product has three parts at most."""
    return [*values, 0, 0][:3]


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit(do_not_specialize=["index", "a0", "a1", "a2"])
def _shrink(
    x, values, ranks, widths, order, blocks, out, x_stride, slot_stride, ranks_stride, blocks_stride, k, index,
    a0, a1, a2, parts: tl.constexpr, splits: tl.constexpr, max_rank: tl.constexpr, most: tl.constexpr,
    step: tl.constexpr, depth: tl.constexpr, precision: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    # Nothing of which adapter is where is written by a kernel: it may be read, A too, before the input is there.
    let_next_start(early)
    block, part, first = tl.program_id(0), tl.program_id(1) // splits, tl.program_id(2) * step
    split = tl.program_id(1) % splits
    slot = tl.load(blocks + block).to(tl.int64) - 1
    begin_, count = tl.load(blocks + blocks_stride + block), tl.load(blocks + 2 * blocks_stride + block)
    used = count > 0
    rank = tl.load(ranks + slot * ranks_stride + index + part, mask=used, other=0)
    used = used & (first < rank)
    place = tl.where(part == 0, a0, tl.where(part == 1, a1, a2)).to(tl.int64)
    i, j, row = split * depth + tl.arange(0, depth), first + tl.arange(0, step), tl.arange(0, most)
    width = tl.load(widths + slot, mask=used, other=0)
    a_to = values + slot * slot_stride + width * place + j[:, None] * k + i[None, :]
    a = tl.load(a_to, mask=(j < rank)[:, None] & (i < k)[None, :] & used, other=0.0)
    token = tl.load(order + begin_ + row, mask=(row < count) & used, other=0).to(tl.int64)
    await_inputs(early)
    if used:
        inside = (row < count)[:, None] & (i < k)[None, :]
        b = tl.load(x + token[:, None] * x_stride + i[None, :], mask=inside, other=0.0)
        result = tl.dot(b, tl.trans(a), input_precision=precision)
        at = (split * tl.num_programs(0) + block) * most + row
        tl.store(out + (at[:, None] * parts + part) * max_rank + j[None, :], result)


@triton.jit(do_not_specialize=["index", "b0", "b1", "b2"])
def _expand(
    y, values, ranks, widths, order, blocks, shrunk, y_stride, slot_stride, ranks_stride, blocks_stride, index,
    b0, b1, b2, n0, n1, n2, tiles0, tiles1, rows, parts: tl.constexpr, splits: tl.constexpr,
    max_rank: tl.constexpr, most: tl.constexpr, step: tl.constexpr, columns: tl.constexpr, precision: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    let_next_start(early)
    block, tile = tl.program_id(0), tl.program_id(1)
    part = tl.where(tile < tiles0, 0, tl.where(tile < tiles0 + tiles1, 1, 2))
    tile -= tl.where(part > 0, tiles0, 0) + tl.where(part > 1, tiles1, 0)
    place = tl.where(part == 0, b0, tl.where(part == 1, b1, b2)).to(tl.int64)
    n = tl.where(part == 0, n0, tl.where(part == 1, n1, n2))
    start = tl.where(part > 0, n0, 0) + tl.where(part > 1, n1, 0)
    slot = tl.load(blocks + block).to(tl.int64) - 1
    begin_, count = tl.load(blocks + blocks_stride + block), tl.load(blocks + 2 * blocks_stride + block)
    rank = tl.load(ranks + slot * ranks_stride + index + part, mask=count > 0, other=0)
    used = rank > 0
    width = tl.load(widths + slot, mask=used, other=0)
    column, row, i = tile * columns + tl.arange(0, columns), tl.arange(0, most), tl.arange(0, step)
    b_to = values + slot * slot_stride + width * place + column[None, :]
    b = tl.load(b_to + i[:, None] * n, mask=(i < rank)[:, None] & (column < n)[None, :], other=0.0)
    token = tl.load(order + begin_ + row, mask=(row < count) & used, other=0).to(tl.int64)
    await_inputs(early)
    if used:
        inside = (row < count)[:, None] & (column < n)[None, :]
        to = y + token[:, None] * y_stride + start + column[None, :]
        before = tl.load(to, mask=inside, other=0.0)
        acc = tl.zeros([most, columns], tl.float32)
        for first in range(0, rank, step):
            at = ((block * most + row)[:, None] * parts + part) * max_rank + first + i[None, :]
            u = tl.zeros([most, step], tl.float32)
            for split in tl.static_range(splits):
                u += tl.load(shrunk + split * rows * parts * max_rank + at)
            if first > 0:
                inside_b = (first + i < rank)[:, None] & (column < n)[None, :]
                b = tl.load(b_to + (first + i)[:, None] * n, mask=inside_b, other=0.0)
            acc = tl.dot(u.to(b.dtype), b, acc, input_precision=precision)
        tl.store(to, (before.to(tl.float32) + acc).to(before.dtype), mask=inside)

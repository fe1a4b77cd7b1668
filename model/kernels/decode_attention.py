"""Attention of one token per sequence over the paged cache: flash decoding (arXiv 2205.14135, softmax in base 2).

Legend: S sequences, H query heads, K KV heads, G = H / K, D head dim, N blocks, B tokens per block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.kernels import Cache, Quantized
from model.kernels.early import await_inputs, begin, early, fetch_ahead, let_next_start
from model.kernels.piece_attention import LOG2_E, unpacked

FETCHED_AHEAD = 512  # programs at most: of more, many start when memory is busy already


class Tiling(NamedTuple):
    """How contexts are cut."""

    splits: int  # parts of each context, computed side by side
    tile: int  # context tokens per turn
    warps: int
    stages: int  # turns whose keys and values are on their way at once


def tiling_for(sequences: int, kv_heads: int, groups: int, element_bytes: int) -> Tiling:
    """Fixed by the shapes and the type of keys and values alone, so that a captured graph holds for any lengths.

    Measured on an H100 and an H200, whose 132 multiprocessors all shall have something to read.
    """
    programs, scaled = sequences * kv_heads, element_bytes == 1
    if groups == 1:
        splits = _splits(programs, 512, 32)
        if scaled:
            return Tiling(splits, 32, 1, 3 if programs > 4096 else 2)
        return Tiling(splits, 64, 4 if splits > 1 else 2, 2)
    splits = _splits(programs, 256, 16)
    if scaled:
        return Tiling(splits, 128, 4, 5) if programs < 512 else Tiling(splits, 64, 2, 5)
    tile = 256 // element_bytes  # tokens; a tile of keys and one of values fit in shared memory twice
    if splits > 1:
        return Tiling(splits, tile, 4, 2)
    return Tiling(1, tile, 8, 4) if programs < 1024 else Tiling(1, 64, 2, 3)


def _splits(programs: int, enough: int, most: int) -> int:
    """A power of 2, `most` at most, that makes `enough` programs of so many."""
    return min(most, int(triton.next_power_of_2(triton.cdiv(enough, programs))))


def decode_attention(
    q: torch.Tensor, k_cache: Cache, v_cache: Cache, tables: torch.Tensor, slots: torch.Tensor,
    context_lens: torch.Tensor, tiling: Tiling,
) -> torch.Tensor:  # fmt: skip
    """See `Kernels.decode_attention`."""
    n, h, d = q.shape
    scaled = isinstance(k_cache, Quantized)
    (keys, k_scales), (values, v_scales) = _parts(k_cache), _parts(v_cache)
    block_size, kv_heads = keys.shape[1:3]
    splits, groups, width = tiling.splits, h // kv_heads, triton.next_power_of_2(d)
    out = torch.empty_like(q)
    partial = torch.empty(n, h, splits, d, dtype=torch.float32, device=q.device) if splits > 1 else out
    lse = torch.empty(n, h, splits, dtype=torch.float32, device=q.device) if splits > 1 else out
    tensors = q, keys, values, k_scales, v_scales, tables, slots, context_lens, out, partial, lse
    scale = d**-0.5 * LOG2_E
    ahead = early()["early"] and d * keys.itemsize % 16 == 0 and n * kv_heads * splits <= FETCHED_AHEAD
    shape = d, width, block_size
    if groups == 1 and scaled:
        _decode_split_alone[(h, n, splits)](
            *tensors, scale, tables.stride(0), h, *shape, tiling.tile, splits, tiling.stages, ahead,
            num_warps=tiling.warps, **early(),
        )  # fmt: skip
    else:
        _decode_split[(kv_heads, n, splits)](
            *tensors, scale, tables.stride(0), h, kv_heads, groups, max(16, triton.next_power_of_2(groups)),
            *shape, scaled, tiling.tile, splits, ahead, num_warps=tiling.warps, num_stages=tiling.stages, **early(),
        )  # fmt: skip
    if splits > 1:
        _combine_splits[(n, h)](partial, lse, out, h, d, width, splits, num_warps=2, **early())
    return out


def _parts(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept, and its scales where there are any."""
    return cache if isinstance(cache, Quantized) else (cache, cache)


@triton.jit
def _rows(
    tables, table_stride, slot, kv, position, inside, kv_heads: tl.constexpr, d: tl.constexpr, size: tl.constexpr
):
    """Where the key and the value of each position begin in their caches, and its scale in 8 bits; blocks of `size`."""
    block = tl.load(tables + slot * table_stride + position // size, mask=inside, other=0).to(tl.int64)
    offset = position % size
    return ((block * size + offset) * kv_heads + kv) * d, (block * kv_heads + kv) * size + offset


@triton.jit
def _begin_part(
    k_cache, v_cache, tables, slots, lens, table_stride, seq, kv, split, kv_heads: tl.constexpr, d: tl.constexpr,
    block_size: tl.constexpr, tile: tl.constexpr, splits: tl.constexpr, ahead: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """As `begin`; returns the slot and the positions [start, stop) of one of `splits` parts of a context.

    Slots, lengths and tables are read before the inputs are awaited: what writes them never lets the next kernel begin
    early. The first keys and values are asked for at once: all but the newest have been there since the step before.
    """
    let_next_start(early)
    slot = tl.load(slots + seq)
    length = tl.load(lens + seq).to(tl.int32)
    per = tl.cdiv(tl.cdiv(length, tile), splits) * tile
    start = split * per
    stop = tl.minimum(start + per, length)
    if ahead and start < stop:
        position = tl.minimum(start + tl.arange(0, tile), stop - 1)
        row, _ = _rows(tables, table_stride, slot, kv, position, position < stop, kv_heads, d, block_size)
        size: tl.constexpr = d * k_cache.dtype.element_ty.primitive_bitwidth // 8
        fetch_ahead(k_cache + row, size)
        fetch_ahead(v_cache + row, size)
    await_inputs(early)
    return slot, start, stop


@triton.jit(do_not_specialize=["tables", "slots", "lens", "table_stride"])
def _decode_split(
    q, k_cache, v_cache, k_scales, v_scales, tables, slots, lens, out, partial, lse, scale, table_stride,
    h: tl.constexpr, kv_heads: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr, d: tl.constexpr,
    width: tl.constexpr, block_size: tl.constexpr, scaled: tl.constexpr, tile: tl.constexpr, splits: tl.constexpr,
    ahead: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One of `splits` parts of a context, for all queries that share a KV head."""
    kv = tl.program_id(0)  # fastest: a token's heads lie side by side, and sequences come longest first
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    slot, start, stop = _begin_part(
        k_cache, v_cache, tables, slots, lens, table_stride, seq, kv, split, kv_heads, d, block_size, tile, splits,
        ahead, early,
    )  # fmt: skip
    g = tl.arange(0, rows)
    i = tl.arange(0, width)
    t = tl.arange(0, tile)
    at = (seq * h + kv * groups + g[:, None]) * d + i[None, :]
    ours = (g < groups)[:, None] & (i < d)[None, :]
    # 8 bits become float16 in one instruction for two; bfloat16 would take five.
    kind: tl.constexpr = tl.float16 if scaled and q.dtype.element_ty != tl.float32 else q.dtype.element_ty
    query = tl.load(q + at, mask=ours, other=0.0).to(kind)
    best = tl.full([rows], -float("inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, width], tl.float32)
    for first in range(start, stop, tile):
        position = first + t
        inside = position < stop
        row, to_scale = _rows(tables, table_stride, slot, kv, position, inside, kv_heads, d, block_size)
        mask = inside[:, None] & (i < d)[None, :]
        keys = tl.load(k_cache + row[:, None] + i[None, :], mask=mask, other=0.0)
        values = tl.load(v_cache + row[:, None] + i[None, :], mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(keys.to(kind)), input_precision="ieee") * scale
        if scaled:
            scores *= tl.load(k_scales + to_scale, mask=inside, other=0.0)[None, :]
        scores = tl.where(inside[None, :], scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - better[:, None])
        shrink = tl.exp2(best - better)
        weight = weight * shrink + tl.sum(p, 1)
        if scaled:  # relative to the loudest of the tile, so that 16 bits hold the products
            v_scale = tl.load(v_scales + to_scale, mask=inside, other=0.0)
            loudest = tl.maximum(tl.max(v_scale, 0), 1e-30)
            p = p * (v_scale / loudest)[None, :]
            if kind == tl.float16:
                values = unpacked(values)
            added = tl.dot(p.to(kind), values.to(kind), input_precision="ieee") * loudest
        else:
            added = tl.dot(p.to(kind), values.to(kind), input_precision="ieee")
        acc = acc * shrink[:, None] + added
        best = better
    acc = acc / tl.where(weight > 0, weight, 1.0)[:, None]
    if splits == 1:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=ours)
    else:
        head = seq * h + kv * groups + g
        tl.store(partial + (head[:, None] * splits + split) * d + i[None, :], acc, mask=ours)
        # log2 of the part's weight; -inf where the part is empty
        tl.store(lse + head * splits + split, best + tl.log2(weight), mask=g < groups)


@triton.jit(do_not_specialize=["tables", "slots", "lens", "table_stride"])
def _decode_split_alone(
    q, k_cache, v_cache, k_scales, v_scales, tables, slots, lens, out, partial, lse, scale, table_stride,
    h: tl.constexpr, d: tl.constexpr, width: tl.constexpr, block_size: tl.constexpr, tile: tl.constexpr,
    splits: tl.constexpr, stages: tl.constexpr, ahead: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The same in 8 bits where every query has a KV head of its own.

    No matrix unit: it would multiply 15 empty rows more, and lay out the keys and values for that takes longest.
    """
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    slot, start, stop = _begin_part(
        k_cache, v_cache, tables, slots, lens, table_stride, seq, head, split, h, d, block_size, tile, splits, ahead,
        early,
    )  # fmt: skip
    i = tl.arange(0, width)
    t = tl.arange(0, tile)
    at = (seq * h + head) * d + i
    query = tl.load(q + at, mask=i < d, other=0.0).to(tl.float32) * scale
    best = -float("inf")
    weight = 0.0
    acc = tl.zeros([tile, width], tl.float32)
    for first in tl.range(start, stop, tile, num_stages=stages):
        position = first + t
        inside = position < stop
        row, to_scale = _rows(tables, table_stride, slot, head, position, inside, h, d, block_size)
        mask = inside[:, None] & (i < d)[None, :]
        keys = tl.load(k_cache + row[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(v_cache + row[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], 1)
        scores *= tl.load(k_scales + to_scale, mask=inside, other=0.0)
        scores = tl.where(inside, scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 0))
        p = tl.exp2(scores - better)
        shrink = tl.exp2(best - better)
        weight = weight * shrink + tl.sum(p, 0)
        p *= tl.load(v_scales + to_scale, mask=inside, other=0.0)
        acc = acc * shrink + p[:, None] * values
        best = better
    result = tl.sum(acc, 0) / tl.where(weight > 0, weight, 1.0)
    if splits == 1:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=i < d)
    else:
        part = (seq * h + head) * splits + split
        tl.store(partial + part * d + i, result, mask=i < d)
        tl.store(lse + part, best + tl.log2(weight))


@triton.jit
def _combine_splits(
    partial, lse, out, h: tl.constexpr, d: tl.constexpr, width: tl.constexpr, splits: tl.constexpr, early: tl.constexpr
):
    begin(early)
    head = (tl.program_id(0) * h + tl.program_id(1)).to(tl.int64)
    s = tl.arange(0, splits)
    i = tl.arange(0, width)
    part = tl.load(lse + head * splits + s)
    best = tl.max(part, 0)
    share = tl.exp2(part - tl.where(best == -float("inf"), 0.0, best))
    mask = (share > 0)[:, None] & (i < d)[None, :]
    values = tl.load(partial + (head * splits + s[:, None]) * d + i[None, :], mask=mask, other=0.0)
    total = tl.sum(share, 0)
    result = tl.sum(values * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * d + i, result.to(out.dtype.element_ty), mask=i < d)

"""Attention of tokens that follow each other over the paged cache, where their keys lie: nothing is gathered first.

Flash attention (arXiv 2205.14135, softmax in base 2) with a piece of a prompt, or a whole short one, to a program: the
queries of all its tokens that share a KV head, which read each key once.

Legend: T tokens, P pieces, H query heads, K KV heads, G = H / K, D head dim, N blocks, B tokens per block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from model.kernels import Cache, Pieces, Quantized, piece_tokens
from model.kernels.early import await_inputs, early, let_next_start

LOG2_E = 1.4426950408889634


class PieceTiling(NamedTuple):
    """How keys are read."""

    tile: int  # context tokens per turn
    warps: int
    stages: int  # turns whose keys and values are on their way at once


def piece_tiling(queries: int, dtype: torch.dtype, scaled: bool) -> PieceTiling:
    """For pieces of so many queries, over keys in 8 bits (`scaled`) or as the queries. Measured on an H200."""
    if dtype == torch.float32:  # without matrix units all is kept in registers
        return PieceTiling(16, 8, 2)
    if queries < 128:
        return PieceTiling(64, 4, 2)
    return PieceTiling(64, 8 if scaled else 4, 3)


def piece_attention(
    q: torch.Tensor, k_cache: Cache, v_cache: Cache, tables: torch.Tensor, slots: torch.Tensor,
    context_lens: torch.Tensor, pieces: Pieces, queries: int, out: torch.Tensor, tiling: PieceTiling | None = None,
) -> None:  # fmt: skip
    """Of the tokens in `pieces`, which have at most so many queries, into their places of `out` [T, H, D].

    q, slots, context_lens: as of `Kernels.decode_attention`.
    """
    h, d = q.shape[1:]
    scaled = isinstance(k_cache, Quantized)
    (keys, k_scales), (values, v_scales) = (
        cache if isinstance(cache, Quantized) else (cache, cache) for cache in (k_cache, v_cache)
    )
    block_size, kv_heads = keys.shape[1:3]
    groups = h // kv_heads
    rows = max(16, piece_tokens(groups, queries) * triton.next_power_of_2(groups))
    tile, warps, stages = tiling or piece_tiling(queries, q.dtype, scaled)
    _attend_piece[(kv_heads, len(pieces.starts))](
        q, keys, values, k_scales, v_scales, tables, slots, context_lens, pieces.starts, pieces.counts, out,
        d**-0.5 * LOG2_E, tables.stride(0), h, kv_heads, groups, triton.next_power_of_2(groups), rows, d,
        triton.next_power_of_2(d), block_size, scaled, tile, num_warps=warps, num_stages=stages, **early(),
    )  # fmt: skip


@triton.jit
def unpacked(x):
    """float8 e4m3 to float16, four at a time.

    Said to be impure, or it is moved behind the change of layout that a dot asks for, which then goes byte by byte.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
        " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
        "=r,=r,r", [x], dtype=tl.float16, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def _turn(
    query, best, weight, acc, k_cache, v_cache, k_scales, v_scales, table, first, seen, stop, kv, scale,
    kv_heads: tl.constexpr, d: tl.constexpr, width: tl.constexpr, block_size: tl.constexpr, scaled: tl.constexpr,
    tile: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """One tile of keys from `first` on; with `masked` a query sees positions up to its `seen` alone."""
    position = first + tl.arange(0, tile)
    i = tl.arange(0, width)
    if masked:
        inside = position < stop
        block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
    else:
        inside = position >= 0
        block = tl.load(table + position // block_size).to(tl.int64)
    offset = position % block_size
    where = (((block * block_size + offset) * kv_heads + kv) * d)[:, None] + i[None, :]
    if masked or d != width:
        mask = inside[:, None] & (i < d)[None, :]
        keys = tl.load(k_cache + where, mask=mask, other=0.0)
        values = tl.load(v_cache + where, mask=mask, other=0.0)
    else:
        keys = tl.load(k_cache + where)
        values = tl.load(v_cache + where)
    kind: tl.constexpr = query.dtype
    scores = tl.dot(query, tl.trans(keys.to(kind)), input_precision="ieee")
    if scaled:
        to_scale = (block * kv_heads + kv) * block_size + offset
        scores *= tl.load(k_scales + to_scale, mask=inside, other=0.0)[None, :]
    if masked:
        scores = tl.where(position[None, :] <= seen[:, None], scores, -float("inf"))
    better = tl.maximum(best, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - better[:, None])
    shrink = tl.exp2(best - better)
    weight = weight * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if scaled:  # relative to the loudest of the tile, so that 16 bits hold the products
        v_scale = tl.load(v_scales + to_scale, mask=inside, other=0.0)
        loudest = tl.maximum(tl.max(v_scale, 0), 1e-30)
        p = p * (v_scale / loudest)[None, :]
        if kind == tl.float16:
            values = unpacked(values)
        acc += tl.dot(p.to(kind), values.to(kind), input_precision="ieee") * loudest
    else:
        acc = tl.dot(p.to(kind), values.to(kind), acc, input_precision="ieee")
    return better, weight, acc


@triton.jit(do_not_specialize=["tables", "slots", "lens", "starts", "counts", "table_stride"])
def _attend_piece(
    q, k_cache, v_cache, k_scales, v_scales, tables, slots, lens, starts, counts, out, scale, table_stride,
    h: tl.constexpr, kv_heads: tl.constexpr, groups: tl.constexpr, per_token: tl.constexpr, rows: tl.constexpr,
    d: tl.constexpr, width: tl.constexpr, block_size: tl.constexpr, scaled: tl.constexpr, tile: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """The queries of one piece that share a KV head: row r is head r % per_token of token r // per_token.

    What says which they are is read before the inputs are awaited: what writes it never lets the next kernel begin
    early.
    """
    kv = tl.program_id(0)  # fastest: a token's heads lie side by side
    piece = tl.program_id(1)
    let_next_start(early)
    count = tl.load(counts + piece)
    start = tl.load(starts + piece).to(tl.int64)
    table = tables + tl.load(slots + start) * table_stride
    before = tl.load(lens + start).to(tl.int32) - 1  # of its sequence
    await_inputs(early)
    if count == 0:
        return
    token, head = tl.arange(0, rows) // per_token, tl.arange(0, rows) % per_token
    i = tl.arange(0, width)
    at = ((start + token[:, None]) * h + kv * groups + head[:, None]) * d + i[None, :]
    ours = ((head < groups) & (token < count))[:, None] & (i < d)[None, :]
    # 8 bits become float16 in one instruction for two; bfloat16 would take five.
    kind: tl.constexpr = tl.float16 if scaled and q.dtype.element_ty != tl.float32 else q.dtype.element_ty
    query = tl.load(q + at, mask=ours, other=0.0).to(kind)
    best = tl.full([rows], -float("inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, width], tl.float32)
    seen, stop = before + token, before + count
    whole = (before + 1) // tile * tile  # what all see, in whole tiles
    for first in range(0, whole, tile):
        best, weight, acc = _turn(
            query, best, weight, acc, k_cache, v_cache, k_scales, v_scales, table, first, seen, stop, kv, scale,
            kv_heads, d, width, block_size, scaled, tile, False,
        )  # fmt: skip
    for first in range(whole, stop, tile):
        best, weight, acc = _turn(
            query, best, weight, acc, k_cache, v_cache, k_scales, v_scales, table, first, seen, stop, kv, scale,
            kv_heads, d, width, block_size, scaled, tile, True,
        )  # fmt: skip
    tl.store(out + at, (acc / weight[:, None]).to(out.dtype.element_ty), mask=ours)

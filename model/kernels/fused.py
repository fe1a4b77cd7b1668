"""The kernels in Triton, for CUDA. Each computes in float32 and rounds where the reference rounds.

Legend: T tokens, C model dim, F feed-forward dim, S sequences, H query heads, K KV heads, G = H / K, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import linear

from model.batch import ALONE, SAMPLED, SAMPLED_AFTER
from model.kernels import (
    PIECE_QUERIES,
    PROMPT_QUERIES,
    Activations,
    AdapterRows,
    Cache,
    Int4Weight,
    LowRank,
    Pieces,
    PrefillMetadata,
    Quantized,
    Tokens,
)
from model.kernels.decode_attention import decode_attention, tiling_for
from model.kernels.device import has_warp_groups
from model.kernels.early import begin, early
from model.kernels.int4 import dequantize, int4_tiling, skinny_int4_linear
from model.kernels.low_rank import expand, shrink
from model.kernels.piece_attention import piece_attention
from model.kernels.reference import ReferenceKernels, cache_shape
from model.kernels.skinny import bfloat16_tiling, float8_tiling, skinny_linear, vector_after_gate, vector_after_norm
from model.kernels.stream_k import bfloat16_tile, float8_tile
from model.kernels.stream_k_product import stream_k_linear

HEADS_PER_PROGRAM = 8
TOKENS_PER_PROGRAM = 128


class FusedKernels:
    """See `Kernels`."""

    def unpack_tokens(
        self, packed: torch.Tensor, newest: torch.Tensor, tables: torch.Tensor, block_size: int, tokens: Tokens
    ) -> None:
        size = len(tokens.ids)
        _unpack_tokens[(triton.cdiv(size, TOKENS_PER_PROGRAM),)](
            packed, newest, tables, tokens.ids, tokens.positions, tokens.cells, tokens.context_lens, tokens.slots,
            tokens.sampled_slots, tokens.lone_lens, size, tables.stride(0), len(newest) - 1, block_size, SAMPLED, ALONE,
            SAMPLED_AFTER, TOKENS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        rows, width = x.shape
        total = x if residual is None else residual
        out, scales = _outputs(x, width, quantize)
        block = triton.next_power_of_2(width)
        warps = min(16, max(4, block // 512))
        _add_rms_norm[(rows,)](
            x, total, weight, out, scales, eps, width, residual is not None, quantize, block, num_warps=warps, **early()
        )
        return Quantized(out, scales) if quantize else out, total

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + x

    def gather(self, share: torch.Tensor) -> torch.Tensor:
        return share

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        n_heads: int,
        rotary: torch.Tensor,
        positions: torch.Tensor,
        k_cache: Cache,
        v_cache: Cache,
        cells: torch.Tensor,
    ) -> torch.Tensor:
        tokens = len(qkv)
        _, block_size, kv_heads, d = cache_shape(k_cache)
        quantize = isinstance(k_cache, Quantized)
        k, k_scales = k_cache if isinstance(k_cache, Quantized) else (k_cache, k_cache)
        v, v_scales = v_cache if isinstance(v_cache, Quantized) else (v_cache, v_cache)
        q = torch.empty(tokens, n_heads, d, dtype=qkv.dtype, device=qkv.device)
        grid = (tokens, triton.cdiv(n_heads + 2 * kv_heads, HEADS_PER_PROGRAM))
        _rotate_and_write[grid](
            qkv, q, k, v, k_scales, v_scales, rotary, positions, cells, n_heads, kv_heads, d, block_size,
            quantize, HEADS_PER_PROGRAM, triton.next_power_of_2(d), num_warps=4, **early(),
        )  # fmt: skip
        return q

    def decode_attention(
        self,
        q: torch.Tensor,
        k_cache: Cache,
        v_cache: Cache,
        tables: torch.Tensor,
        slots: torch.Tensor,
        context_lens: torch.Tensor,
        pieces: Pieces | None = None,
    ) -> torch.Tensor:
        kv_heads = cache_shape(k_cache)[2]
        element_bytes = 1 if isinstance(k_cache, Quantized) else k_cache.itemsize
        tiling = tiling_for(len(q), kv_heads, q.shape[1] // kv_heads, element_bytes)
        if pieces is None:
            return decode_attention(q, k_cache, v_cache, tables, slots, context_lens, tiling)
        out = decode_attention(q, k_cache, v_cache, tables, slots, pieces.lone_lens, tiling)
        piece_attention(q, k_cache, v_cache, tables, slots, context_lens, pieces, PIECE_QUERIES, out)
        return out

    def prefill_attention(
        self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, tables: torch.Tensor, prefill: PrefillMetadata
    ) -> torch.Tensor:
        """Prompts from their beginning by torch's kernel; contexts are read where they lie, however long they are."""
        if q.dtype == torch.float32:  # neither has matrix units for 32 bits
            return ReferenceKernels().prefill_attention(q, k_cache, v_cache, tables, prefill)
        tokens, most = prefill.tokens, max(prefill.query_lens)
        if prefill.query_lens == prefill.context_lens:
            return gathered_attention(q, k_cache, v_cache, tokens.cells, prefill.starts, prefill.starts, most, most)
        out = torch.empty_like(q)
        piece_attention(
            q, k_cache, v_cache, tables, tokens.slots, tokens.context_lens, prefill.pieces, PROMPT_QUERIES, out
        )
        return out

    def silu_and_mul(self, gate_up: torch.Tensor, quantize: bool = False) -> Activations:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out, scales = _outputs(gate_up, width, quantize)
        if not quantize:
            _silu_and_mul[(rows, triton.cdiv(width, 1024))](gate_up, out, width, 1024, num_warps=4, **early())
            return out
        block = triton.next_power_of_2(width)
        warps = min(32, max(4, block // 1024))
        _silu_and_mul_quantized[(rows,)](gate_up, out, scales, width, block, num_warps=warps, **early())
        return Quantized(out, scales)

    def quantize_rows(self, x: torch.Tensor) -> Quantized:
        rows, width = x.shape
        out, scales = _outputs(x, width, True)
        block = triton.next_power_of_2(width)
        warps = min(16, max(4, block // 1024))
        _quantize_rows[(rows,)](x, out, scales, width, block, num_warps=warps, **early())
        return Quantized(out, scales)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.dtype.itemsize != 2:
            return linear(x, weight)
        if has_warp_groups() and (tile := bfloat16_tile(len(x), *weight.shape)):
            return stream_k_linear(x, weight, tile)
        tiling = bfloat16_tiling(len(x), *weight.shape)
        return linear(x, weight) if tiling is None else skinny_linear(x, weight, tiling)

    def linear_after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tiling = bfloat16_tiling(1, *weight.shape) if len(x) == 1 and x.dtype.itemsize == 2 else None
        if tiling is not None:
            return vector_after_norm(x, residual, norm, eps, weight, tiling)
        normed, total = self.add_rms_norm(x, residual, norm, eps)
        assert isinstance(normed, torch.Tensor)
        return self.linear(normed, weight), total

    def linear_after_gate(self, gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tiling = bfloat16_tiling(1, *weight.shape) if len(gate_up) == 1 and gate_up.dtype.itemsize == 2 else None
        if tiling is not None:
            return vector_after_gate(gate_up, weight, tiling)
        product = self.silu_and_mul(gate_up)
        assert isinstance(product, torch.Tensor)
        return self.linear(product, weight)

    def float8_linear(self, x: Quantized, weight: Quantized) -> torch.Tensor:
        if has_warp_groups() and (tile := float8_tile(len(x.values), *weight.values.shape)):
            return stream_k_linear(x.values, weight.values, tile, x.scales, weight.scales)
        tiling = float8_tiling(len(x.values), *weight.values.shape)
        if tiling is not None:
            return skinny_linear(x.values, weight.values, tiling, x.scales, weight.scales)
        return torch._scaled_mm(
            x.values, weight.values.t(), x.scales, weight.scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def int4_linear(self, x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
        tiling = int4_tiling(len(x), len(weight.words)) if x.dtype.itemsize == 2 else None
        if tiling is not None:
            return skinny_int4_linear(x, weight, tiling)
        return linear(x, dequantize(weight, x.shape[1], x.dtype))

    def shrink(self, x: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
        return shrink(x, product, rows)

    def expand(self, y: torch.Tensor, shrunk: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
        return expand(y, shrunk, product, rows)


def gathered_attention(
    q: torch.Tensor, k_cache: Cache, v_cache: Cache, cells: torch.Tensor, query_starts: torch.Tensor,
    context_starts: torch.Tensor, most_queries: int, longest: int,
) -> torch.Tensor:  # fmt: skip
    """Causal attention over keys and values that are copied from `cells`, contexts one after another.

    Both kinds of starts are int32 and begin with 0. The copies are as large as the contexts: this is for short ones.
    """
    k, v = (_gathered(cache, cells, q.dtype) for cache in (k_cache, v_cache))
    out = varlen_attn(q, k, v, query_starts, context_starts, most_queries, longest, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    return out


def _gathered(cache: Cache, cells: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What stands in `cells` [n] -> [n, K, D]."""
    if isinstance(cache, torch.Tensor):
        return cache.flatten(0, 1).index_select(0, cells)
    _, block_size, kv_heads, d = cache.values.shape
    out = torch.empty(len(cells), kv_heads, d, dtype=dtype, device=cells.device)
    grid = (len(cells), triton.cdiv(kv_heads, HEADS_PER_PROGRAM))
    _dequantize[grid](
        cache.values, cache.scales, cells, out, kv_heads, d, block_size, HEADS_PER_PROGRAM, triton.next_power_of_2(d),
        num_warps=4,
    )  # fmt: skip
    return out


def _outputs(x: torch.Tensor, width: int, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a kernel writes its result [T, width], and its scales if it quantizes."""
    out = torch.empty(len(x), width, dtype=torch.float8_e4m3fn if quantize else x.dtype, device=x.device)
    return out, torch.empty(len(x), 1, dtype=torch.float32, device=x.device) if quantize else out


@triton.jit(do_not_specialize=["packed", "size", "table_stride", "padding_slot"])
def _unpack_tokens(
    packed, newest, tables, ids, positions, cells, context_lens, slots, sampled_slots, lone_lens, size, table_stride,
    padding_slot, block_size: tl.constexpr, sampled: tl.constexpr, alone: tl.constexpr, sampled_after: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * chunk + tl.arange(0, chunk)
    inside = i < size
    n = tl.load(packed)
    real = i < n
    at = packed + 1 + i
    token = tl.load(at, mask=real, other=0).to(tl.int64)
    position = tl.load(at + n, mask=real, other=0).to(tl.int64)
    slot = tl.load(at + 2 * n, mask=real, other=padding_slot).to(tl.int64)
    flags = tl.load(at + 3 * n, mask=real, other=0)
    token = tl.where(token == sampled, tl.load(newest + slot, mask=inside, other=0), token)
    block = tl.load(tables + slot * table_stride + position // block_size, mask=inside, other=0).to(tl.int64)
    context = tl.where(real, position + 1, 0)
    tl.store(ids + i, token, mask=inside)
    tl.store(positions + i, position, mask=inside)
    tl.store(cells + i, block * block_size + position % block_size, mask=inside)
    tl.store(context_lens + i, context, mask=inside)
    tl.store(slots + i, slot, mask=inside)
    tl.store(sampled_slots + i, tl.where((flags & sampled_after) != 0, slot, padding_slot), mask=inside)
    tl.store(lone_lens + i, tl.where((flags & alone) != 0, context, 0), mask=inside)


@triton.jit
def _store_row(out, scales, row, i, value, width, dtype, quantize: tl.constexpr):
    """One row of a result that has been rounded to `dtype`, in 8 bits if asked for."""
    if quantize:
        exact = value.to(dtype).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(exact)), 1e-12) / 448.0
        tl.store(out + row * width + i, (exact / scale).to(out.dtype.element_ty), mask=i < width)
        tl.store(scales + row, scale)
    else:
        tl.store(out + row * width + i, value.to(dtype), mask=i < width)


@triton.jit
def _add_rms_norm(
    x, total, weight, out, scales, eps, width,
    has_residual: tl.constexpr, quantize: tl.constexpr, block: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < width
    value = tl.load(x + row * width + i, mask=inside, other=0.0)
    if has_residual:
        before = tl.load(total + row * width + i, mask=inside, other=0.0)
        value = (value.to(tl.float32) + before.to(tl.float32)).to(value.dtype)
        tl.store(total + row * width + i, value, mask=inside)
    exact = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(exact * exact) / width + eps)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    _store_row(out, scales, row, i, exact * scale * w, width, value.dtype, quantize)


# What changes from step to step is not specialised on: a kernel compiled in the middle of traffic is a stall.
@triton.jit(do_not_specialize=["positions", "cells"])
def _rotate_and_write(
    qkv, q, k_cache, v_cache, k_scales, v_scales, rotary, positions, cells,
    n_heads: tl.constexpr, kv_heads: tl.constexpr, d: tl.constexpr, block_size: tl.constexpr, quantize: tl.constexpr,
    heads: tl.constexpr, width: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    begin(early)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    i = tl.arange(0, width)[None, :]
    cell = tl.load(cells + token)
    position = tl.load(positions + token)
    inside = (head < n_heads + 2 * kv_heads)[:, None] & (i < d)
    x = tl.load(qkv + (token * (n_heads + 2 * kv_heads) + head[:, None]) * d + i, mask=inside, other=0.0)
    turns = inside & (head < n_heads + kv_heads)[:, None]  # values are stored as they are
    angle = tl.load(rotary + position * d + i + tl.zeros_like(head)[:, None], mask=turns, other=0.0)
    cos, sin = tl.split(tl.reshape(angle, (heads, width // 2, 2)))
    first, second = tl.split(tl.reshape(x.to(tl.float32), (heads, width // 2, 2)))
    turned = tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (heads, width)).to(x.dtype)
    tl.store(q + (token * n_heads + head[:, None]) * d + i, turned, mask=inside & (head < n_heads)[:, None])
    k_head, v_head = head - n_heads, head - n_heads - kv_heads
    is_k = (k_head >= 0) & (k_head < kv_heads)
    is_v = (v_head >= 0) & (v_head < kv_heads)
    to_k = k_cache + (cell * kv_heads + k_head[:, None]) * d + i
    to_v = v_cache + (cell * kv_heads + v_head[:, None]) * d + i
    if quantize:
        exact = tl.where(is_k[:, None], turned, x).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(exact), 1), 1e-12) / 448.0
        rounded = (exact / scale[:, None]).to(k_cache.dtype.element_ty)
        to_scale = cell // block_size * kv_heads * block_size + cell % block_size
        tl.store(to_k, rounded, mask=inside & is_k[:, None])
        tl.store(to_v, rounded, mask=inside & is_v[:, None])
        tl.store(k_scales + to_scale + k_head * block_size, scale, mask=is_k)
        tl.store(v_scales + to_scale + v_head * block_size, scale, mask=is_v)
    else:
        tl.store(to_k, turned, mask=inside & is_k[:, None])
        tl.store(to_v, x, mask=inside & is_v[:, None])


@triton.jit(do_not_specialize=["cells"])
def _dequantize(
    values, scales, cells, out,
    kv_heads: tl.constexpr, d: tl.constexpr, block_size: tl.constexpr, heads: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    i = tl.arange(0, width)[None, :]
    cell = tl.load(cells + row)
    inside = (head < kv_heads)[:, None] & (i < d)
    to_scale = (cell // block_size * kv_heads + head) * block_size + cell % block_size
    scale = tl.load(scales + to_scale, mask=head < kv_heads, other=0.0)
    x = tl.load(values + (cell * kv_heads + head[:, None]) * d + i, mask=inside, other=0.0).to(tl.float32)
    exact = x * scale[:, None]
    tl.store(out + (row * kv_heads + head[:, None]) * d + i, exact.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_times(gate, up):
    exact = gate.to(tl.float32)
    return (exact / (1.0 + tl.exp(-exact))).to(gate.dtype) * up


@triton.jit
def _silu_and_mul(gate_up, out, width, block: tl.constexpr, early: tl.constexpr):
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0)
    tl.store(out + row * width + i, _silu_times(gate, up), mask=inside)


@triton.jit
def _silu_and_mul_quantized(gate_up, out, scales, width, block: tl.constexpr, early: tl.constexpr):
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    gate = tl.load(gate_up + row * 2 * width + i, mask=i < width, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=i < width, other=0.0)
    _store_row(out, scales, row, i, _silu_times(gate, up), width, gate.dtype, True)


@triton.jit
def _quantize_rows(x, out, scales, width, block: tl.constexpr, early: tl.constexpr):
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    value = tl.load(x + row * width + i, mask=i < width, other=0.0)
    _store_row(out, scales, row, i, value, width, value.dtype, True)

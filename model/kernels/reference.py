"""The kernels in plain torch: slow on a GPU, right anywhere."""

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from model.batch import ALONE, SAMPLED, SAMPLED_AFTER
from model.kernels import (
    Activations,
    AdapterRows,
    Cache,
    Int4Weight,
    LowRank,
    Part,
    Pieces,
    PrefillMetadata,
    Quantized,
    Tokens,
)
from model.packing import unpacked

FLOAT8_MAX = 448.0  # of e4m3


class ReferenceKernels:
    """See `Kernels`."""

    def unpack_tokens(
        self, packed: torch.Tensor, newest: torch.Tensor, tables: torch.Tensor, block_size: int, tokens: Tokens
    ) -> None:
        n = int(packed[0])
        ids, positions, slots, flags = packed[1 : 1 + 4 * n].long().view(4, n)
        padding_slot = len(newest) - 1
        tokens.ids[:n] = torch.where(ids == SAMPLED, newest[slots], ids)
        tokens.positions[:n], tokens.context_lens[:n], tokens.slots[:n] = positions, positions + 1, slots
        tokens.sampled_slots[:n] = torch.where(flags & SAMPLED_AFTER > 0, slots, padding_slot)
        tokens.lone_lens[:n] = (positions + 1) * (flags & ALONE)
        for padded in (tokens.ids, tokens.positions, tokens.context_lens, tokens.lone_lens):
            padded[n:] = 0
        tokens.slots[n:] = tokens.sampled_slots[n:] = padding_slot
        blocks = tables[tokens.slots, tokens.positions // block_size]
        tokens.cells.copy_(blocks * block_size + tokens.positions % block_size)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        total = x if residual is None else residual + x
        normed = rms_norm(total, (total.shape[-1],), weight, eps)
        return self.quantize_rows(normed) if quantize else normed, total

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
        kv_heads, d = cache_shape(k_cache)[2:]
        heads = qkv.view(len(qkv), -1, d)
        rotated = rotate(heads[:, : n_heads + kv_heads], rotary[positions])
        self._write(k_cache, cells, rotated[:, n_heads:])
        self._write(v_cache, cells, heads[:, n_heads + kv_heads :])
        return rotated[:, :n_heads]

    def _write(self, cache: Cache, cells: torch.Tensor, heads: torch.Tensor) -> None:
        """heads [T, K, D] to `cells` [T]."""
        if isinstance(cache, torch.Tensor):
            cache.flatten(0, 1).index_copy_(0, cells, heads)
            return
        quantized, block_size = self.quantize_rows(heads), cache.values.shape[1]
        _bytes(cache.values).flatten(0, 1).index_copy_(0, cells, _bytes(quantized.values))
        cache.scales[cells // block_size, cells % block_size] = quantized.scales

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
        n, h, d = q.shape
        block_size, kv_heads = cache_shape(k_cache)[1:3]
        longest = max(1, int(context_lens.max()))
        width = -(-longest // block_size)
        # index_select copies whole blocks, a third of indexing's time
        blocks = tables[:, :width].index_select(0, slots).flatten()
        # The G queries of a group share their keys as G tokens would.
        k, v = (_blocks(cache, blocks, q.dtype).view(n, -1, kv_heads, d) for cache in (k_cache, v_cache))
        k, v = (x[:, :longest].transpose(1, 2) for x in (k, v))  # [S, K, L, D]
        mask = torch.arange(longest, device=q.device) < context_lens.unsqueeze(1)  # [S, L]
        grouped = q.reshape(n, kv_heads, h // kv_heads, d)
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask[:, None, None, :]).reshape(n, h, d)
        return out if int(context_lens.min()) else out.masked_fill(context_lens.view(n, 1, 1) == 0, 0.0)

    def prefill_attention(
        self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, tables: torch.Tensor, prefill: PrefillMetadata
    ) -> torch.Tensor:
        """One sequence at a time: no more than one context is ever copied."""
        out = torch.empty_like(q)
        block_size, start = cache_shape(k_cache)[1], 0
        for length, context in zip(prefill.query_lens, prefill.context_lens, strict=True):
            slot = prefill.tokens.slots[start : start + 1]
            blocks = tables[:, : -(-context // block_size)].index_select(0, slot).flatten()
            k, v = (
                _blocks(cache, blocks, q.dtype).flatten(0, 1)[:context].transpose(0, 1).unsqueeze(0)
                for cache in (k_cache, v_cache)
            )
            query = q[start : start + length].transpose(0, 1).unsqueeze(0)
            # The chunk's first token stands at position context - length and sees everything up to itself.
            mask = None
            if context != length:
                mask = torch.ones(length, context, dtype=torch.bool, device=q.device).tril(context - length)
            attended = scaled_dot_product_attention(
                query, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            out[start : start + length] = attended.squeeze(0).transpose(0, 1)
            start += length
        return out

    def silu_and_mul(self, gate_up: torch.Tensor, quantize: bool = False) -> Activations:
        gate, up = gate_up.chunk(2, dim=-1)
        product = silu(gate) * up
        return self.quantize_rows(product) if quantize else product

    def quantize_rows(self, x: torch.Tensor) -> Quantized:
        scales = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
        return Quantized((x.float() / scales).to(torch.float8_e4m3fn), scales)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    def linear_after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = self.add_rms_norm(x, residual, norm, eps)
        assert isinstance(normed, torch.Tensor)
        return linear(normed, weight), total

    def linear_after_gate(self, gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = self.silu_and_mul(gate_up)
        assert isinstance(product, torch.Tensor)
        return linear(product, weight)

    def float8_linear(self, x: Quantized, weight: Quantized) -> torch.Tensor:
        product = (x.values.float() * x.scales) @ (weight.values.float() * weight.scales).t()
        return product.to(torch.bfloat16)

    def int4_linear(self, x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
        return linear(x, self.dequantize(weight, x.shape[1], x.dtype))

    def dequantize(self, weight: Int4Weight, inputs: int, dtype: torch.dtype) -> torch.Tensor:
        """[out, inputs]"""
        groups, out = weight.scales.shape
        q = unpacked(weight.words)[:, :inputs].reshape(out, groups, -1).float()
        scales, zeros = (part.t().float().unsqueeze(-1) for part in (weight.scales, weight.zeros))
        return ((q - zeros) * scales).view(out, inputs).to(dtype)

    def shrink(self, x: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
        """[T, parts, rank]"""
        shrunk = x.new_zeros(len(x), len(product.parts), product.max_rank)
        for tokens, part, a, _ in _pairs(product, rows):
            shrunk[tokens, part.place, : len(a)] = linear(x[tokens], a)
        return shrunk

    def expand(self, y: torch.Tensor, shrunk: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
        for tokens, part, _, b in _pairs(product, rows):
            y[tokens, part.start : part.start + part.outputs] += shrunk[tokens, part.place, : len(b)] @ b
        return y


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[2j], x[2j + 1]) of x [T, heads, D] by rotation [T, D / 2, 2] (Meta's interleaved layout)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation).unsqueeze(1)).flatten(-2).to(x.dtype)


def _pairs(product: LowRank, rows: AdapterRows) -> Iterator[tuple[torch.Tensor, Part, torch.Tensor, torch.Tensor]]:
    """The tokens of each block, and of each part that their adapter changes A [r, in] and B transposed, [r, out]."""
    for slot, start, count in rows.blocks.t().tolist():
        for part in product.parts if count else ():
            width, rank = int(product.widths[slot - 1]), int(product.ranks[slot - 1, part.index])
            if rank:
                room = product.values[slot - 1, width * part.a : width * (part.b + part.outputs)]
                a, b = room[: width * part.inputs], room[width * part.inputs :]
                tokens = rows.order[start : start + count].long()
                yield tokens, part, a.view(width, -1)[:rank], b.view(width, -1)[:rank]


def cache_shape(cache: Cache) -> torch.Size:
    """N, B, K, D."""
    return (cache.values if isinstance(cache, Quantized) else cache).shape


def cached(cache: Cache, cells: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What stands in `cells` [n] -> [n, K, D]; of a cache in 8 bits in `dtype`."""
    if isinstance(cache, torch.Tensor):
        return cache.flatten(0, 1).index_select(0, cells)
    block_size = cache.values.shape[1]
    values = _bytes(cache.values).flatten(0, 1).index_select(0, cells).view(cache.values.dtype)
    return (values.float() * cache.scales[cells // block_size, cells % block_size]).to(dtype)


def _blocks(cache: Cache, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whole blocks [n] -> [n, B, K, D]."""
    if isinstance(cache, torch.Tensor):
        return cache.index_select(0, blocks)
    values = _bytes(cache.values).index_select(0, blocks).view(cache.values.dtype)
    return (values.float() * cache.scales[blocks]).to(dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """As bytes: torch has few operations on 8-bit floats."""
    return x.view(torch.uint8)

"""The kernels in plain torch: slow on a GPU, right anywhere."""

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from model.kernels import Activations, PrefillMetadata, Quantized

FLOAT8_MAX = 448.0  # of e4m3


class ReferenceKernels:
    """See `Kernels`."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        total = x if residual is None else residual + x
        normed = rms_norm(total, (total.shape[-1],), weight, eps)
        return self.quantize_rows(normed) if quantize else normed, total

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        n_heads: int,
        rotary: torch.Tensor,
        positions: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        kv_heads, d = k_cache.shape[2:]
        heads = qkv.view(len(qkv), -1, d)
        rotated = rotate(heads[:, : n_heads + kv_heads], rotary[positions])
        k_cache.flatten(0, 1).index_copy_(0, slot_mapping, rotated[:, n_heads:])
        v_cache.flatten(0, 1).index_copy_(0, slot_mapping, heads[:, n_heads + kv_heads :])
        return rotated[:, :n_heads]

    def decode_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> torch.Tensor:
        n, h, d = q.shape
        block_size, kv_heads = k_cache.shape[1:3]
        longest = max(1, int(context_lens.max()))
        width = -(-longest // block_size)
        blocks = block_tables[:, :width].flatten()  # index_select copies whole blocks, a third of indexing's time
        # The G queries of a group share their keys as G tokens would.
        k = k_cache.index_select(0, blocks).view(n, -1, kv_heads, d)[:, :longest].transpose(1, 2)  # [S, K, L, D]
        v = v_cache.index_select(0, blocks).view(n, -1, kv_heads, d)[:, :longest].transpose(1, 2)
        mask = torch.arange(longest, device=q.device) < context_lens.unsqueeze(1)  # [S, L]
        grouped = q.reshape(n, kv_heads, h // kv_heads, d)
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=mask[:, None, None, :]).reshape(n, h, d)
        return out if int(context_lens.min()) else out.masked_fill(context_lens.view(n, 1, 1) == 0, 0.0)

    def prefill_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, prefill: PrefillMetadata
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        k_flat, v_flat = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # [N * B, K, D]
        start = context_start = 0
        for length, context in zip(prefill.query_lens, prefill.context_lens, strict=True):
            slots = prefill.slots[context_start : context_start + context]
            k = k_flat.index_select(0, slots).transpose(0, 1).unsqueeze(0)  # [1, K, context, D]
            v = v_flat.index_select(0, slots).transpose(0, 1).unsqueeze(0)
            query = q[start : start + length].transpose(0, 1).unsqueeze(0)
            # The chunk's first token stands at position context - length and sees everything up to itself.
            mask = None
            if context != length:
                mask = torch.ones(length, context, dtype=torch.bool, device=q.device).tril(context - length)
            attended = scaled_dot_product_attention(
                query, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            out[start : start + length] = attended.squeeze(0).transpose(0, 1)
            start, context_start = start + length, context_start + context
        return out

    def silu_and_mul(self, gate_up: torch.Tensor, quantize: bool = False) -> Activations:
        gate, up = gate_up.chunk(2, dim=-1)
        product = silu(gate) * up
        return self.quantize_rows(product) if quantize else product

    def quantize_rows(self, x: torch.Tensor) -> Quantized:
        scales = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
        return Quantized((x.float() / scales).to(torch.float8_e4m3fn), scales)

    def float8_linear(self, x: Quantized, weight: Quantized) -> torch.Tensor:
        product = (x.values.float() * x.scales) @ (weight.values.float() * weight.scales).t()
        return product.to(torch.bfloat16)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[2j], x[2j + 1]) of x [T, heads, D] by rotation [T, D / 2, 2] (Meta's interleaved layout)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation).unsqueeze(1)).flatten(-2).to(x.dtype)

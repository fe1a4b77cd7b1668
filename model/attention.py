"""Attention over the paged KV cache.

Legend: T tokens, S sequences, H query heads, K KV heads, G = H / K, D head dim, B block size, W blocks per table,
L = W * B context slots.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from model.batch import Batch


@dataclass(frozen=True, slots=True)
class Prefill:
    """A sequence that computes several tokens: batch tokens [start, stop), attending to `context` slots in order."""

    start: int
    stop: int
    slots: torch.Tensor  # [context] where its keys are, this chunk's included
    mask: torch.Tensor | None  # [stop - start, context], True where allowed; None: plain causal from the first token


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """What every layer of a step needs to know, prepared once per step."""

    positions: torch.Tensor  # [T]
    slot_mapping: torch.Tensor  # [T] where each token's key and value go
    sample_tokens: torch.Tensor  # [number of SampleRows] index of the token whose logits are sampled
    decode_tokens: torch.Tensor  # [Sd] index of the only token of each decoding sequence
    decode_slots: torch.Tensor  # [Sd * L] their context, padded with slot 0
    decode_mask: torch.Tensor  # [Sd, 1, 1, L] True where there is context
    prefills: list[Prefill]


def prepare(batch: Batch, block_size: int, device: torch.device) -> AttentionMetadata:
    """Turn a batch into index tensors on `device`. All arithmetic on the host, in numpy."""
    starts = np.concatenate(([0], np.cumsum(batch.query_lens)))  # [S + 1]
    context_lens = batch.num_computed_tokens + batch.query_lens  # [S]
    tables = batch.block_tables.reshape(batch.num_seqs, -1)  # [S, W]
    seq_of_token = np.repeat(np.arange(batch.num_seqs), batch.query_lens)  # [T]
    positions = np.arange(batch.num_tokens) - starts[seq_of_token] + batch.num_computed_tokens[seq_of_token]
    slots = tables[seq_of_token, positions // block_size].astype(np.int64) * block_size + positions % block_size

    decoding = np.flatnonzero(batch.query_lens == 1)
    longest = int(context_lens[decoding].max(initial=0))
    width = -(-longest // block_size)
    decode_slots = _slots(tables[decoding, :width], block_size)[:, :longest]  # [Sd, L]
    decode_mask = np.arange(longest) < context_lens[decoding, None]
    prefills = [
        _prefill(starts[i], starts[i + 1], int(context_lens[i]), tables[i], block_size, device)
        for i in np.flatnonzero(batch.query_lens > 1)
    ]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    return AttentionMetadata(
        positions=tensor(positions),
        slot_mapping=tensor(slots),
        sample_tokens=tensor(starts[[s.row + 1 for s in batch.samples]] - 1),
        decode_tokens=tensor(starts[decoding]),
        decode_slots=tensor(decode_slots.reshape(-1)),
        decode_mask=tensor(decode_mask[:, None, None, :]),
        prefills=prefills,
    )


def _slots(tables: np.ndarray, block_size: int) -> np.ndarray:
    """Cache slots of each table, in token order: [..., W] -> [..., W * B]."""
    slots = tables[..., None].astype(np.int64) * block_size + np.arange(block_size)
    return slots.reshape(*tables.shape[:-1], tables.shape[-1] * block_size)


def _prefill(
    start: int,
    stop: int,
    context: int,
    table: np.ndarray,
    block_size: int,
    device: torch.device,
) -> Prefill:
    slots = torch.from_numpy(_slots(table[: -(-context // block_size)], block_size)[:context]).to(device)
    length = int(stop - start)
    if context == length:
        return Prefill(int(start), int(stop), slots, None)
    # The chunk's first token stands at position context - length and sees everything up to itself.
    mask = torch.ones(length, context, dtype=torch.bool, device=device).tril(context - length)
    return Prefill(int(start), int(stop), slots, mask)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v of every token over its own sequence, causally, with grouped queries.

    q: [T, H, D]; k_cache, v_cache: [N, B, K, D], holding this step's keys already. Returns [T, H, D].
    """
    out = torch.empty_like(q)
    k_flat, v_flat = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # [N * B, K, D]
    if len(metadata.decode_tokens):
        out.index_copy_(0, metadata.decode_tokens, _decode(q[metadata.decode_tokens], k_flat, v_flat, metadata))
    for prefill in metadata.prefills:
        k = k_flat.index_select(0, prefill.slots).transpose(0, 1).unsqueeze(0)  # [1, K, context, D]
        v = v_flat.index_select(0, prefill.slots).transpose(0, 1).unsqueeze(0)
        out[prefill.start : prefill.stop] = (
            scaled_dot_product_attention(
                q[prefill.start : prefill.stop].transpose(0, 1).unsqueeze(0),
                k,
                v,
                attn_mask=prefill.mask,
                is_causal=prefill.mask is None,
                enable_gqa=True,
            )
            .squeeze(0)
            .transpose(0, 1)
        )
    return out


def _decode(q: torch.Tensor, k_flat: torch.Tensor, v_flat: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """One query token per sequence, [Sd, H, D]: the G queries of a group share their keys like G tokens would."""
    n, h, d = q.shape
    kv_heads = k_flat.shape[1]
    k = k_flat.index_select(0, metadata.decode_slots).view(n, -1, kv_heads, d).transpose(1, 2)  # [Sd, K, L, D]
    v = v_flat.index_select(0, metadata.decode_slots).view(n, -1, kv_heads, d).transpose(1, 2)
    grouped = q.view(n, kv_heads, h // kv_heads, d)  # [Sd, K, G, D]
    return scaled_dot_product_attention(grouped, k, v, attn_mask=metadata.decode_mask).reshape(n, h, d)

"""Attention over the paged KV cache: what every layer of a step needs to know, and which kernel computes which tokens.

Legend: T tokens, S sequences, Sd decoding sequences, H query heads, D head dim, B block size, W blocks per table.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.batch import Batch
from model.kernels import Cache, Kernels, Pieces, PrefillMetadata
from model.transfer import Integers, all_to_device


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Prepared once per step. All tensors are int64 on the stage's device unless said otherwise."""

    positions: torch.Tensor  # [T]
    slot_mapping: torch.Tensor  # [T] where each token's key and value go
    sample_tokens: torch.Tensor  # [R] index of the token whose logits are sampled
    block_tables: torch.Tensor  # [Sd, W] of the sequences that compute one token; they come first
    context_lens: torch.Tensor  # [Sd] with that token
    prefill: PrefillMetadata | None  # the other sequences
    pieces: Pieces | None = None  # of captured steps, where tokens of prompts are sequences of their own

    @property
    def num_decodes(self) -> int:
        return len(self.context_lens)


def prepare(batch: Batch, block_size: int, device: torch.device) -> AttentionMetadata:
    """Turn a batch into index tensors on `device`: all arithmetic in numpy on the host, then one copy."""
    starts = np.concatenate(([0], np.cumsum(batch.query_lens, dtype=np.int64)))  # [S + 1]
    context_lens = batch.num_computed_tokens.astype(np.int64) + batch.query_lens  # [S]
    tables = batch.block_tables.reshape(batch.num_seqs, -1)  # [S, W]
    seq_of_token = np.repeat(np.arange(batch.num_seqs), batch.query_lens)  # [T]
    positions = np.arange(batch.num_tokens) - starts[seq_of_token] + batch.num_computed_tokens[seq_of_token]
    slots = tables[seq_of_token, positions // block_size].astype(np.int64) * block_size + positions % block_size
    decodes = int(np.count_nonzero(batch.query_lens == 1))
    assert (batch.query_lens[:decodes] == 1).all(), "sequences that compute one token come first"
    width = -(-int(context_lens[:decodes].max(initial=1)) // block_size)
    contexts = context_lens[decodes:]
    prefill_slots = [_slots(tables[decodes + i], int(n), block_size) for i, n in enumerate(contexts)]
    on_device = all_to_device(
        [
            positions,
            slots,
            batch.sample_tokens,
            tables[:decodes, :width].reshape(-1),
            context_lens[:decodes],
            np.concatenate(prefill_slots) if prefill_slots else np.empty(0, np.int64),
            starts[decodes:] - starts[decodes],
            np.concatenate(([0], np.cumsum(contexts))),
        ],
        device,
    )
    prefill = None
    if prefill_slots:
        lens = batch.query_lens[decodes:].tolist(), contexts.tolist()
        prefill = PrefillMetadata(*lens, on_device[6].int(), on_device[7].int(), on_device[5])
    positions_, slot_mapping, sample_tokens, block_tables, context_lens_ = on_device[:5]
    return AttentionMetadata(
        positions_, slot_mapping, sample_tokens, block_tables.view(decodes, width), context_lens_, prefill
    )


def _slots(table: Integers, length: int, block_size: int) -> Integers:
    """Cache slots of the first `length` tokens of a sequence, in order."""
    blocks = table[: -(-length // block_size)].astype(np.int64)
    return (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:length]


def paged_attention(
    q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata, kernels: Kernels
) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v of every token over its own sequence, causally, with grouped queries.

    q: [T, H, D]; k_cache, v_cache: [N, B, K, D], holding this step's keys already. Returns [T, H, D].
    """
    n = metadata.num_decodes
    parts = []
    if n:
        tables, lens = metadata.block_tables, metadata.context_lens
        parts.append(kernels.decode_attention(q[:n], k_cache, v_cache, tables, lens, metadata.pieces))
    if metadata.prefill is not None:
        parts.append(kernels.prefill_attention(q[n:], k_cache, v_cache, metadata.prefill))
    return parts[0] if len(parts) == 1 else torch.cat(parts)

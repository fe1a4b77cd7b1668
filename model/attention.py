"""Attention over the paged KV cache: what every layer of a step needs to know, and which kernel computes which tokens.

Legend: T tokens, S sequences, H query heads, D head dim, B block size, W blocks per table.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.batch import ALONE, SAMPLED_AFTER, Batch, Int32Array
from model.kernels import Cache, Kernels, Pieces, PrefillMetadata, Tokens
from model.slots import Slots
from model.transfer import all_to_device


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Prepared once per step, on the stage's device."""

    tokens: Tokens
    tables: torch.Tensor  # [slots + 1, W]
    num_decodes: int  # tokens of sequences that compute no other; they come first
    prefill: PrefillMetadata | None  # the other sequences
    pieces: Pieces | None = None  # of captured steps, where all tokens count as decodes


def packed_tokens(batch: Batch) -> list[Int32Array]:
    """A step as `Kernels.unpack_tokens` takes it, one part after another: T, then of each token its id, position,
    slot and flags (ALONE, SAMPLED_AFTER).

    The only place that lays a batch out token by token. Block tables and newest tokens are on the device already.
    """
    flags = np.repeat(np.where(batch.query_lens == 1, ALONE, 0).astype(np.int32), batch.query_lens)
    flags[batch.sample_tokens] |= SAMPLED_AFTER
    count = np.array([batch.num_tokens], np.int32)
    return [count, batch.token_ids, batch.positions, np.repeat(batch.slots, batch.query_lens), flags]


def prepare(batch: Batch, slots: Slots, kernels: Kernels) -> AttentionMetadata:
    """Of a step launched kernel by kernel. `slots` have been told of it."""
    decodes = int(np.count_nonzero(batch.query_lens == 1))
    assert (batch.query_lens[:decodes] == 1).all(), "sequences that compute one token come first"
    lens = batch.query_lens[decodes:]
    contexts = lens + batch.num_computed_tokens[decodes:]
    parts = [np.concatenate(packed_tokens(batch)), batch.slots[decodes:], _starts(lens), _starts(contexts)]
    packed, *of_prompts = all_to_device(parts, torch.int32, slots.device)
    tokens = Tokens.empty(batch.num_tokens, slots.device)
    kernels.unpack_tokens(packed, slots.newest, slots.tables, slots.block_size, tokens)
    prefill = None
    if len(lens):
        prompt_slots, query_starts, context_starts = of_prompts
        prefill = PrefillMetadata(lens.tolist(), contexts.tolist(), query_starts, context_starts, prompt_slots)
    return AttentionMetadata(tokens, slots.tables, decodes, prefill)


def _starts(lens: Int32Array) -> Int32Array:
    """[n + 1] where each of n parts begins, and the last one ends."""
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=starts[1:])
    return starts


def paged_attention(
    q: torch.Tensor, k_cache: Cache, v_cache: Cache, metadata: AttentionMetadata, kernels: Kernels
) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v of every token over its own sequence, causally, with grouped queries.

    q: [T, H, D]; k_cache, v_cache: [N, B, K, D], holding this step's keys already. Returns [T, H, D].
    """
    n, tokens, tables = metadata.num_decodes, metadata.tokens, metadata.tables
    parts = []
    if n:
        slots, lens = tokens.slots[:n], tokens.context_lens[:n]
        parts.append(kernels.decode_attention(q[:n], k_cache, v_cache, tables, slots, lens, metadata.pieces))
    if metadata.prefill is not None:
        parts.append(kernels.prefill_attention(q[n:], k_cache, v_cache, tables, metadata.prefill))
    return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Attention over the paged KV cache: what every layer of a step needs to know, and which kernel computes which tokens.

Legend: T tokens, S sequences, H query heads, D head dim, B block size, W blocks per table.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.batch import ALONE, SAMPLED_AFTER, Batch, Int32Array
from model.kernels import PROMPT_QUERIES, Cache, Kernels, Pieces, PrefillMetadata, Tokens, piece_tokens
from model.layers import Additions
from model.slots import Slots
from model.transfer import Integers, all_to_device


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Prepared once per step, on the stage's device."""

    tokens: Tokens
    tables: torch.Tensor  # [slots + 1, W]
    num_decodes: int  # tokens of sequences that compute no other; they come first
    prefill: PrefillMetadata | None  # the other sequences
    pieces: Pieces | None = None  # of captured steps, where all tokens count as decodes
    adapters: Additions | None = None  # if any token has one


def packed_tokens(batch: Batch) -> list[Int32Array]:
    """A step as `Kernels.unpack_tokens` takes it, one part after another: T, then of each token its id, position,
    slot and flags (ALONE, SAMPLED_AFTER).

    The only place that lays a batch out token by token. Block tables and newest tokens are on the device already.
    """
    count = np.array([batch.num_tokens], np.int32)
    if batch.num_tokens == batch.num_seqs:  # nearly every step, which waits for it: it is laid out already
        flags = np.full(batch.num_tokens, ALONE, np.int32)
        flags[batch.sample_rows] |= SAMPLED_AFTER
        return [count, batch.token_ids, batch.num_computed_tokens, batch.slots, flags]
    flags = np.repeat(np.where(batch.query_lens == 1, ALONE, 0).astype(np.int32), batch.query_lens)
    flags[batch.sample_tokens] |= SAMPLED_AFTER
    return [count, batch.token_ids, batch.positions, np.repeat(batch.slots, batch.query_lens), flags]


def prepare(
    batch: Batch, slots: Slots, kernels: Kernels, groups: int, adapters: Additions | None = None
) -> AttentionMetadata:
    """Of a step launched kernel by kernel. `slots` have been told of it; so many query heads share a KV head."""
    decodes = int(np.count_nonzero(batch.query_lens == 1))
    assert (batch.query_lens[:decodes] == 1).all(), "sequences that compute one token come first"
    lens = batch.query_lens[decodes:]
    contexts = lens + batch.num_computed_tokens[decodes:]
    starts, counts = pieces_of(lens, piece_tokens(groups, PROMPT_QUERIES))
    # What reads the longest contexts is begun first: it takes longest.
    order = np.argsort(-batch.positions[decodes:][starts], kind="stable")
    query_starts = np.concatenate(([0], np.cumsum(lens)))
    parts = [np.concatenate(packed_tokens(batch)), query_starts, starts[order], counts[order]]
    packed, *of_prompts = all_to_device(parts, torch.int32, slots.device)
    tokens = Tokens.empty(batch.num_tokens, slots.device)
    kernels.unpack_tokens(packed, slots.newest, slots.tables, slots.block_size, tokens)
    prefill = None
    if len(lens):
        prompts = tokens.part(decodes, batch.num_tokens)
        pieces = Pieces(of_prompts[1], of_prompts[2], prompts.lone_lens)
        prefill = PrefillMetadata(lens.tolist(), contexts.tolist(), of_prompts[0], prompts, pieces)
    return AttentionMetadata(tokens, slots.tables, decodes, prefill, adapters=adapters)


def pieces_of(query_lens: Int32Array, most: int) -> tuple[Integers, Integers]:
    """Sequences of several tokens in pieces of `most` at most: at which token each begins, and how many it has."""
    many = query_lens > 1
    lens, begins = query_lens[many], (np.cumsum(query_lens) - query_lens)[many]
    each = -(-lens // most)  # pieces of each sequence
    within = (np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)) * most
    return np.repeat(begins, each) + within, np.minimum(np.repeat(lens, each) - within, most)


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

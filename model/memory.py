"""How much of a GPU's memory is left for the KV cache, found by running the largest step once."""

import logging

import msgspec
import numpy as np
import torch

from model.batch import Batch, Rules
from model.group import DecoderGroup
from model.sampling_params import MAX_LOGPROBS
from model.stage import Stage

log = logging.getLogger(__name__)

CONTEXT_BYTES = 600_000_000  # of a process on a GPU, beside what torch allocates
GRAPH_BYTES = 1_000_000_000  # set aside for captured graphs: they share one pool of the largest captured step's size


def kv_budgets(
    group: DecoderGroup,
    memory_fraction: float,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    block_size: int,
    kv_dtype: torch.dtype | None = None,
    share: float = 1.0,
) -> list[int]:
    """Bytes for keys and values on each GPU of a stage, which has `share` of it.

    Raises `ValueError` if none are left.
    """
    activations = _activation_bytes(group, max_num_seqs, max_num_batched_tokens, block_size, kv_dtype)
    torch.cuda.empty_cache()
    devices = zip(group.devices, activations, strict=True)
    return [_budget(device, needed, memory_fraction, share) for device, needed in devices]


def _budget(device: torch.device, activations: int, memory_fraction: float, share: float) -> int:
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) + CONTEXT_BYTES
    used = used_bytes(free, total, own, share)
    budget = int(memory_fraction * share * total) - used - activations - GRAPH_BYTES
    log.info(
        "memory: %.1f GB of %.1f GB are used by weights and context, %.1f GB go to activations, %.1f GB to graphs, "
        "%.1f GB to the KV cache",
        used / 1e9, share * total / 1e9, activations / 1e9, GRAPH_BYTES / 1e9, budget / 1e9,
    )  # fmt: skip
    if budget <= 0:
        raise ValueError(
            f"weights and activations need {(used + activations) / 1e9:.1f} GB, more than cache.memory_fraction = "
            f"{memory_fraction:g} of {share * total / 1e9:.1f} GB: use more stages, fewer bits, or a larger fraction"
        )
    return budget


def used_bytes(free: int, total: int, own: int, share: float) -> int:
    """Of this stage's share: who has the whole GPU counts whatever lives there, who shares it what is `own`.

    Neighbours fill their shares at the same time, so what is free now says nothing of what a share will hold.
    """
    return own if share < 1 else total - free


def _activation_bytes(
    group: DecoderGroup, max_num_seqs: int, max_num_batched_tokens: int, block_size: int, kv_dtype: torch.dtype | None
) -> list[int]:
    """What the largest step needs on each GPU beside weights and KV, and what is kept of every slot."""
    _synchronize(group)
    before = [torch.cuda.memory_allocated(device) for device in group.devices]
    num_blocks = -(-max_num_batched_tokens // block_size) + 1
    stage = Stage(group, num_blocks, block_size, max_num_seqs, kv_dtype)
    decoder = group.leader
    batch = _largest_batch(
        max_num_seqs, max_num_batched_tokens, block_size, len(decoder.rotary), num_blocks,
        decoder.config.vocab_size,
    )  # fmt: skip
    hidden = None
    if not decoder.stage.is_first:
        hidden = torch.zeros(stage.hidden_shape(batch), dtype=decoder.dtype, device=decoder.device)
    for device in group.devices:
        torch.cuda.reset_peak_memory_stats(device)
    stage.run(batch, hidden)
    _synchronize(group)
    held = [bytes_ + cache.num_bytes for bytes_, cache in zip(before, stage.caches, strict=True)]
    return [int(torch.cuda.max_memory_allocated(d)) - h for d, h in zip(group.devices, held, strict=True)]


def _synchronize(group: DecoderGroup) -> None:
    for device in group.devices:
        torch.cuda.synchronize(device)


def _largest_batch(
    max_num_seqs: int, max_num_batched_tokens: int, block_size: int, longest: int, num_blocks: int, vocab_size: int
) -> Batch:
    """As many samples as there can be, and as many tokens, those of prompts at the end of the longest contexts.

    What is computed does not matter, so contexts may share blocks, of which there are `num_blocks`.
    """
    decodes = max(0, min(max_num_seqs - 1, max_num_batched_tokens - 2))  # the rest is a prompt: it needs more
    rest = max_num_batched_tokens - decodes
    prompts = [min(longest, rest - start) for start in range(0, rest, longest)]
    lens = np.array([1] * decodes + prompts, np.int32)
    contexts = np.array([1] * decodes + [longest] * len(prompts), np.int32)
    seqs = np.arange(len(lens), dtype=np.int32)
    tables = -(-contexts // block_size)
    how = {"temperature": 1.0, "top_p": 0.9, "logprobs": MAX_LOGPROBS, "counts": True, "frequency": 0.5}
    rules = [Rules(slot, 0, **how) for slot in range(max_num_seqs)]  # type: ignore[arg-type]
    words = np.arange(min(vocab_size, longest), dtype=np.int32)
    rules[0] = msgspec.structs.replace(rules[0], output_ids=words)  # what one has seen is looked up for all
    return Batch(
        epoch=0,
        step_id=0,
        token_ids=np.zeros(lens.sum(), np.int32),
        query_lens=lens,
        num_computed_tokens=contexts - lens,
        slots=seqs % max_num_seqs,
        num_new_blocks=tables,
        new_blocks=np.arange(tables.sum(), dtype=np.int32) % num_blocks,
        tokens_from=-1,
        sample_rows=seqs,
        draws=seqs,
        rules=rules,
    )

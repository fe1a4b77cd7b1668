"""The message that says what a step computes, from the sequences that are in it."""

from operator import attrgetter

import numpy as np

from cluster.awaited_masks import Unmasked
from cluster.sequence import Sequence
from model.batch import SAMPLED, Batch, PromptRow, Rules


def in_order(decodes: list[Sequence], chunks: list[tuple[Sequence, int]]) -> tuple[list[Sequence], list[int]]:
    """The batch's sequences and how many tokens of each: single ones first, as Batch promises.

    Of those the longest contexts come first, which take longest: a GPU starts blocks in this order, and the last ones
    to start should not be the last ones to end.
    """
    singles = decodes + [seq for seq, count in chunks if count == 1]
    singles.sort(key=attrgetter("num_computed_tokens"), reverse=True)
    others = [(seq, count) for seq, count in chunks if count > 1]
    return singles + [seq for seq, _ in others], [1] * len(singles) + [count for _, count in others]


def build_batch(
    epoch: int, step_id: int, sequences: list[Sequence], counts: list[int], block_size: int
) -> tuple[Batch, list[Unmasked]]:
    """So many of the next tokens of each sequence, in the order of `in_order`; and the rows whose masks are not known.

    Of their block tables only what this step is the first to use: the stages keep the rest.
    """
    token_ids: list[int] = []
    num_new_blocks: list[int] = []
    new_blocks: list[int] = []
    sample_rows: list[int] = []
    draws: list[int] = []
    rules: list[Rules] = []
    masks: dict[int, bytes] = {}
    prompt_rows: list[PromptRow] = []
    unmasked: list[Unmasked] = []
    tokens_from = -1
    for row, (seq, count) in enumerate(zip(sequences, counts, strict=True)):
        start = seq.num_computed_tokens
        known = -(-start // block_size) if seq.last_step >= 0 else 0  # what a step before has used
        used = -(-(start + count) // block_size)
        num_new_blocks.append(used - known)
        if used > known:
            new_blocks += seq.block_table[known:used]
        if seq.num_pending_tokens:
            token_ids.append(SAMPLED)
            if seq.last_step > tokens_from:
                tokens_from = seq.last_step
        else:
            token_ids += seq.token_ids[start : start + count]
        if count == seq.num_uncomputed_tokens:
            if not seq.is_greedy:
                draws.append(len(sample_rows))
                if not seq.has_rules:
                    seq.has_rules = True
                    rules.append(_rules(seq))
                if seq.matcher is not None:
                    mask = seq.mask  # read once: another thread makes it
                    if mask is None:
                        unmasked.append(Unmasked(len(sample_rows), seq, seq.num_tokens + seq.num_pending_tokens))
                    else:
                        masks[len(sample_rows)] = mask
            sample_rows.append(row)
        if seq.prompt_logprobs is not None and start < seq.num_prompt_tokens:
            prompt_rows.append(_prompt_row(row, seq, start + count))
    batch = Batch(
        epoch=epoch,
        step_id=step_id,
        token_ids=np.array(token_ids, np.int32),
        query_lens=np.array(counts, np.int32),
        num_computed_tokens=np.array([seq.num_computed_tokens for seq in sequences], np.int32),
        slots=np.array([seq.slot for seq in sequences], np.int32),
        num_new_blocks=np.array(num_new_blocks, np.int32),
        new_blocks=np.array(new_blocks, np.int32),
        tokens_from=tokens_from,
        sample_rows=np.array(sample_rows, np.int32),
        draws=np.array(draws, np.int32),
        rules=rules,
        masks=masks,
        awaited=[one.row for one in unmasked],
        prompt_rows=prompt_rows,
    )
    return batch, unmasked


def _prompt_row(row: int, seq: Sequence, stop: int) -> PromptRow:
    """Of a chunk that ends before token `stop`."""
    wanted = seq.request.sampling.prompt_logprobs
    assert wanted is not None
    return PromptRow(row, seq.token_ids[stop] if stop < seq.num_prompt_tokens else SAMPLED, wanted)


def _rules(seq: Sequence) -> Rules:
    """Of a sequence whose tokens are all known, as they are when its first one in this slot is drawn."""
    p = seq.request.sampling
    prompt = seq.token_ids[: seq.num_prompt_tokens] if p.repetition_penalty != 1.0 else []
    output = seq.token_ids[seq.num_prompt_tokens :] if p.needs_counts else []
    return Rules(
        slot=seq.slot,
        seed=p.seed,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        logprobs=-1 if p.logprobs is None else p.logprobs,
        logit_bias=p.logit_bias,
        banned=p.stop_token_ids if p.min_tokens else (),
        banned_until=seq.num_prompt_tokens + p.min_tokens,
        counts=p.needs_counts,
        repetition=p.repetition_penalty,
        presence=p.presence_penalty,
        frequency=p.frequency_penalty,
        prompt_ids=np.array(list(set(prompt)), np.int32),
        output_ids=np.array(output, np.int32),
    )

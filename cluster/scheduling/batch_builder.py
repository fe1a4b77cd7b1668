"""The message that says what a step computes, from the sequences that are in it."""

import numpy as np

from cluster.scheduling.awaited_masks import Unmasked
from cluster.scheduling.running import Running, Slots, places
from cluster.scheduling.sequence import Sequence
from model.batch import SAMPLED, Batch, Int32Array, PromptRow, Rules


def in_order(running: Running, decodes: Slots, chunks: list[tuple[Sequence, int]]) -> tuple[Slots, Int32Array]:
    """The batch's sequences, by slot, and how many tokens of each: runs of one come first, as Batch promises.

    Of those the longest contexts come first, which take longest: a GPU starts blocks in this order, and the last ones
    to start should not be the last ones to end.
    """
    singles = np.array([seq.slot for seq, count in chunks if count == 1], np.intp)
    singles = np.concatenate((decodes, singles)) if len(singles) else decodes
    singles = singles[(-running.num_computed[singles]).argsort(kind="stable")]
    others = [(seq.slot, count) for seq, count in chunks if count > 1]
    counts = np.ones(len(singles) + len(others), np.int32)
    if running.drafts:
        counts[: len(singles)] += running.num_drafted[singles]
    if not others:
        return singles, counts
    counts[len(singles) :] = [count for _, count in others]
    return np.concatenate((singles, np.array([slot for slot, _ in others], np.intp))), counts


def build_batch(
    epoch: int,
    step_id: int,
    running: Running,
    slots: Slots,
    counts: Int32Array,
    block_size: int,
    drafts: dict[int, list[int]],
) -> tuple[Batch, list[Unmasked]]:
    """So many of the next tokens of each sequence, in the order of `in_order`; and the rows whose masks are not known.

    Of their block tables only what this step is the first to use: the stages keep the rest. `drafts`: by slot, what
    may follow the newest token.
    """
    start, known = running.num_computed[slots], running.num_known[slots]
    if drafts:
        slots, counts, start, known = _one_by_one(slots, counts, start, known, drafts)
    pending, last_step = running.num_pending[slots], running.last_step[slots]
    left = known + pending - start
    num_new_blocks, new_blocks = _new_blocks(running, slots, start, counts, block_size)
    token_ids = np.where(pending > 0, SAMPLED, running.newest[slots])
    if drafts:
        _put_drafts(token_ids, slots, drafts)
    sample_rows = places(counts == left)
    sampled = slots[sample_rows]
    draws = places(running.has_rules[sampled])
    rules = _tell_rules(running, sampled[draws]) if len(draws) else []
    masks, unmasked = _masks(running, sampled) if running.num_constrained else ({}, [])
    if len(prefills := places(left > 1)):
        pieces = [token_ids[i : i + 1] for i in range(len(slots))]
        for row in prefills.tolist():
            tokens = running.sequences[slots[row]].token_ids[start[row] : start[row] + counts[row]]
            pieces[row] = np.array(tokens, np.int32)
        token_ids = np.concatenate(pieces)
    prompt_rows: list[PromptRow] = []
    for row in places(~running.is_plain[slots]).tolist():
        seq = running.sequences[slots[row]]
        if seq.prompt_logprobs is not None and start[row] < seq.num_prompt_tokens:
            prompt_rows.append(_prompt_row(row, seq, int(start[row] + counts[row])))
    adapters = running.adapter_slots[slots]
    batch = Batch(
        epoch=epoch,
        step_id=step_id,
        token_ids=token_ids,
        query_lens=counts,
        num_computed_tokens=start,
        slots=slots.astype(np.int32),
        num_new_blocks=num_new_blocks,
        new_blocks=np.array(new_blocks, np.int32),
        tokens_from=int(last_step[pending > 0].max()) if pending.any() else -1,
        sample_rows=sample_rows.astype(np.int32),
        draws=draws.astype(np.int32),
        rules=rules,
        masks=masks,
        awaited=[one.row for one in unmasked],
        prompt_rows=prompt_rows,
        adapters=adapters if adapters.any() else adapters[:0],
        placed=running.adapters.take_placed(),
    )
    return batch, unmasked


def _one_by_one(
    slots: Slots, counts: Int32Array, start: Int32Array, known: Int32Array, drafts: dict[int, list[int]]
) -> tuple[Slots, Int32Array, Int32Array, Int32Array]:
    """The same with a run for each token of those that are drafted: as if all before it were known."""
    is_drafted = np.isin(slots, list(drafts))
    runs = np.where(is_drafted, counts, 1)
    each = np.repeat(np.arange(len(slots)), runs)
    before = np.arange(len(each), dtype=np.int32) - np.repeat(np.cumsum(runs) - runs, runs).astype(np.int32)
    counts = np.where(is_drafted, 1, counts).astype(np.int32)
    return slots[each], counts[each], start[each] + before, known[each] + before


def _put_drafts(token_ids: Int32Array, slots: Slots, drafts: dict[int, list[int]]) -> None:
    """Behind the newest token of each, into the first token of every run."""
    for slot, draft in drafts.items():
        first = int((slots == slot).argmax()) + 1
        token_ids[first : first + len(draft)] = draft


def _new_blocks(
    running: Running, slots: Slots, start: Int32Array, counts: Int32Array, block_size: int
) -> tuple[Int32Array, list[int]]:
    """How many blocks each sequence is the first to use, and which."""
    at_end = start % block_size == 0  # of a block: one token more needs another one
    num_new = at_end.astype(np.int32)
    blocks: list[int] = []
    rows = places(at_end | (counts > 1))
    stops = -(-(start[rows] + counts[rows]) // block_size)
    known = -(-start[rows] // block_size)
    known[running.last_step[slots[rows]] < 0] = 0  # a cached prefix is new too
    num_new[rows] = stops - known
    for seq, i, j in zip(running.sequences[slots[rows]].tolist(), known.tolist(), stops.tolist(), strict=True):
        blocks += seq.block_table[i:j]
    return num_new, blocks


def _tell_rules(running: Running, slots: Slots) -> list[Rules]:
    """Those of sequences that the last stage does not know yet."""
    new = slots[~running.rules_told[slots]]
    running.rules_told[new] = True
    return [_rules(seq) for seq in running.sequences[new]]


def _masks(running: Running, slots: Slots) -> tuple[dict[int, bytes], list[Unmasked]]:
    """Of the sequences that are sampled: by row those that are known, and those that are not."""
    masks: dict[int, bytes] = {}
    unmasked: list[Unmasked] = []
    for row, slot in enumerate(slots.tolist()):
        seq = running.sequences[slot]
        if seq.matcher is not None:
            pending = int(running.num_pending[slot])
            mask = None if pending else seq.mask  # read once: another thread makes it
            if mask is None:
                unmasked.append(Unmasked(row, seq, seq.num_tokens + pending))
            else:
                masks[row] = mask
    return masks, unmasked


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

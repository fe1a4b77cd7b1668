"""What captured steps compute: batches taken apart into single tokens and pieces, on a CPU without a graph."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from model.attention import packed_tokens, pieces_of
from model.batch import SAMPLED, Batch, PromptRow, Rules
from model.graphs import (
    MIXED_PROMPTS,
    MIXED_TOKENS,
    Decoded,
    StepGraphs,
    decode_buckets,
    keys_read_by_pieces,
    mixed_buckets,
)
from model.kernels import Tokens, piece_tokens
from model.kernels.reference import ReferenceKernels
from model.memory import _largest_batch
from model.sampling import Sampled
from model.slots import Slots
from model.stage import Stage
from tests.conftest import ints, make_stages

NO_SLOT = 64


def steps(rules: list[Rules]) -> list[Batch]:
    """Two prompts; then one goes on, one is in the middle, and another comes whole; then all three decode.

    In blocks of 4: the first sequence has 0 to 7, the second 8 to 15, the third 16 to 23.
    """
    prompt = np.arange(30, dtype=np.int32) * 7 % 300
    slots, all_, new, drawn = ints(3, 9, 4), ints(0, 1, 2), ints(0, 1, 2), ints(1) if rules else ints()
    first, mixed = ints(0, 1, 8, 9, 10), np.concatenate(([SAMPLED], prompt[:13])).astype(np.int32)
    return [
        Batch(0, 0, prompt[:15], ints(5, 10), ints(0, 0), slots[:2], ints(2, 3), first, -1, ints(0)),
        Batch(0, 1, mixed, ints(1, 6, 7), ints(5, 10, 0), slots, new, ints(11, 16, 17), 0, all_, drawn, rules),
        Batch(0, 2, ints(*[SAMPLED] * 3), ints(1, 1, 1), ints(6, 16, 7), slots, ints(0, 1, 0), ints(12), 1, all_),
    ]  # fmt: skip


def run(stages: list[Stage], rules: list[Rules]) -> list[tuple[list[int], dict[int, float]]]:
    """Token ids and logprobs of each step."""
    found = []
    for batch in steps(rules):
        result = None
        for stage in stages:
            result = stage.run(batch, result)
        assert isinstance(result, Sampled)
        if len(stages) > 1:
            stages[0].feed(batch, result.token_ids)
        found.append((result.token_ids.tolist(), {i: lp.chosen for i, lp in result.row_logprobs().items()}))
    return found


def assert_equal(
    found: list[tuple[list[int], dict[int, float]]], expected: list[tuple[list[int], dict[int, float]]]
) -> None:
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


RULES = [[], [Rules(9, 7, 1.0, logprobs=3)]]


class Recorder:
    """In place of a graph: computes again what would have been captured, into the same tensors."""

    def __init__(self, step: Callable[[], Decoded]) -> None:
        self._step, self.done = step, step()

    def replay(self) -> None:
        done = self._step()
        self.done.out.copy_(done.out)
        if self.done.likeliest is not None and done.likeliest is not None:
            self.done.likeliest.copy_(done.likeliest)


class Uncaptured(StepGraphs):
    """The same steps on any device."""

    def _capture(self, size: int, mixed: bool, adapted: bool, pool: Any) -> tuple[Any, Decoded]:
        recorder = Recorder(lambda: self._step(size, mixed, adapted))
        return recorder, recorder.done


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("count", [1, 2])
def test_captured_steps_give_the_tokens_of_eager_ones(count: int, rules: list[Rules]) -> None:
    """Padding, pieces, slots and all; only the capturing itself is left out."""
    stages = make_stages(stages=count)
    for stage in stages:
        with torch.inference_mode():
            stage._graphs = Uncaptured(stage.decoder, stage.kv, stage.slots, 64)
        assert all(stage._graphs.take(batch) for batch in steps(rules))
    assert_equal(run(stages, rules), run(make_stages(stages=count), rules))


def test_steps_that_are_too_much_for_a_captured_one_are_left_out() -> None:
    (stage,) = make_stages()
    with torch.inference_mode():
        graphs = Uncaptured(stage.decoder, stage.kv, stage.slots, 32)
    _, mixed, decode = steps([])
    many = np.zeros(33, np.int32)
    assert graphs.take(mixed)
    assert not graphs.take(msgspec.structs.replace(mixed, prompt_rows=[PromptRow(1, 5, 0)]))
    assert not graphs.take(msgspec.structs.replace(mixed, token_ids=many, query_lens=ints(1, 6, 26)))
    assert graphs.take(decode)
    assert not graphs.take(msgspec.structs.replace(mixed, num_computed_tokens=ints(5, 10**7, 0)))
    with torch.inference_mode():
        roomy = Uncaptured(stage.decoder, stage.kv, stage.slots, 256)
    for count in (MIXED_PROMPTS, MIXED_PROMPTS + 1):
        twos, none = np.full(count, 2, np.int32), np.zeros(count, np.int32)
        prompts = Batch(0, 0, np.zeros(2 * count, np.int32), twos, none, none, none, none[:0], -1, none)
        assert roomy.take(prompts) == (count == MIXED_PROMPTS)


def test_pieces_begin_with_their_sequence() -> None:
    """Single tokens are in none; of others at most so many go together."""
    for lens, most, expected in (
        (ints(1, 1, 5, 1, 4, 2), 4, [[2, 6, 8, 12], [4, 1, 4, 2]]),
        (ints(1, 1), 4, [[], []]),
        (ints(3), 1, [[0, 1, 2], [1, 1, 1]]),
    ):
        assert [part.tolist() for part in pieces_of(lens, most)] == expected


@pytest.mark.parametrize("most", [1, 8, 64])
def test_there_is_room_for_all_pieces_that_may_come(most: int) -> None:
    """So many prompts with one token more than fills their pieces."""
    lens = np.full(MIXED_PROMPTS, most + 1, np.int32)
    room = int(lens.sum()) // most + MIXED_PROMPTS
    assert len(pieces_of(lens, most)[1]) == 2 * MIXED_PROMPTS <= room


@pytest.mark.parametrize(("groups", "tokens"), [(1, 64), (2, 32), (3, 16), (8, 8), (64, 1), (71, 1)])
def test_a_piece_fills_a_tile_with_queries(groups: int, tokens: int) -> None:
    assert piece_tokens(groups, 64) == tokens


@pytest.mark.parametrize("room", [14, 20])
def test_a_step_token_by_token(room: int) -> None:
    """A captured step writes the likeliest token to a slot for every token: a prompt's middle must not have one."""
    first, second, _ = steps([])
    slots = Slots(NO_SLOT, 8, 4, 99, torch.device("cpu"))
    slots.newest[3] = 77
    for batch in (first, second):
        slots.extend(batch)
    tokens = Tokens.empty(room, torch.device("cpu"))
    packed = torch.from_numpy(np.concatenate(packed_tokens(second)))
    ReferenceKernels().unpack_tokens(packed, slots.newest, slots.tables, 4, tokens)
    more, none = room - 14, [0] * (room - 14)
    assert tokens.ids.tolist() == [77, *second.token_ids[1:].tolist(), *none]
    assert tokens.positions.tolist() == [5, *range(10, 16), *range(7), *none]
    assert tokens.context_lens.tolist() == [6, *range(11, 17), *range(1, 8), *none]
    assert tokens.cells.tolist() == [5, *range(42, 48), *range(64, 71), *[99 * 4] * more]
    assert tokens.slots.tolist() == [3] + [9] * 6 + [4] * 7 + [NO_SLOT] * more
    assert tokens.sampled_slots.tolist() == [3] + [NO_SLOT] * 5 + [9] + [NO_SLOT] * 6 + [4] + [NO_SLOT] * more
    assert tokens.lone_lens.tolist() == [6] + [0] * (13 + more)


def test_tables_grow_by_what_is_new() -> None:
    """And are the next sequence's from its first block on, whoever had the slot before."""
    slots = Slots(NO_SLOT, 8, 4, 99, torch.device("cpu"))
    for batch in steps([]):
        slots.extend(batch)
    assert [slots.tables[slot, :n].tolist() for slot, n in ((3, 2), (9, 5), (4, 2))] == [
        [0, 1], [8, 9, 10, 11, 12], [16, 17],
    ]  # fmt: skip
    assert slots.tables[NO_SLOT].tolist() == [99] * 8
    slots.extend(msgspec.structs.replace(Batch.of_one(ints(*range(9)), 4), slots=ints(9), new_blocks=ints(5, 6, 7)))
    assert slots.tables[9, :5].tolist() == [5, 6, 7, 11, 12]


def test_a_piece_reads_its_keys_once() -> None:
    first, second, third = steps([])
    assert keys_read_by_pieces(first, 8) == 1 * 6 + 2 * 9
    assert keys_read_by_pieces(second, 8) == (10 + 7) + 7
    assert keys_read_by_pieces(third, 8) == 0


def test_what_is_not_captured_is_loaded_before_traffic() -> None:
    """A decode and a prompt, in nobody's block and slot."""
    for stage in make_stages(stages=2):
        kept = [cache[:-1].clone() for cache in (*stage.kv.k, *stage.kv.v) if isinstance(cache, torch.Tensor)]
        stage.slots.newest.fill_(7)
        with torch.inference_mode():
            stage._run_eagerly_once()
        now = [cache for cache in (*stage.kv.k, *stage.kv.v) if isinstance(cache, torch.Tensor)]
        assert all(torch.equal(a, b[:-1]) for a, b in zip(kept, now, strict=True))
        assert any(bool(cache[-1].any()) for cache in now) == stage.layers.is_first  # the other one is given zeros
        assert stage.slots.newest[:-1].eq(7).all()


def test_capturing_begins_with_a_step_that_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = make_stages()
    seen: list[bool] = []
    eager = stage._eager
    monkeypatch.setattr("model.stage.StepGraphs", Uncaptured)
    monkeypatch.setattr(
        stage, "_eager", lambda step, x: seen.append(bool((step.query_lens > 1).any())) or eager(step, x)
    )
    stage.capture(64, lambda done, total: None)
    assert seen == [True, True]  # a prompt from its beginning, and one that goes on


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(512, 512), (8, 2), (1, 1), (64, 512), (512, 64)])
def test_memory_is_left_for_a_step_with_decodes_and_a_prompt(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    batch = _largest_batch(max_num_seqs, max_num_batched_tokens, 16, 2048, 40, 300)
    assert batch.num_tokens == max_num_batched_tokens
    assert (batch.query_lens > 1).any() or max_num_batched_tokens == 1
    assert batch.num_seqs >= min(max_num_seqs, max_num_batched_tokens - 1)
    assert (batch.num_computed_tokens + batch.query_lens).max() == 2048, "contexts are read, too"


@pytest.mark.parametrize("most", [1, 2, 7, 20, 64, 256, 300, 512, 768])
def test_buckets_end_with_what_may_come(most: int) -> None:
    for sizes, last in ((decode_buckets(most), most), (mixed_buckets(most), min(most, MIXED_TOKENS))):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == last
        assert all(b - a <= 32 for a, b in pairwise(sizes))

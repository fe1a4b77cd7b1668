"""What captured steps compute: batches taken apart into single tokens, on a CPU without a graph."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from model.batch import SAMPLED, Batch, SampleRow
from model.graphs import MIXED_TOKENS, buckets, tokens_read_again
from model.memory import _largest_batch
from model.sampling import Sampled
from tests.conftest import make_stages

NO_SLOT = 64


def ints(*values: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.array(values, np.int32)


def steps(draws: list[SampleRow]) -> list[Batch]:
    """Two prompts; then one goes on, one is in the middle, and another comes whole; then all three decode."""
    prompt = np.arange(30, dtype=np.int32) * 7 % 300
    tables = np.arange(24, dtype=np.int32)
    return [
        Batch(0, 0, prompt[:15], ints(5, 10), ints(0, 0), tables[:16], ints(3, 9), -1, ints(0), []),
        Batch(
            0, 1, np.concatenate(([SAMPLED], prompt[:13])).astype(np.int32), ints(1, 6, 7), ints(5, 10, 0), tables,
            ints(3, 9, 4), 0, ints(0, 1, 2), draws,
        ),
        Batch(0, 2, ints(*[SAMPLED] * 3), ints(1, 1, 1), ints(6, 16, 7), tables, ints(3, 9, 4), 1, ints(0, 1, 2), []),
    ]  # fmt: skip


@pytest.mark.parametrize("draws", [[], [SampleRow(1, 0.7, 1.0, 0, 1.0, 0.0, logprobs=3)]])
@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_taken_apart_gives_the_same_tokens(count: int, draws: list[SampleRow]) -> None:
    found = []
    for apart in (False, True):
        stages, tokens = make_stages(stages=count), []
        for batch in steps(draws):
            step, result = batch.one_by_one(NO_SLOT) if apart else batch, None
            for stage in stages:
                result = stage.run(step, result)
            assert isinstance(result, Sampled)
            if count > 1:
                stages[0].feed(step, result.token_ids)
            tokens.append((result.token_ids.tolist(), {i: lp.chosen for i, lp in result.host_logprobs().items()}))
        found.append(tokens)
    together, apart_ = found
    assert [ids for ids, _ in together] == [ids for ids, _ in apart_]
    for (_, a), (_, b) in zip(together, apart_, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_what_nothing_is_sampled_after_keeps_no_slot() -> None:
    """A captured step writes the likeliest token to the slot of every row: a prompt's middle must not be one."""
    first, second, third = steps([])
    assert first.one_by_one(NO_SLOT).slots.tolist() == [NO_SLOT] * 4 + [3] + [NO_SLOT] * 10
    apart = second.one_by_one(NO_SLOT)
    assert apart.slots.tolist() == [3] + [NO_SLOT] * 5 + [9] + [NO_SLOT] * 6 + [4]
    assert apart.num_computed_tokens.tolist() == [5, *range(10, 16), *range(7)]
    assert apart.sample_rows.tolist() == [0, 6, 13]
    assert third.one_by_one(NO_SLOT) is third


def test_keys_are_read_again_by_tokens_of_prompts_alone() -> None:
    first, second, third = steps([])
    assert tokens_read_again(first) == sum(range(1, 6)) + sum(range(1, 11))
    assert tokens_read_again(second) == sum(range(11, 17)) + sum(range(1, 8))
    assert tokens_read_again(third) == 0


def test_what_is_not_captured_is_loaded_before_traffic() -> None:
    """A decode and a prompt, in nobody's block and slot."""
    for stage in make_stages(stages=2):
        kept = [cache[:-1].clone() for cache in (*stage.kv.k, *stage.kv.v) if isinstance(cache, torch.Tensor)]
        stage._newest.fill_(7)
        with torch.inference_mode():
            stage._run_eagerly_once()
        now = [cache for cache in (*stage.kv.k, *stage.kv.v) if isinstance(cache, torch.Tensor)]
        assert all(torch.equal(a, b[:-1]) for a, b in zip(kept, now, strict=True))
        assert any(bool(cache[-1].any()) for cache in now) == stage.layers.is_first  # the other one is given zeros
        assert stage._newest[:-1].eq(7).all()


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(512, 512), (8, 2), (1, 1), (64, 512), (512, 64)])
def test_memory_is_left_for_a_step_with_decodes_and_a_prompt(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    batch = _largest_batch(max_num_seqs, max_num_batched_tokens, 16, 2048)
    assert batch.num_tokens == max_num_batched_tokens
    assert (batch.query_lens > 1).any() or max_num_batched_tokens == 1
    assert batch.num_seqs >= min(max_num_seqs, max_num_batched_tokens - 1)


@pytest.mark.parametrize("max_num_seqs", [1, 7, 20, 64, 256, 300, 512, 768])
@pytest.mark.parametrize("max_num_batched_tokens", [1, 64, 500, 2048])
def test_buckets_end_with_what_may_come(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    sizes = buckets(max_num_seqs, max_num_batched_tokens)
    assert sizes == sorted(set(sizes))
    assert {1, max_num_seqs} <= set(sizes)
    assert sizes[-1] == max(max_num_seqs, min(max_num_batched_tokens, MIXED_TOKENS))
    assert all(b - a <= 64 for a, b in pairwise(sizes))

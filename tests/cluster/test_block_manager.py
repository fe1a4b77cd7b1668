"""The books of the KV cache: references, prefix hits, eviction."""

import random

import msgspec
import pytest

from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.prefix import Chain
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Sequence
from model.batch import StepOutput
from tests.conftest import request


def sequence(token_ids: list[int]) -> Sequence:
    return Sequence(request("s", token_ids), 0)


def cached_prefix(blocks: BlockManager, token_ids: list[int]) -> list[int]:
    seq = sequence(token_ids)
    blocks.look_up(seq)
    found: list[int] = seq.found.blocks.tolist()
    return found


def computed(blocks: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence admitted as the scheduler does it, all of its tokens computed."""
    seq = sequence(token_ids)
    prefix = cached_prefix(blocks, token_ids)
    assert blocks.can_allocate(prefix, len(token_ids))
    blocks.allocate(seq, prefix, len(token_ids))
    blocks.mark_computed(seq, len(token_ids))
    return seq


def test_equal_beginnings_share_blocks() -> None:
    blocks = BlockManager(16, 4)
    first = computed(blocks, [*range(10)])
    second = computed(blocks, [*range(8), 50, 51])
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    blocks.check([first, second])
    assert blocks.num_free == 16 - 4
    blocks.free(first)
    blocks.check([second])
    assert cached_prefix(blocks, [*range(12)]) == second.block_table[:2]


def test_at_least_one_token_is_left_to_compute() -> None:
    blocks = BlockManager(16, 4)
    seq = computed(blocks, [*range(8)])
    assert cached_prefix(blocks, [*range(8)]) == seq.block_table[:1]
    assert cached_prefix(blocks, [*range(9)]) == seq.block_table[:2]


def test_the_same_tokens_after_other_tokens_are_another_block() -> None:
    blocks = BlockManager(16, 4)
    computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 0])
    assert cached_prefix(blocks, [9, 9, 9, 9, 5, 6, 7, 8, 0]) == []
    assert cached_prefix(blocks, [5, 6, 7, 8, 0]) == []


def test_freed_content_is_found_until_its_room_is_needed() -> None:
    blocks = BlockManager(4, 4)
    old = computed(blocks, [*range(9)])
    blocks.free(old)
    assert blocks.num_free == 4
    assert len(cached_prefix(blocks, [*range(9)])) == 2
    new = computed(blocks, [*range(100, 116)])
    assert cached_prefix(blocks, [*range(9)]) == []
    blocks.check([new])
    assert not blocks.can_allocate([], 1)


def test_an_idle_prefix_counts_as_room_taken() -> None:
    blocks = BlockManager(4, 4)
    blocks.free(computed(blocks, [*range(16)]))
    prefix = cached_prefix(blocks, [*range(12), *range(50, 58)])
    assert len(prefix) == 3
    assert not blocks.can_allocate(prefix, 20)
    assert blocks.can_allocate(prefix, 16)


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(8, 4, prefix_caching=False)
    computed(blocks, [*range(9)])
    assert cached_prefix(blocks, [*range(9)]) == []


@pytest.mark.parametrize("seed", range(8))
def test_the_books_balance_whatever_happens(seed: int) -> None:
    """Random arrivals of several tenants with shared beginnings, aborts, results and losses on a small cache."""
    rng = random.Random(seed)
    scheduler = Scheduler(
        BlockManager(24, 4), depth=rng.randint(1, 3), max_num_seqs=6, max_num_batched_tokens=rng.choice([5, 32]),
        max_model_len=64,
    )  # fmt: skip
    in_flight, alive = [], []
    for i in range(1500):
        action = rng.random()
        if action < 0.2:
            prompt = [*range(rng.randrange(30))] + [rng.randrange(300) for _ in range(rng.randint(1, 12))]
            whose = {
                "tenant": rng.choice("abc"),
                "weight": rng.choice([1.0, 2.0]),
                "priority": rng.choice([0, 0, 0, 5]),
            }
            new = request(str(i), prompt, max_tokens=rng.randint(1, 20))
            scheduler.add(msgspec.structs.replace(new, **whose))
            alive.append(str(i))
        elif action < 0.25 and alive:
            scheduler.abort(alive.pop(rng.randrange(len(alive))))
        elif action < 0.26:
            scheduler.restart()
            in_flight.clear()
        elif action < 0.65 and len(in_flight) <= scheduler.depth:
            batch = scheduler.schedule()
            if batch is not None:
                in_flight.append(batch)
        elif in_flight:
            batch = in_flight.pop(0)
            n = len(batch.sample_rows)
            tokens = [rng.randrange(300) for _ in range(n)]
            scheduler.update(batch, StepOutput(batch.epoch, batch.step_id, tokens, {}))
        scheduler.check()
    for name in alive:
        scheduler.abort(name)
    scheduler.check()
    assert scheduler.stats().kv_blocks_used == 0


def test_a_cached_prompt_that_waits_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until something changes: what is evicted is no longer found, what is computed meanwhile is."""
    blocks, prompt = BlockManager(400, 4), [*range(1001)]
    owner = computed(blocks, prompt)
    waiting, lookups = sequence([*range(1000), 5, 6, 7]), [0]
    table, hashed = owner.block_table, Chain.hash
    monkeypatch.setattr(Chain, "hash", lambda *a: (lookups.__setitem__(0, lookups[0] + 1), hashed(*a))[1])
    blocks.look_up(waiting)
    assert (waiting.found.blocks.tolist(), lookups[0]) == (table[:250], 250)
    for _ in range(10):
        blocks.look_up(waiting)
    assert lookups[0] <= 260
    blocks.free(owner)
    thief = computed(blocks, [7] * 4 * 200)
    blocks.look_up(waiting)
    assert waiting.found.blocks.tolist() == cached_prefix(blocks, waiting.token_ids) == table[:200]
    blocks.free(thief)

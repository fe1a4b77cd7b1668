"""What a step sends: no more than what is new; and who may be in it: penalties make no difference."""

import pytest

from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.transport import StepOrder, encode
from model.batch import Batch, StepOutput
from tests.conftest import request

DEPTH = 4


def test_a_long_context_among_many_is_not_sent_again() -> None:
    """One of 99,000 tokens among 255 that decode: a step has less than 64 kB while it comes, and 8 afterwards."""
    scheduler = Scheduler(
        BlockManager(20_000, 16), depth=DEPTH, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=100_000
    )
    scheduler.add(request("long", [1] * 99_000, max_tokens=200))
    for i in range(255):
        scheduler.add(request(str(i), [i] * 64, max_tokens=200))
    in_flight: list[Batch] = []

    def step() -> Batch:
        while len(in_flight) <= DEPTH and (batch := scheduler.schedule()) is not None:
            in_flight.append(batch)
        batch = in_flight.pop(0)
        scheduler.update(batch, StepOutput(batch.epoch, batch.step_id, [5] * len(batch.sample_rows), {}))
        return batch

    def size(batch: Batch) -> int:
        return len(encode(StepOrder(batch, 1.0)))

    while (batch := step()).num_seqs < 64 or batch.num_tokens > batch.num_seqs:
        assert size(batch) < 64_000
    assert max(size(step()) for _ in range(20)) < 8_000


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_streams_with_penalties_are_scheduled_like_greedy_ones(depth: int) -> None:
    """A token ahead of what is known: what they count, the last stage counts. And a step says as little."""
    kinds: list[dict[str, float]] = [{}, {"presence_penalty": 0.5, "repetition_penalty": 1.1}, {"temperature": 1.0}]
    shapes = []
    for sampling in kinds:
        scheduler = Scheduler(
            BlockManager(2_000, 16), depth=depth, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
        )
        for i in range(64):
            scheduler.add(request(str(i), list(range(20 + i)), max_tokens=200, **sampling))
        in_flight: list[Batch] = []
        shapes.append(list[tuple[int, int]]())
        for step in range(150):
            while len(in_flight) <= depth and (batch := scheduler.schedule()) is not None:
                in_flight.append(batch)
                shapes[-1].append((batch.num_seqs, batch.num_tokens))
                assert step < 50 or len(encode(StepOrder(batch, 1.0))) < 4_000
            batch = in_flight.pop(0)
            scheduler.update(batch, StepOutput(batch.epoch, batch.step_id, [5] * len(batch.sample_rows), {}))
    assert shapes[0] == shapes[1] == shapes[2]

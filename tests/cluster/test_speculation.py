"""Drafted streams are those without drafts, token for token: whatever is asked of them, wherever they are computed."""

import random
from collections import deque
from functools import cache
from typing import Any

import numpy as np
import pytest

from cluster.engine import Engine
from cluster.local_pipeline import LocalPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.ngram import NgramDrafter, NgramProposer
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request, TokenEvent
from cluster.scheduling.speculation import Proposer
from cluster.scheduling.step_times import StepTimes
from model.batch import Batch, StepOutput
from ops.bench.engine.speculation import ReplayProposer
from tests.cluster.fake_stages import FakeMatcher
from tests.cluster.test_users_apart import CONFIG
from tests.conftest import DEVICES, Collector, make_stages, request

QUICK, ALL = 40, 1000  # requests
BLOCK, LONGEST = 4, 128


def a_request(seed: int) -> Request:
    """Of every kind; a prompt that repeats itself is drafted by n-grams too."""
    rng = random.Random(seed)
    part = [rng.randrange(3, CONFIG.vocab_size) for _ in range(rng.choice([1, 3, 9, 20]))]
    prompt = part * rng.choice([1, 2, 3])
    how: dict[str, Any] = {"seed": seed, "temperature": rng.choice([0.0, 0.0, 0.3, 0.9])}
    if rng.random() < 0.3:
        how[rng.choice(["presence_penalty", "frequency_penalty"])] = rng.choice([-1.0, 0.7])
    if rng.random() < 0.2:
        how["repetition_penalty"] = 1.3
    if rng.random() < 0.3:
        how["top_p"], how["top_k"], how["min_p"] = rng.choice([(0.9, 0, 0.0), (1.0, 5, 0.0), (1.0, 0, 0.1)])
    if rng.random() < 0.3:
        how["logprobs"] = rng.choice([0, 3])
    if rng.random() < 0.2:
        how["logit_bias"] = {rng.randrange(CONFIG.vocab_size): rng.choice([-5.0, 5.0]) for _ in range(3)}
    if rng.random() < 0.3:
        how["stop_token_ids"], how["min_tokens"] = tuple(rng.sample(range(CONFIG.vocab_size), 20)), rng.choice([0, 1])
    return request(str(seed), prompt, max_tokens=rng.choice([12, 25, 40, 60]) if seed % 5 else 1, **how)


Said = dict[str, list[TokenEvent]]


def run(
    count: int,
    proposer: Proposer | None,
    tokens: int | None = None,
    stages: int = 1,
    num_blocks: int = 2000,
    dies_at: int | None = None,
    device: str = "cpu",
) -> tuple[Said, Engine]:
    """What so many requests say; the last stage fails at step `dies_at`."""
    made = make_stages(CONFIG, stages, num_blocks=num_blocks, block_size=BLOCK, device=device)
    if dies_at is not None:
        _dies(made[-1], dies_at)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK), depth=stages, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=LONGEST
    )
    scheduler.speculate(proposer, tokens)
    collector = Collector()
    engine = Engine(scheduler, LocalPipeline(made), collector)
    engine.start()
    try:
        for seed in range(count):
            engine.add(a_request(seed))
        collector.wait([str(seed) for seed in range(count)], timeout=600)
    finally:
        engine.close()
    scheduler.check()
    assert scheduler.stats().kv_blocks_used == 0
    return collector.events, engine


def _dies(stage: Any, at: int) -> None:
    compute, steps = stage.compute, iter(range(10**9))

    def dying(*args: Any) -> Any:
        if next(steps) == at:
            raise RuntimeError("it dies")
        return compute(*args)

    stage.compute = dying


@cache
def plain(count: int, device: str = "cpu") -> Said:
    return run(count, None, device=device)[0]


def recorded(count: int, device: str = "cpu") -> dict[str, list[int]]:
    said = plain(count, device)
    return {str(i): [*a_request(i).token_ids, *(event.token_id for event in said[str(i)])] for i in range(count)}


def check(count: int, found: Said, device: str = "cpu") -> None:
    for name, expected in plain(count, device).items():
        assert [e.token_id for e in found[name]] == [e.token_id for e in expected], (
            f"request {name} says something else"
        )
        assert [e.finish_reason for e in found[name]] == [e.finish_reason for e in expected]
        for one, other in zip(found[name], expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [t for t, _ in one.top_logprobs or []] == [t for t, _ in other.top_logprobs or []]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize(("right", "tokens"), [(0.7, 4), (1.0, 16), (0.0, 3), (0.8, None)])
def test_replayed_drafts_change_nothing(right: float, tokens: int | None, stages: int, device: str) -> None:
    found, engine = run(QUICK, ReplayProposer(recorded(QUICK, device), right), tokens, stages, device=device)
    check(QUICK, found, device)
    stats = engine.scheduler.stats()
    assert stats.accepted_tokens.total() >= sum(e.was_drafted for events in found.values() for e in events)
    if tokens is not None:
        assert stats.proposed_tokens[0] > 50
        assert abs(stats.accepted_tokens[0] / stats.proposed_tokens[0] - right) < 0.15


@pytest.mark.parametrize("stages", [1, 3])
def test_ngrams_change_nothing(stages: int) -> None:
    found, engine = run(QUICK, NgramProposer(), 4, stages)
    check(QUICK, found)
    assert engine.scheduler.stats().proposed_tokens.total() > 0


@pytest.mark.parametrize("stages", [1, 2])
def test_preempted_ones_say_the_same(stages: int) -> None:
    found, engine = run(QUICK, ReplayProposer(recorded(QUICK), 0.7), 4, stages, num_blocks=60)
    check(QUICK, found)
    assert engine.scheduler.stats().preemptions > 0
    assert engine.scheduler.stats().proposed_tokens.total() > 0


@pytest.mark.parametrize(("stages", "dies_at"), [(1, 12), (2, 25), (3, 3)])
def test_after_a_stage_died_they_say_the_same(stages: int, dies_at: int) -> None:
    found, engine = run(QUICK, ReplayProposer(recorded(QUICK), 0.7), 4, stages, dies_at=dies_at)
    check(QUICK, found)
    assert engine.scheduler.epoch == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_thousand_requests_say_the_same(stages: int) -> None:
    for proposer in (ReplayProposer(recorded(ALL), 0.7), NgramProposer()):
        found, _ = run(ALL, proposer, 4, stages, num_blocks=300, dies_at=200)
        check(ALL, found)


def test_constrained_ones_are_not_drafted() -> None:
    from tests.cluster.test_scheduler import Replay

    scheduler = Scheduler(BlockManager(20, 4), depth=1, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=40)
    scheduler.speculate(Replay({"a": [1] * 9, "b": [1] * 9}, 0.0, random.Random(1)), 4)
    scheduler.add(request("a", [1]), FakeMatcher([], 0.0, None))
    assert next(iter(scheduler._waiting)).drafter is None


def drafts(token_ids: list[int], most: int) -> list[int]:
    """As they are made while the tokens come one by one."""
    drafter = NgramDrafter()
    for count in range(1, len(token_ids)):
        drafter.draft(token_ids[:count], most)
    return drafter.draft(token_ids, most)


def test_ngrams_go_on_as_before() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    assert drafts(text, 4) == []
    assert drafts([*text, 2, 3], 4) == [], "two tokens are too few"
    assert drafts([*text, 2, 3, 4], 8) == [5, 6, 7], "no further than it has gone on already"
    assert drafts([*text, 1, 2, 3, 4, 5], 2) == [6, 7]
    assert drafts([*text, 2, 3, 4, 5, 9], 4) == [], "it has ended"
    assert drafts([9, 1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 3], 1) == [6], "the latest"
    assert drafts([7, 8] * 4, 5) == [7, 8, 7, 8, 7], "a repetition that catches up with itself"


def test_ngrams_of_a_long_prompt_are_found_little_by_little() -> None:
    prompt = [*range(10_000), 5000, 5001, 5002]
    drafter = NgramDrafter()
    assert drafter.draft(prompt, 3) == []
    for _ in range(4):
        drafter.draft(prompt, 3)
    assert drafter.draft(prompt, 3) == [5003, 5004, 5005]


def test_as_many_are_drafted_as_pay() -> None:
    times = StepTimes()
    assert times.best_length(1, 1, 0.9, 4) == 0, "first of all it must be known what is to be beaten"
    for _ in range(50):
        for tokens in range(1, 17):
            times.observe(tokens, 0.020)
    assert times.best_length(1, 1, 0.7, 4) == 4, "steps of more tokens take no longer"
    assert times.best_length(1, 1, 0.0, 4) == 0, "nothing is ever right"
    for _ in range(50):
        times.observe(64, 0.030)
        times.observe(320, 0.150)
    assert times.best_length(64, 64, 0.7, 4) == 0, "bound by arithmetic"


SIZES = [1, 5, 8, 16, 24, 32, 40, 48, 56, 64, 72, 96, 128, 136, 144, 192, 256, 512]  # tokens of a step
H200_MS = [17.9, 19.0, 18.2, 19.0, 19.3, 19.4, 19.9, 20.0, 20.6, 21.7, 22.4, 24.0, 26.5, 34.0, 34.0, 34.5, 34.5, 60.0]
HOST_S = 0.0006  # of schedule, and of update


def simulated_seconds(count: int, right: float | None, bound: bool = False) -> float:
    """Until so many streams are done on a device that takes as long as 70B in FP8 on an H200 (2026-12-01).

    With `bound` it takes as long as there are tokens: it is bound by arithmetic.
    """
    scheduler = Scheduler(
        BlockManager(10 * count, 16, False), depth=1, max_num_seqs=256, max_num_batched_tokens=512, max_model_len=160
    )
    requests = [request(str(i), [1] * 8, max_tokens=100, seed=i) for i in range(count)]
    recorded = {r.request_id: [*r.token_ids, *[100] * 100] for r in requests}
    scheduler.speculate(ReplayProposer(recorded, right) if right is not None else None)
    for one in requests:
        scheduler.add(one)
    now = free = last = 0.0
    in_flight: deque[tuple[Batch, float]] = deque()
    while scheduler.has_work or in_flight:
        while len(in_flight) < 2 and (batch := scheduler.schedule()) is not None:
            last = last if in_flight else now
            now += HOST_S
            step_ms = float(np.interp(batch.num_tokens, SIZES, H200_MS)) if not bound else 0.3 * batch.num_tokens
            free = max(now, free) + step_ms / 1000
            in_flight.append((batch, free))
        batch, ended = in_flight.popleft()
        now = max(now, ended)
        if scheduler.speculation is not None and batch.num_tokens == batch.num_seqs:
            scheduler.speculation.times.observe(batch.num_tokens, now - last)
        scheduler.update(batch, StepOutput(batch.epoch, batch.step_id, [100] * len(batch.sample_rows), {}))
        now += HOST_S
        last = now
    return now


@pytest.mark.parametrize(("count", "most"), [(1, 0.45), (8, 0.55), (64, 0.9), (128, 1.0)])
def test_drafts_pay_or_are_left(count: int, most: float) -> None:
    without = simulated_seconds(count, None)
    assert simulated_seconds(count, 0.7) < most * without
    assert simulated_seconds(count, 0.0) < 1.03 * without, "nothing is ever right"


def test_drafts_are_left_where_each_token_takes_its_time() -> None:
    assert simulated_seconds(16, 0.7, bound=True) < 1.03 * simulated_seconds(16, None, bound=True)

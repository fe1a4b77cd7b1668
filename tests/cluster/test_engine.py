"""The same tokens, however they are computed: stages, chunks, preemption, prefix hits, company, aborts."""

import random
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from cluster.engine import Engine
from cluster.errors import EngineStopped, RequestRejected, StageDied
from cluster.local_pipeline import LocalPipeline
from cluster.patience import Patience
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from model.batch import Batch, Rules
from tests.conftest import TINY, Collector, MakeEngine, ints, make_stages, request

PROMPTS = [
    [random.Random(i).randrange(3, TINY.vocab_size) for _ in range(n)] for i, n in enumerate([1, 2, 5, 16, 17, 63, 100])
]


def naive(prompt: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
    """Every token from a forward pass over the whole sequence with an empty cache."""
    (stage,) = make_stages(num_blocks=64)
    tokens = list(prompt)
    for _ in range(count):
        batch = Batch.of_one(np.array(tokens, np.int32), stage.kv.block_size)
        batch = msgspec.structs.replace(batch, draws=ints(0), rules=[Rules(0, seed, temperature)])
        tokens += stage.run(batch, None).token_ids.tolist()  # type: ignore[union-attr]
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [naive(p, 16) for p in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stages": 2},
        {"stages": 3, "prefix_caching": False},
        {"stages": 6},
        {"max_num_batched_tokens": 7},
        {"stages": 2, "max_num_batched_tokens": 7},
        {"stages": 3, "max_num_seqs": 2},
    ],
    ids=str,
)
def test_greedy_tokens_equal_the_naive_forward(
    make_engine: MakeEngine, expected: list[list[int]], options: dict[str, int]
) -> None:
    engine, collector = make_engine(**options)
    for i, prompt in enumerate(PROMPTS):
        engine.add(request(str(i), prompt))
    tokens = collector.wait([str(i) for i in range(len(PROMPTS))])
    assert [tokens[str(i)] for i in range(len(PROMPTS))] == expected
    assert engine.scheduler.stats().kv_blocks_used == 0


@pytest.mark.parametrize("stages", [1, 2])
def test_preemption_gives_the_same_tokens(make_engine: MakeEngine, stages: int) -> None:
    """All are admitted, for they are short; then they outgrow the cache."""
    engine, collector = make_engine(stages=stages, num_blocks=40)
    for i, prompt in enumerate(PROMPTS[:5]):
        engine.add(request(str(i), prompt, max_tokens=60))
    tokens = collector.wait([str(i) for i in range(5)])
    assert [tokens[str(i)] for i in range(5)] == [naive(p, 60) for p in PROMPTS[:5]]
    assert engine.scheduler.stats().preemptions > 0, "the small cache should have forced preemption"
    assert engine.scheduler.stats().kv_blocks_used == 0


def test_prefix_hit_gives_the_same_tokens(make_engine: MakeEngine, expected: list[list[int]]) -> None:
    engine, collector = make_engine(stages=2)
    for name in ("first", "second"):
        engine.add(request(name, PROMPTS[6]))
        assert collector.wait([name])[name] == expected[6]
    assert engine.scheduler.stats().prefix_hit_tokens >= 96
    assert collector.events["second"][0].num_cached_tokens >= 96
    assert collector.events["first"][0].num_cached_tokens == 0


def test_seeded_sampling_is_the_same_in_any_company(make_engine: MakeEngine) -> None:
    alone = {i: naive(p, 16, temperature=0.9, seed=i) for i, p in enumerate(PROMPTS)}
    for options in ({"stages": 2}, {"num_blocks": 30}, {"max_num_batched_tokens": 5, "stages": 3}):
        engine, collector = make_engine(**options)
        for i, prompt in enumerate(PROMPTS):
            engine.add(request(str(i), prompt, temperature=0.9, seed=i))
        tokens = collector.wait([str(i) for i in alone])
        assert {int(i): t for i, t in tokens.items()} == alone


def test_resumed_request_continues_with_the_same_tokens(make_engine: MakeEngine) -> None:
    engine, collector = make_engine(stages=2)
    whole = request("whole", PROMPTS[4], temperature=0.8, seed=5, presence_penalty=0.5, repetition_penalty=1.1)
    engine.add(whole)
    tokens = collector.wait(["whole"])["whole"]
    rest = request("rest", PROMPTS[4], temperature=0.8, seed=5, presence_penalty=0.5, repetition_penalty=1.1)
    engine.add(rest.resume(tokens[:6]))
    assert collector.wait(["rest"])["rest"] == tokens[6:]


def test_abort_frees_blocks_and_leaves_others_alone(make_engine: MakeEngine, expected: list[list[int]]) -> None:
    engine, collector = make_engine(stages=2)
    engine.add(request("victim", PROMPTS[5], max_tokens=400))
    engine.add(request("other", PROMPTS[4]))
    engine.abort("victim")
    engine.abort("never heard of")
    assert collector.wait(["other"])["other"] == expected[4]
    engine.add(request("after", PROMPTS[3]))
    assert collector.wait(["after"])["after"] == expected[3]
    assert len(collector.tokens("victim")) < 400
    assert engine.scheduler.stats().kv_blocks_used == 0


def test_stop_token_ends_the_request(make_engine: MakeEngine, expected: list[list[int]]) -> None:
    engine, collector = make_engine()
    stop = expected[4][5]
    engine.add(request("r", PROMPTS[4], stop_token_ids=(stop,)))
    tokens = collector.wait(["r"])["r"]
    assert tokens == expected[4][: expected[4].index(stop) + 1]
    assert collector.events["r"][-1].finish_reason == "stop"


def test_requests_that_can_never_run_are_rejected_at_once(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(num_blocks=8)
    with pytest.raises(RequestRejected, match="empty"):
        engine.add(request("r", []))
    with pytest.raises(RequestRejected, match="holds 32"):
        engine.add(request("r", [1] * 20, max_tokens=20))


def test_cohorts_fill_the_pipeline(make_engine: MakeEngine) -> None:
    """Eight streams on two stages: in steady decode every batch takes four of them."""
    engine, collector = make_engine(stages=2, num_blocks=160)  # room for all, even if they begin together
    for i in range(8):
        engine.add(request(str(i), PROMPTS[3], max_tokens=64))
    collector.wait([str(i) for i in range(8)])
    sizes = [r.num_seqs for r in collector.reports[8:-8]]
    assert sizes.count(4) >= 0.9 * len(sizes), sizes


class HangingPipeline(LocalPipeline):
    """Computes nothing until it is interrupted; `answers` says whether its stage would say a word."""

    def __init__(self, answers: bool) -> None:
        (stage,) = make_stages()
        super().__init__([stage])
        self.answers, self.asked = answers, 0
        self.goes_on = threading.Event()
        compute = stage.compute

        def hang(*args: Any) -> Any:
            self.goes_on.wait()
            return compute(*args)

        stage.compute = hang  # type: ignore[method-assign]

    def unresponsive(self, message: str) -> StageDied | None:
        self.asked += 1
        if self.answers:
            return None
        self.interrupt(0)
        return StageDied(f"{message}: stage 0 does not answer", "hung")

    def interrupt(self, index: int) -> None:
        self.goes_on.set()


@pytest.mark.parametrize("answers", [False, True])
def test_a_step_that_hangs_is_asked_about_and_then_computed_again(expected: list[list[int]], answers: bool) -> None:
    """A stage that answers gets the whole deadline, one that does not is replaced at the first question."""
    pipeline, collector = HangingPipeline(answers), Collector()
    scheduler = Scheduler(BlockManager(128, 4), depth=1, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=512)
    engine = Engine(scheduler, pipeline, collector, Patience(floor_s=0.2, ceiling_s=1.0))
    engine.start()
    engine.add(request("r", PROMPTS[4]))
    assert collector.wait(["r"])["r"] == expected[4]
    (report,) = collector.recoveries
    assert (report.cause, report.num_seqs) == ("hung", 1)
    assert pipeline.asked == 1 if not answers else pipeline.asked > 1
    engine.close()
    scheduler.check()


def test_recovery_switched_off_ends_the_engine() -> None:
    collector = Collector()
    scheduler = Scheduler(BlockManager(128, 4), depth=1, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=512)
    patience = Patience(floor_s=0.1, ceiling_s=0.5)
    engine = Engine(scheduler, HangingPipeline(False), collector, patience, recovery_attempts=0)
    engine.start()
    engine.add(request("r", PROMPTS[4]))
    with pytest.raises(EngineStopped, match="does not answer"):
        collector.wait(["r"])
    engine.close()

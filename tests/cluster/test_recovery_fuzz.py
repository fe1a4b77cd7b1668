"""An engine whose stages die, hang and lose each other by plan, while requests come and go, in mid rebuild too.

Whatever happens, nothing hangs, every request ends exactly once, and says what it says undisturbed.
"""

import random
import threading
import time
from functools import cache
from typing import Any

import pytest

from cluster.engine import Engine
from cluster.errors import LinkBroken
from cluster.local_pipeline import LocalPipeline
from cluster.patience import Patience
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request
from tests.cluster.test_engine import PROMPTS
from tests.conftest import Collector, make_stages, request

MAX_STAGES, BLOCKS, BLOCK = 4, 60, 4
CASES = [
    *range(100),
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 1000)),
]


def a_request(seed: int) -> Request:
    """Of 20 kinds."""
    rng = random.Random(seed)
    how: dict[str, Any] = {"temperature": rng.choice([0.0, 0.9]), "seed": seed}
    if rng.random() < 0.3:
        how["presence_penalty"] = 0.7
    return request(f"kind-{seed}", rng.choice(PROMPTS[:6]), max_tokens=rng.choice([1, 2, 5, 12, 20]), **how)


@cache
def undisturbed() -> dict[int, list[int]]:
    collector = Collector()
    scheduler = Scheduler(
        BlockManager(BLOCKS * 4, BLOCK), depth=1, max_num_seqs=32, max_num_batched_tokens=64, max_model_len=160
    )
    engine = Engine(scheduler, LocalPipeline(make_stages(num_blocks=BLOCKS * 4)), collector)
    engine.start()
    kinds = {seed: a_request(seed) for seed in range(20)}
    for one in kinds.values():
        engine.add(one)
    tokens = collector.wait([one.request_id for one in kinds.values()])
    engine.close()
    return {seed: tokens[one.request_id] for seed, one in kinds.items()}


@cache
def stages_of(count: int) -> Any:
    return make_stages(stages=count, num_blocks=BLOCKS, block_size=BLOCK)


class Unruly(LocalPipeline):
    """Something happens at some of its stages' steps."""

    def __init__(self, stages: Any, rng: random.Random, often: float) -> None:
        self._goes_on = threading.Event()
        self._rng, self._often, self.num_faults = rng, often, 0
        self._computes = [stage.compute for stage in stages]
        for index, stage in enumerate(stages):
            stage.compute = self._unruly(index)
        super().__init__(stages)

    def _unruly(self, index: int) -> Any:
        def compute(*args: Any) -> Any:
            if self._rng.random() < self._often and self.num_faults < 5:
                self.num_faults += 1
                fault = self._rng.choice(["dies", "hangs", "loses its link", "is slow"])
                if fault == "dies":
                    raise RuntimeError("it dies")
                if fault == "loses its link":
                    raise LinkBroken("it loses its link")
                if fault == "hangs":
                    self._goes_on.wait(30)
                    raise RuntimeError("it was ended")
                time.sleep(0.05)
            return self._computes[index](*args)

        return compute

    def interrupt(self, index: int) -> None:
        self._goes_on.set()

    def kill(self) -> None:
        self._goes_on.set()
        super().kill()

    def recover(self, epoch: int, fresh: bool = False) -> int:
        self._goes_on.set()
        if self._rng.random() < 0.3:
            time.sleep(0.02)
        replaced = super().recover(epoch, fresh)
        self._goes_on.clear()
        return replaced

    def close(self) -> None:
        self._goes_on.set()
        super().close()
        for stage, compute in zip(self._stages, self._computes, strict=True):
            stage.compute = compute  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", CASES)
def test_every_request_ends_once(seed: int) -> None:
    rng = random.Random(seed)
    expected, collector = undisturbed(), Collector()
    depth = rng.randrange(1, MAX_STAGES + 1)
    scheduler = Scheduler(
        BlockManager(BLOCKS, BLOCK, rng.random() < 0.7), depth=depth,
        max_num_seqs=rng.choice([2, 8, 32]), max_num_batched_tokens=rng.choice([8, 64]), max_model_len=160,
    )  # fmt: skip
    pipeline = Unruly(stages_of(depth), random.Random(seed + 1), rng.choice([0.005, 0.02, 0.1]))
    engine = Engine(scheduler, pipeline, collector, Patience(floor_s=0.1, ceiling_s=0.4), recovery_attempts=8)
    engine.start()
    kinds: dict[str, int] = {}
    aborted: set[str] = set()
    for i in range(rng.randrange(5, 25)):
        name, kind = f"r{i}", rng.randrange(20)
        kinds[name] = kind
        one = a_request(kind)
        engine.add(Request(request_id=name, token_ids=one.token_ids, sampling=one.sampling))
        if rng.random() < 0.15:
            aborted.add(victim := rng.choice(list(kinds)))
            engine.abort(victim)
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.02)
    collector.wait([name for name in kinds if name not in aborted], timeout=60)
    engine.close()
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.stats().kv_blocks_used == 0
    assert not engine._open
    for name, kind in kinds.items():
        events = collector.events.get(name, [])
        ends = [event for event in events if event.finish_reason is not None]
        said = [event.token_id for event in events if event.error is None]
        assert events[-1:] == ends if name not in aborted or ends else True, name
        assert len(ends) <= 1, name
        if name in aborted or (ends and ends[0].is_fatal):
            assert said == expected[kind][: len(said)], name
        else:
            assert said == expected[kind], name

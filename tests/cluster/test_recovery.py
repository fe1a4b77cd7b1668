"""What an engine does when its stages do not: who is blamed, who goes on, and that nobody waits for ever."""

import threading
import time

import pytest

from cluster.engine import Engine
from cluster.errors import RequestRejected, StageDied
from cluster.local_pipeline import LocalPipeline
from cluster.pipeline import Doing, at_fault
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from tests.cluster.test_engine import PROMPTS
from tests.conftest import TINY, Collector, MakeEngine, make_stages, request

LIMIT_S = 10.0


@pytest.mark.parametrize(
    ("doings", "index"),
    [
        ([Doing("receiving", 9.0), Doing("computing", 9.0)], 1),
        ([Doing("computing", 0.1), Doing("computing", 9.0), Doing("receiving", 9.0)], 1),  # the first one is at work
        ([Doing("computing", 4.0), Doing("receiving", 4.0)], None),  # it may take so long: a link is to blame
        ([Doing("computing", 9.0), None], 1),
        ([Doing("idle", 99.0), Doing("receiving", 99.0), Doing("sending", 99.0)], None),
    ],
)
def test_a_stage_at_work_is_not_blamed_for_others(doings: list[Doing | None], index: int | None) -> None:
    assert at_fault(doings, LIMIT_S) == index


def test_an_id_that_is_open_is_refused_until_its_request_is_done(make_engine: MakeEngine) -> None:
    """Taken twice, the first one's blocks would be lost; `make_engine` checks the books."""
    engine, collector = make_engine()
    engine.add(request("r", PROMPTS[5], max_tokens=200))
    with pytest.raises(RequestRejected, match="open already"):
        engine.add(request("r", PROMPTS[4]))
    engine.abort("r")
    engine.add(request("s", PROMPTS[4]))
    first = collector.wait(["s"])["s"]
    engine.add(request("r", PROMPTS[4]))
    while collector.tokens("r")[-16:] != first:
        time.sleep(0.01)
    assert engine.scheduler.stats().kv_blocks_used == 0


def test_an_abort_is_of_the_request_that_was_there(make_engine: MakeEngine) -> None:
    """Clients end what is done already, and the next one may have its id."""
    engine, collector = make_engine()
    for i in range(50):
        engine.add(request("r", PROMPTS[2], max_tokens=2))
        while len(collector.tokens("r")) < 2 * i + 2:
            time.sleep(0.0005)
        engine.abort("r")
    assert engine.failure is None


@pytest.mark.parametrize("wrong", [TINY.vocab_size, -1])
def test_a_token_beyond_the_vocabulary_is_refused_at_once(make_engine: MakeEngine, wrong: int) -> None:
    engine, _ = make_engine()
    for bad in (request("r", [5, wrong]), request("r", [5]).resume([wrong])):
        with pytest.raises(RequestRejected, match="token ids are 0 to 299"):
            engine.add(bad)


class Stubborn(LocalPipeline):
    """A rebuild of it does not end unless it is killed."""

    def __init__(self) -> None:
        super().__init__(make_stages())
        self.killed = threading.Event()

    def recover(self, epoch: int, fresh: bool = False) -> int:
        self.killed.wait()
        raise StageDied("it was killed while it loaded", "start")

    def kill(self) -> None:
        self.killed.set()
        super().kill()


def test_closing_does_not_wait_for_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.engine.CLOSE_S", 0.3)
    pipeline, collector = Stubborn(), Collector()
    scheduler = Scheduler(BlockManager(128, 4), depth=1, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=512)
    engine = Engine(scheduler, pipeline, collector)
    engine.start()
    pipeline._death = StageDied("a test pulled the plug")
    pipeline.wake()
    while engine.recovering is None:
        time.sleep(0.01)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 5.0
    assert not engine._thread.is_alive()


def test_deaths_with_work_between_them_are_not_in_a_row(make_engine: MakeEngine) -> None:
    """Four of them, where three in a row end an engine."""
    engine, collector = make_engine()
    pipeline = engine.pipeline
    assert isinstance(pipeline, LocalPipeline)
    for i in range(4):
        engine.add(request(f"r{i}", PROMPTS[2], max_tokens=60))
        while len(collector.tokens(f"r{i}")) < 5:
            time.sleep(0.001)
        pipeline._death = StageDied("a test pulled the plug")
        pipeline.wake()
        collector.wait([f"r{i}"])
    assert len(collector.recoveries) == 4
    assert not engine.scheduler.has_suspects


def test_the_loop_turns_about_once_a_step(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn looks at every sequence that runs. With six stages it was eight of them: one for every timing."""
    engine, collector = make_engine(stages=6)
    fill, turns = engine._fill, [0]

    def counted() -> None:
        turns[0] += 1
        fill()

    monkeypatch.setattr(engine, "_fill", counted)
    names = [str(i) for i in range(12)]
    for name in names:
        engine.add(request(name, PROMPTS[4], max_tokens=100, presence_penalty=0.5))
    collector.wait(names)
    assert turns[0] < 2 * len(collector.reports)
    assert len(collector.timings) > 5 * len(collector.reports), "they are heard of all the same"

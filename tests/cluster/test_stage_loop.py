"""The order in which a stage takes, launches and reports, with a device that is slower than its host."""

from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from cluster.stages import stage_loop
from cluster.stages.stage_loop import StageLoop
from cluster.transport import StepOrder, StopRequested
from model.batch import Batch, LateMasks, StageTiming, StepOutput
from model.sampling import Sampled
from model.stage import Unsampled
from tests.conftest import ints


class SlowSpan:
    """A step that the device finishes only after some looks at it."""

    def __init__(self) -> None:
        self.looks = 5

    def is_over(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> float:
        return 0.0

    started = finished = wait


class Engine:
    """The control channel: gives all batches at once, ends the stage when all of them are answered."""

    def __init__(self, batches: list[Batch]) -> None:
        self.orders: list[StepOrder | LateMasks] = [StepOrder(batch, 5.0) for batch in batches]
        self.expected, self.answered = len(batches), list[int]()

    def receive(self, wait: bool = True) -> StepOrder | LateMasks | None:
        if len(self.answered) == self.expected:
            raise StopRequested
        assert self.orders or not wait, "the stage waits for orders with steps unreported"
        return self.orders.pop(0) if self.orders else None

    def send(self, message: Any) -> None:
        if isinstance(message, StepOutput):
            self.answered.append(message.step_id)


class Masking(Engine):
    """The same; the masks of a step are known once the step before it is answered, those of the first one at once."""

    def receive(self, wait: bool = True) -> StepOrder | LateMasks | None:
        order = super().receive(wait and bool(self.orders))
        if order is None and wait:
            return LateMasks(0, len(self.answered), {0: b"%d" % len(self.answered)})
        return order


def make_batch(step_id: int, **of_sampler: Any) -> Batch:
    one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
    return Batch(0, step_id, one, one, zero, zero, zero, zero[:0], step_id - 1, zero, **of_sampler)


def last_stage(**methods: Any) -> Any:
    return SimpleNamespace(
        group=SimpleNamespace(check=lambda: None),
        adapters=None,
        layers=SimpleNamespace(is_first=False, is_last=True),
        decoder=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
        hidden_shape=lambda batch: (1, 8),
        **methods,
    )


def test_the_last_stage_reports_a_step_before_it_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage before cannot send step n + 1 until it has the tokens of step n: they must be on their way."""
    watch = SimpleNamespace(start=lambda: None, stop=SlowSpan)
    monkeypatch.setattr(stage_loop, "Stopwatch", lambda device: watch)
    engine = Engine([make_batch(n) for n in range(4)])
    received: list[int] = []

    def receive(into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        assert engine.answered == received, "waits for a step that needs tokens which it has not reported"
        received.append(len(received))
        return into

    stage = last_stage(compute=lambda batch, hidden: Sampled(torch.tensor([3])))
    upstream: Any = SimpleNamespace(receive=receive, on_device=False, check=lambda: None)
    control: Any = engine
    StageLoop(1, stage, control, 0, upstream, None).run()
    assert engine.answered == [0, 1, 2, 3]


@pytest.mark.parametrize("on_device", [False, True])
def test_masks_that_come_late_are_waited_for_with_the_step_computed(
    monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    """And with the steps before it reported, for their tokens are what the masks follow from."""
    watch = SimpleNamespace(start=lambda: None, stop=SlowSpan)
    monkeypatch.setattr(stage_loop, "Stopwatch", lambda device: watch)
    engine = Masking([make_batch(n, draws=ints(0), awaited=[0]) for n in range(4)])
    drawn: list[tuple[int, bytes]] = []

    def sample(computed: Unsampled, masks: LateMasks) -> Sampled:
        drawn.append((computed.batch.step_id, masks.masks[0]))
        return Sampled(torch.tensor([3]))

    stage = last_stage(compute=lambda batch, hidden: Unsampled(batch, torch.zeros(1, 5), []), sample=sample)
    upstream: Any = SimpleNamespace(receive=lambda into, s: into, on_device=on_device, check=lambda: None)
    control: Any = engine
    StageLoop(1, stage, control, 0, upstream, None).run()
    assert drawn == [(n, b"%d" % n) for n in range(4)]
    assert engine.answered == [0, 1, 2, 3]


class Wire:
    """A link from the last GPU to the first: keeps what happened with it, in order."""

    on_device = True

    def __init__(self, happened: list[str]) -> None:
        self.happened = happened

    def send(self, tokens: torch.Tensor, timeout_s: float) -> None:
        self.happened.append(f"send {tokens.tolist()}")

    def receive(self, into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        self.happened.append(f"receive {into.tolist()}")
        return into

    def check(self) -> None:
        pass


class Timings(Engine):
    """Ends the stage when it is idle, with all steps reported: the first stage answers with nothing but timings."""

    def receive(self, wait: bool = True) -> StepOrder | LateMasks | None:
        if wait and not self.orders:
            assert len(self.answered) == self.expected, "the stage waits for orders with steps unreported"
            raise StopRequested
        return self.orders.pop(0) if self.orders else None

    def send(self, message: Any) -> None:
        if isinstance(message, StageTiming):
            self.answered.append(message.step_id)


def first_stage(batches: list[Batch], max_in_flight: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a first stage that is fed by a device does with these."""
    monkeypatch.setattr(stage_loop, "Stopwatch", lambda device: SimpleNamespace(start=lambda: None, stop=SlowSpan))
    happened: list[str] = []
    engine: Any = Timings(batches)
    stage: Any = SimpleNamespace(
        group=SimpleNamespace(check=lambda: None),
        adapters=None,
        layers=SimpleNamespace(is_first=True, is_last=False),
        decoder=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
        compute=lambda batch, hidden: happened.append(f"compute {batch.step_id}") or torch.zeros(1, 8),  # type: ignore[func-returns-value]
        feed=lambda batch, tokens: happened.append(f"feed {batch.step_id}"),
    )
    downstream: Any = SimpleNamespace(on_device=True, send=lambda hidden, s: None, check=lambda: None)
    tokens: Any = Wire(happened)
    StageLoop(0, stage, engine, 0, None, downstream, tokens, max_in_flight).run()
    assert engine.answered == list(range(len(batches)))
    return happened


@pytest.mark.parametrize(("begun", "activity"), [(True, "computing"), (False, "receiving")])
def test_a_device_that_hangs_in_its_own_step_is_told_from_one_that_waits(
    begun: bool, activity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has been launched behind that step, such as a receive, waits too."""
    span = SimpleNamespace(has_begun=lambda: begun, is_over=lambda: False)
    monkeypatch.setattr(stage_loop, "Stopwatch", lambda device: SimpleNamespace(start=lambda: None, stop=lambda: span))
    engine: Any = Timings([make_batch(n) for n in range(2)])
    seen: list[str] = []

    def receive(wait: bool = True) -> Any:
        if engine.orders:
            return engine.orders.pop(0)
        if not loop._outbox:
            return None
        seen.append(loop.doing.activity)
        raise StopRequested

    engine.receive = receive
    upstream: Any = SimpleNamespace(receive=lambda into, s: into, on_device=True, check=lambda: None)
    stage = last_stage(compute=lambda batch, hidden: Sampled(torch.tensor([3])))
    loop = StageLoop(1, stage, engine, 0, upstream, None)
    loop.run()
    assert seen == [activity]


def test_the_first_stage_lets_its_device_wait_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's tokens are received before the step that follows from them, those of the last one when it is idle."""
    happened = first_stage([make_batch(n) for n in range(3)], 3, monkeypatch)
    assert happened == [what for n in range(3) for what in (f"compute {n}", "receive [0]", f"feed {n}")]


def test_tokens_that_nothing_follows_from_are_received_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of requests for one token: the last stage cannot go on sending what nobody takes."""
    batches = [msgspec.structs.replace(make_batch(n), tokens_from=-1) for n in range(5)]
    happened = [what for what in first_stage(batches, 3, monkeypatch) if "receive" not in what]
    computed = [f"compute {n}" for n in range(3)], ["feed 0", "compute 3", "feed 1", "compute 4"]
    assert happened == [*computed[0], *computed[1], "feed 2", "feed 3", "feed 4"]


def test_the_last_stage_sends_tokens_before_it_launches_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """And launches all that it was given, for no host has to hear of tokens in between."""
    monkeypatch.setattr(stage_loop, "Stopwatch", lambda device: SimpleNamespace(start=lambda: None, stop=SlowSpan))
    happened: list[str] = []

    def compute(batch: Batch, hidden: torch.Tensor) -> Sampled:
        happened.append(f"compute {batch.step_id}")
        assert engine.answered == [], "all steps are launched before the first is reported"
        return Sampled(torch.tensor([batch.step_id]))

    engine: Any = Engine([make_batch(n) for n in range(3)])
    tokens, upstream = Wire(happened), Wire([])
    links: Any = (upstream, None, tokens)
    StageLoop(1, last_stage(compute=compute), engine, 0, *links).run()
    assert happened == ["compute 0", "send [0]", "compute 1", "send [1]", "compute 2", "send [2]"]
    assert engine.answered == [0, 1, 2]

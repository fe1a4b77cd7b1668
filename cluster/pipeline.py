"""What the engine needs of a pipeline, and what pipelines of any kind have in common.

`LocalPipeline` (local_pipeline.py) and `RayPipeline` (ray_pipeline.py) stand behind one protocol: whatever the engine
does with one it does with the other. In both every stage runs a `StageLoop`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec
import zmq

from cluster.errors import StageDied
from cluster.transport import AdapterLoaded, Control, LoadAdapter, Ready, StepOrder
from model.batch import Batch, Copied, Copies, LateMasks, SampledTokens, StageTiming, StepOutput

Activity = Literal["idle", "computing", "receiving", "sending"]


def max_in_flight(depth: int) -> int:
    """One batch more than there are stages, so that the first stage always finds work waiting."""
    return depth + 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage runs."""

    node: str  # its address
    gpus: tuple[str, ...]  # as Ray numbers them on that node; none on a CPU
    pid: int = 0


class Pipeline(Protocol):
    """Stages that execute batches strictly in order.

    Every method is for the engine's thread alone, but for `wake` and `kill`, which any may call at any time.
    """

    @property
    def depth(self) -> int:
        """Number of stages: how many batches can be computed at once."""
        ...

    @property
    def places(self) -> list[Place]:
        """Where each stage runs, as far as is known."""
        ...

    def submit(self, batch: Batch, timeout_s: float) -> None:
        """Hand a batch to all stages, which may take `timeout_s` for it; does not wait. Raises `StageDied`."""
        ...

    def send_masks(self, masks: LateMasks) -> None:
        """Hand the last stage what a submitted batch was sent without. Raises `StageDied`."""
        ...

    def copy(self, copies: Copies) -> None:
        """Hand all stages what to copy before the next batch. Raises `StageDied`."""
        ...

    def take_copied(self) -> list[Copied]:
        """What stages have copied, as they said so far; each only once. `receive` returns when there is some."""
        ...

    def load_adapter(self, order: LoadAdapter) -> None:
        """Have all stages read an adapter; does not wait. Raises `StageDied`."""
        ...

    def take_loaded(self) -> list[AdapterLoaded]:
        """What stages have said of adapters so far; each only once. `receive` returns when one says something."""
        ...

    def receive(self, timeout: float | None) -> StepOutput | None:
        """The next result; None after `wake` or `timeout` seconds (None: no limit). Raises `StageDied`."""
        ...

    def take_timings(self) -> list[StageTiming]:
        """Those that have come with the results so far; each only once."""
        ...

    def wake(self) -> None:
        """Make a `receive` in progress return. Never waits."""
        ...

    def unresponsive(self, message: str) -> StageDied | None:
        """A step takes long, says `message`: a stage whose process does not answer is at fault, if there is one."""
        ...

    def diagnose(self, message: str, limit_s: float) -> StageDied:
        """A step has not finished within `limit_s`, or a link broke, says `message`: find out who is to blame."""
        ...

    def recover(self, epoch: int, fresh: bool = False) -> int:
        """After `StageDied`: make all stages ready for step 0 of `epoch` with an empty cache; `fresh`: by new ones.

        Returns how many had to be replaced; the others keep their weights. Raises `StageDied`, or `EngineStopped` if
        there is no use in trying again.
        """
        ...

    def kill(self) -> None:
        """End all stages at once: whoever waits for one, in whatever method, stops waiting."""
        ...

    def close(self) -> None:
        """End all stages; afterwards nothing of the pipeline is left. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Doing:
    """What a stage does, and for how many seconds already."""

    activity: Activity
    seconds: float = 0.0


def at_fault(doings: Sequence[Doing | None], limit_s: float) -> int | None:
    """Which stage holds up the others: one that does not answer, or has computed its step for far too long.

    A step ahead of it may have had to go through other stages first, so half of `limit_s`, within which all of the step
    should be done, is too long for one of them. Who computes for less is at work: a link that breaks meanwhile is no
    reason to lose its weights.
    """
    for index, doing in enumerate(doings):
        if doing is None:
            return index
    longest = max(range(len(doings)), key=lambda i: _computing_s(doings[i]))
    return longest if _computing_s(doings[longest]) > limit_s / 2 else None


def _computing_s(doing: Doing | None) -> float:
    return doing.seconds if doing is not None and doing.activity == "computing" else 0.0


class ControlledPipeline(ABC):
    """Steps and their results, as they go over a control channel; how stages live and die is up to subclasses."""

    _control: Control
    _death: StageDied | None  # the end of a stage, once it is noticed
    _feeds: bool  # whether the first stage gets tokens from here, and not from the last one's GPU

    def __init__(self) -> None:
        self._timings: list[StageTiming] = []
        self._copied: list[Copied] = []
        self._loaded: list[AdapterLoaded] = []

    @property
    @abstractmethod
    def depth(self) -> int: ...

    @property
    def places(self) -> list[Place]:
        return [Place("", ())] * self.depth

    def submit(self, batch: Batch, timeout_s: float) -> None:
        self._raise_if_dead()
        try:
            self._control.send(StepOrder(batch, timeout_s))
        except zmq.ZMQError as error:
            raise StageDied(f"a stage is not reachable: {error}") from error

    def send_masks(self, masks: LateMasks) -> None:
        self._raise_if_dead()
        try:
            self._control.send_masks(masks)
        except zmq.ZMQError as error:
            raise StageDied(f"the last stage is not reachable: {error}") from error

    def copy(self, copies: Copies) -> None:
        self._raise_if_dead()
        try:
            self._control.send_copies(copies)
        except zmq.ZMQError as error:
            raise StageDied(f"a stage is not reachable: {error}") from error

    def take_copied(self) -> list[Copied]:
        copied, self._copied = self._copied, []
        return copied

    def load_adapter(self, order: LoadAdapter) -> None:
        self._raise_if_dead()
        try:
            self._control.send_adapter(order)
        except zmq.ZMQError as error:
            raise StageDied(f"a stage is not reachable: {error}") from error

    def take_loaded(self) -> list[AdapterLoaded]:
        loaded, self._loaded = self._loaded, []
        return loaded

    def receive(self, timeout: float | None) -> StepOutput | None:
        """Timings alone wake nobody: they are kept until somebody wants them."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            self._raise_if_dead()
            try:
                message = self._control.receive(None if until is None else max(0.0, until - time.monotonic()))
            except msgspec.DecodeError as error:
                raise StageDied(f"a stage sent what is no valid message: {error}") from error
            if isinstance(message, StageTiming):
                self._timings.append(message)
                continue
            if isinstance(message, Copied):
                self._copied.append(message)
                return None
            if isinstance(message, AdapterLoaded):
                self._loaded.append(message)
                return None
            assert not isinstance(message, Ready), "stages say that they are ready only once, at the start"
            if message is None:
                self._raise_if_dead()
            elif message.token_ids and self._feeds:
                self._feed_first_stage(message)
            return message

    def take_timings(self) -> list[StageTiming]:
        timings, self._timings = self._timings, []
        return timings

    def _feed_first_stage(self, output: StepOutput) -> None:
        """At once, before the scheduler looks at it: a batch may be waiting there for these tokens."""
        try:
            self._control.send_tokens(SampledTokens(output.step_id, output.token_ids))
        except zmq.ZMQError as error:
            raise StageDied(f"the first stage is not reachable: {error}") from error

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise self._death

"""A pipeline in one process: every stage in a thread of its own, which runs the same loop as a stage actor does."""

import queue
import threading
import time

import torch

from cluster.errors import LinkBroken, StageDied
from cluster.pipeline import ControlledPipeline, at_fault, max_in_flight
from cluster.stages.link import FROM_PREVIOUS, TO_NEXT, close_all
from cluster.stages.stage_loop import StageLoop
from cluster.transport import Control, StageChannel, identity_of
from model.stage import Stage

HEAR_S = 0.5  # how long stages get to leave their loops before their links are cut
LEAVE_S = 10.0  # how long they then get


class LocalControl(Control):
    """The engine's end of a control channel to threads."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._replies: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self._is_woken = False
        self.channels = [LocalChannel(stage, self._replies) for stage in range(num_stages)]

    def wake(self) -> None:
        """Once is enough until somebody has waited; safe from any thread."""
        if not self._is_woken:
            self._is_woken = True
            self._replies.put(None)

    def _put(self, stage: int, payload: bytes) -> None:
        self.channels[stage].orders.put(payload)

    def _take(self, timeout: float | None) -> tuple[bytes, bytes] | None:
        try:
            reply = self._replies.get(timeout=timeout)
        except queue.Empty:
            return None
        if reply is None:
            self._is_woken = False
        return reply

    def close(self) -> None:
        pass


class LocalChannel(StageChannel):
    """A stage's end of it."""

    def __init__(self, stage: int, replies: "queue.SimpleQueue[tuple[bytes, bytes] | None]") -> None:
        self.orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._name, self._replies = identity_of(stage), replies

    def _put(self, payload: bytes) -> None:
        self._replies.put((self._name, payload))

    def _take(self, wait: bool) -> bytes | None:
        try:
            return self.orders.get(block=wait)
        except queue.Empty:
            return None


class LocalLink:
    """See `Link`: between two threads."""

    on_device = False

    def __init__(self) -> None:
        self._sent: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._is_closed = False

    def send(self, hidden: torch.Tensor, timeout_s: float) -> None:
        if self._is_closed:
            raise LinkBroken(f"{TO_NEXT}: the link is closed")
        self._sent.put(hidden)

    def flush(self, timeout_s: float) -> None:
        pass

    def receive(self, into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        try:
            hidden = self._sent.get(timeout=timeout_s)
        except queue.Empty:
            raise LinkBroken(f"{FROM_PREVIOUS}: nothing came within {timeout_s:g} s") from None
        if hidden is None:
            raise LinkBroken(f"{FROM_PREVIOUS}: the link is closed")
        return into.copy_(hidden)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self._is_closed = True
        self._sent.put(None)


class LocalPipeline(ControlledPipeline):
    """These stages, in order. One whose loop fails keeps what it holds, and takes part in the next epoch."""

    _control: LocalControl

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self._stages = stages
        self._feeds = len(stages) > 1
        self._run(0)

    @property
    def depth(self) -> int:
        return len(self._stages)

    def wake(self) -> None:
        self._control.wake()

    def unresponsive(self, message: str) -> StageDied | None:
        return None

    def diagnose(self, message: str, limit_s: float) -> StageDied:
        index = at_fault(doings := [loop.doing for loop in self._loops], limit_s)
        if index is None:
            return StageDied(f"{message}: no stage is to blame, so a link is", "link")
        self.interrupt(index)
        return StageDied(f"{message}: stage {index} has been {doings[index].activity} for too long", "hung")

    def interrupt(self, index: int) -> None:
        """A thread cannot be killed: whoever makes a stage hang sees to it here that it goes on."""

    def recover(self, epoch: int, fresh: bool = False) -> int:
        num_failed = len(self._failed)
        self._halt()
        self._run(epoch)
        return num_failed

    def kill(self) -> None:
        self._control.stop()
        for link in self._links:
            link.close()

    def close(self) -> None:
        self._halt()

    def _run(self, epoch: int) -> None:
        self._death, self._failed = None, set[int]()
        self._control = LocalControl(self.depth)
        self._links = [LocalLink() for _ in self._stages[1:]]
        self._timings.clear()
        self._copied.clear()
        self._loaded.clear()
        ends = [None, *self._links, None]
        self._loops = [
            StageLoop(i, stage, self._control.channels[i], epoch, ends[i], ends[i + 1], None, max_in_flight(self.depth))
            for i, stage in enumerate(self._stages)
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(i, loop, ends[i : i + 2], self._control), name=f"stage-{i}")
            for i, loop in enumerate(self._loops)
        ]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def _work(self, index: int, loop: StageLoop, links: "list[LocalLink | None]", control: LocalControl) -> None:
        """The life of a stage in one epoch."""
        try:
            loop.run()
        except LinkBroken as error:
            self._end(index, control, StageDied(f"stage {index}: {error}", "link"))
        except Exception as error:
            self._end(index, control, StageDied(f"stage {index} failed: {type(error).__name__}: {error}", "failed"))
        finally:
            close_all(links)

    def _end(self, index: int, control: LocalControl, death: StageDied) -> None:
        """The first one is the cause of all others: it says so here before its neighbours can notice."""
        if control is self._control:
            if death.cause != "link":
                self._failed.add(index)
            self._death = self._death or death
            control.wake()

    def _halt(self) -> None:
        self._control.stop()
        if not self._left(HEAR_S):
            self.kill()
            assert self._left(LEAVE_S), "a stage does not leave its loop"

    def _left(self, timeout_s: float) -> bool:
        """Whether all stages have left their loops within this time."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

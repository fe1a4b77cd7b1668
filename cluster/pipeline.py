"""What the engine needs of a pipeline, and the one that runs in this process.

`LocalPipeline` and `RayPipeline` (ray_pipeline.py) stand behind one protocol: whatever the engine does with one it
does with the other.
"""

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from cluster.errors import StageDied
from model.batch import Batch, LateMasks, StageTiming, StepOutput

if TYPE_CHECKING:  # torch is only needed by whoever builds the stages
    from model.stage import Stage


def max_in_flight(depth: int) -> int:
    """One batch more than there are stages, so that the first stage always finds work waiting."""
    return depth + 1


class Pipeline(Protocol):
    """Stages that execute batches strictly in order. Every method but `wake` is for the engine's thread alone."""

    @property
    def depth(self) -> int:
        """Number of stages: how many batches can be computed at once."""
        ...

    def submit(self, batch: Batch, timeout_s: float) -> None:
        """Hand a batch to all stages, which may take `timeout_s` for it; does not wait. Raises `StageDied`."""
        ...

    def send_masks(self, masks: LateMasks) -> None:
        """Hand the last stage what a submitted batch was sent without. Raises `StageDied`."""
        ...

    def receive(self, timeout: float | None) -> StepOutput | StageTiming | None:
        """The next message; None after `wake` or `timeout` seconds (None: no limit). Raises `StageDied`."""
        ...

    def wake(self) -> None:
        """Make a `receive` in progress return. Safe from any thread."""
        ...

    def unresponsive(self, message: str) -> StageDied | None:
        """A step takes long, says `message`: a stage whose process does not answer is at fault, if there is one."""
        ...

    def diagnose(self, message: str) -> StageDied:
        """A step is overdue, says `message`: find out which stage is to blame."""
        ...

    def recover(self, epoch: int, fresh: bool = False) -> int:
        """After `StageDied`: make all stages ready for step 0 of `epoch` with an empty cache; `fresh`: by new ones.

        Returns how many had to be replaced; the others keep their weights. Raises `StageDied`, or `EngineStopped` if
        there is no use in trying again.
        """
        ...

    def close(self) -> None:
        """End all stages; afterwards nothing of the pipeline is left. Never raises."""
        ...


class LocalPipeline:
    """All stages in this process, one after another in the thread that calls `receive`."""

    def __init__(self, stages: "list[Stage]") -> None:
        self._stages = stages
        self._batches: deque[Batch] = deque()
        self._masks: dict[int, LateMasks] = {}  # by step id
        self._timings: deque[StageTiming] = deque()
        self._woken = threading.Event()

    @property
    def depth(self) -> int:
        return len(self._stages)

    def submit(self, batch: Batch, timeout_s: float) -> None:
        self._batches.append(batch)

    def send_masks(self, masks: LateMasks) -> None:
        self._masks[masks.step_id] = masks

    def receive(self, timeout: float | None) -> StepOutput | StageTiming | None:
        if self._timings:
            return self._timings.popleft()
        if self._batches and (not self._batches[0].awaits_masks or self._batches[0].step_id in self._masks):
            return self._run(self._batches.popleft())
        self._woken.wait(timeout)
        self._woken.clear()
        return None

    def _run(self, batch: Batch) -> StepOutput:
        from model.stage import to_output

        if (masks := self._masks.pop(batch.step_id, None)) is not None:
            batch = msgspec.structs.replace(batch, draws=masks.fill(batch.draws))
        result: Any = None
        for index, stage in enumerate(self._stages):
            started = time.monotonic()
            result = stage.run(batch, result)
            finished = time.monotonic()
            self._timings.append(StageTiming(batch.epoch, batch.step_id, index, started, finished, 0.0, 0.0))
        if self.depth > 1 and len(batch.sample_rows):
            self._stages[0].feed(batch, result.token_ids)
        return to_output(batch, result)

    def wake(self) -> None:
        self._woken.set()

    def unresponsive(self, message: str) -> StageDied | None:
        return None

    def diagnose(self, message: str) -> StageDied:
        return StageDied(message, "hung")

    def recover(self, epoch: int, fresh: bool = False) -> int:
        """Nothing survives a failure in this process that would have to be rebuilt."""
        self._batches.clear()
        self._masks.clear()
        return 0

    def close(self) -> None:
        self._batches.clear()

"""One stage as the engine's process sees it: where it is placed, the actor that fills the place, and how that ended."""

import logging
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import LinkBroken, StageDied
from cluster.pipeline import Doing
from cluster.stages.stage_actor import LoadReport, StageActor, StageSpec

log = logging.getLogger(__name__)

ASK_S = 1.5  # a process that does not answer for so long is taken for dead


@dataclass(frozen=True, slots=True)
class End:
    """How a stage's `run` ended. A sound stage only lost its neighbour: its weights are as good as before."""

    death: StageDied
    sound: bool


class StageHandle:
    """Stage `spec` in bundle `bundle` of `group`; with `spare`, a started process waits there to take over."""

    def __init__(self, spec: StageSpec, group: PlacementGroup, bundle: int, spare: bool = False) -> None:
        self.spec = spec
        self.report: LoadReport | None = None  # once loaded
        self.predecessor: LoadReport | None = None  # of whom it took the place
        self.running: Any = None  # the ref of `run`, once it was called
        self._group, self._bundle = group, bundle
        self._keeps_spare = spare
        self._spare: Any = None
        self.wanted = time.monotonic()  # since when it is, or is to be, in its place
        self.actor: Any = self._start(group.bundle_specs[bundle])

    @property
    def name(self) -> str:
        where = f" (pid {self.report.pid} on {self.report.node})" if self.report is not None else ""
        return f"stage {self.spec.index}{where}"

    def replace(self) -> None:
        """End the actor, whatever state it is in, and put the spare or a fresh one in its place."""
        self.kill()
        self.wanted = time.monotonic()
        spare, self._spare = self._spare, None
        self.actor = spare if spare is not None else self._start(self._group.bundle_specs[self._bundle])
        self.predecessor = self.report or self.predecessor
        self.report = self.running = None

    def prepare_spare(self) -> None:
        """Start a process that can take over, if one is wanted: it holds none of the bundle's resources."""
        if self._keeps_spare and self._spare is None:
            self._spare = self._start({})

    def _start(self, resources: dict[str, float]) -> Any:
        actor_class: Any = ray.remote(StageActor)
        return actor_class.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_concurrency=2,  # `run`, and what is asked of it meanwhile
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._bundle
            ),
        ).remote(self.spec)

    # -- how it is doing ----------------------------------------------------------------------------------------------

    def end(self) -> End:
        """Of a `run` that has ended."""
        try:
            ray.get(self.running, timeout=ASK_S)
            return End(StageDied(f"{self.name} left its loop unasked", "failed"), sound=True)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LinkBroken):
                return End(StageDied(f"{self.name}: {cause}", "link"), sound=True)
            return End(StageDied(f"{self.name} failed: {type(cause).__name__}: {cause}", "failed"), sound=False)
        except RayActorError as error:
            return End(StageDied(f"{self.name} was killed or lost: {_exit_detail(error)}", "killed"), sound=False)

    def is_sound(self) -> bool:
        """Whether it is out of its loop, alive, and holds its weights."""
        if self.report is None:
            return False
        if self.running is not None:
            done, _ = ray.wait([self.running], timeout=0)
            if not done or not self.end().sound:
                return False
        return self.answers(ASK_S)

    def answers(self, timeout_s: float) -> bool:
        """Whether its process lives."""
        ref = self.actor.doing.remote()
        ray.wait([ref], timeout=timeout_s)
        return doing_of(ref) is not None

    # -- its end ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """A stopped process does not hear Ray, whose own SIGKILL comes 5 s later: on this node it gets one at once."""
        ray.kill(self.actor)
        report = self.report
        if report is not None and report.node == ray.util.get_node_ip_address() and _is_stage(report.pid):
            with suppress(OSError):
                os.kill(report.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        if self._spare is not None:
            ray.kill(self._spare)


def doing_of(ref: Any) -> Doing | None:
    """What a stage said when it was asked; None if it has not answered by now."""
    try:
        answer: Doing = ray.get(ref, timeout=0)
        return answer
    except RayError:
        return None


def _is_stage(pid: int) -> bool:
    """Whether this process is a stage still: ids are given out again."""
    try:
        return StageActor.__name__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _exit_detail(error: RayActorError) -> str:
    """What Ray knows of the exit, in one line and without its advice."""
    words = " ".join(str(error).split()).split(" Some common causes")[0]
    return words.split("The actor is dead because ")[-1][:300]

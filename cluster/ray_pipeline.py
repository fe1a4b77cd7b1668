"""A pipeline whose stages are Ray actors, one per bundle of a placement group."""

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup

from cluster.config import EngineConfig
from cluster.errors import Cause, EngineStopped, LinkBroken, StageDied
from cluster.pipeline import ControlledPipeline, Doing, Place, at_fault
from cluster.stages.stage_actor import LoadReport, StageSpec
from cluster.stages.stage_handle import ASK_S, StageHandle, doing_of
from cluster.transport import ControlServer, Ready, Wakeup, interface_address
from model.config import StageLayers

log = logging.getLogger(__name__)

HEAR_S = 0.5  # how long stages get to hear that they shall leave their loops before their links are cut
LEAVE_S = 5.0  # how long they then get to leave before they are killed
LINK_S = 15.0  # how long neighbours look for each other
PLACE_S = 30.0  # how long a replacement may look for a place and start its process
SETTLE_S = 0.3  # after a first death, so that what it caused is not taken for the cause
POLL_S = 0.5  # how often loading progress and run refs are looked at
BLAME: tuple[Cause, ...] = ("killed", "failed", "hung", "start", "link")  # of several ends, the first is the cause

Progress = Callable[[float], None]


class RayPipeline(ControlledPipeline):
    """Stage actors in `group`, stage i in bundle `first_bundle + i`. The constructor returns when all are running.

    Raises `ValueError` for what the user must change (a bad checkpoint, too little memory) and `StageDied` for a stage
    that did not survive its start.
    """

    _control: ControlServer

    def __init__(
        self,
        config: EngineConfig,
        layers: Sequence[StageLayers],
        max_model_len: int,
        group: PlacementGroup,
        first_bundle: int,
        on_progress: Progress = lambda share: None,
    ) -> None:
        super().__init__()
        self._config = config
        self._on_progress = on_progress
        self._wakeup = Wakeup()
        self._lock = threading.Lock()  # a stage's end is noticed in another thread than that of the engine
        self._halted = threading.Event()
        self._death = None
        self.num_blocks: int | None = None  # KV blocks of every stage, fixed by the first start
        self.num_places = self.copy_window = 0  # for copies of them in host memory, too
        self._feeds = False
        self._stages = [
            StageHandle(StageSpec(i, part, config, max_model_len), group, first_bundle + i, config.pipeline.spare)
            for i, part in enumerate(layers)
        ]
        self._control = self._open_control()
        deadline = time.monotonic() + config.pipeline.start_timeout_s
        try:
            self._load(self._stages, deadline)
            self._run(0, deadline)
        except BaseException:
            self._end_all()
            raise

    @property
    def depth(self) -> int:
        return len(self._stages)

    @property
    def stages(self) -> list[LoadReport]:
        """What each stage holds, and where."""
        return [stage.report for stage in self._stages if stage.report is not None]

    @property
    def places(self) -> list[Place]:
        return [place_of(stage.report) for stage in self._stages]

    # -- the protocol -----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        self._wakeup.set()

    def unresponsive(self, message: str) -> StageDied | None:
        return self._end_at_fault(message, self._ask(), math.inf)

    def diagnose(self, message: str, limit_s: float) -> StageDied:
        doings = self._ask()
        if self._death is not None and self._death.cause != "link":
            return self._death
        seen = ", ".join(f"{s.name} is {d and d.activity}" for s, d in zip(self._stages, doings, strict=True))
        return self._end_at_fault(message, doings, limit_s) or StageDied(
            f"{message}: no stage is to blame, so a link is ({seen})", "link"
        )

    def _ask(self) -> list[Doing | None]:
        """What each stage does now; None for one that does not say so in time."""
        asked = [stage.actor.doing.remote() for stage in self._stages]
        ray.wait(asked, num_returns=len(asked), timeout=ASK_S)
        return [doing_of(ref) for ref in asked]

    def _end_at_fault(self, message: str, doings: list[Doing | None], limit_s: float) -> StageDied | None:
        index = at_fault(doings, limit_s)
        if index is None:
            return None
        stage, doing = self._stages[index], doings[index]
        stage.kill()
        what = "does not answer" if doing is None else f"has been {doing.activity} for {doing.seconds:.1f} s"
        return StageDied(f"{message}: {stage.name} {what}", "hung")

    def recover(self, epoch: int, fresh: bool = False) -> int:
        """Replace the stages that are lost, or all if `fresh`, in their bundles; link all of them anew."""
        self._halt()
        lost = [stage for stage in self._stages if fresh or not stage.is_sound()]
        control = self._open_control()
        with self._lock:
            self._control, self._halted, self._death = control, threading.Event(), None
        self._timings.clear()
        self._copied.clear()
        self._loaded.clear()
        deadline = time.monotonic() + self._config.pipeline.start_timeout_s
        for stage in lost:
            stage.replace()
        self._await_placed(lost)
        self._load(lost, deadline)
        self._run(epoch, deadline)
        return len(lost)

    def kill(self) -> None:
        for stage in self._stages:
            stage.kill()

    def close(self) -> None:
        try:
            self._halt()
        except Exception as error:  # closing after a failure: whatever is left is killed below
            log.info("stages did not stop by themselves: %s", error)
        if self.num_places:
            dropped = [stage.actor.drop_copies.remote() for stage in self._stages]
            ray.wait(dropped, num_returns=len(dropped), timeout=HEAR_S)
        self._end_all()

    # -- start and stop ---------------------------------------------------------------------------------------------

    def _open_control(self) -> ControlServer:
        interface = self._config.pipeline.network_interface
        host = interface_address(interface) if interface else ray.util.get_node_ip_address()
        return ControlServer(host, len(self._stages), self._wakeup)

    def _await_placed(self, stages: list[StageHandle]) -> None:
        """Raises `EngineStopped`, for others may have a place: there is no use in waiting with the streams."""
        deadline = time.monotonic() + PLACE_S
        for stage in stages:
            if not stage.answers(max(0.0, deadline - time.monotonic())):
                raise EngineStopped(f"{stage.name} found no place, or could not start, within {PLACE_S:g} s")

    def _load(self, stages: list[StageHandle], deadline: float) -> None:
        """All of them at once, with progress; then the cache of each."""
        loads = [stage.actor.load.remote(stage.predecessor) for stage in stages]
        pending = loads
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            self._get(done, deadline)
            if pending:
                shares = [stage.actor.progress.remote() for stage in stages]
                ready, _ = ray.wait(shares, num_returns=len(shares), timeout=POLL_S)
                self._on_progress(sum(self._get(ready, deadline)) / len(stages))
            self._check_deadline(deadline, "load its weights", [loads.index(ref) for ref in pending])
        self._on_progress(1.0)
        for stage, report in zip(stages, self._get(loads, deadline), strict=True):
            stage.report = report
            log.info(
                "%s: layers %d-%d, %.1f M parameters, room for %d KV blocks; started and loaded in %.1f s",
                stage.name, stage.spec.layers.start, stage.spec.layers.stop - 1, report.num_parameters / 1e6,
                report.num_blocks, time.monotonic() - stage.wanted,
            )  # fmt: skip
        self.num_blocks = self.num_blocks or min(report.num_blocks for report in self.stages)
        self.num_places = self.num_places or min(report.num_places for report in self.stages)
        self.copy_window = self.copy_window or min(report.copy_window for report in self.stages)
        self._get([stage.actor.allocate.remote(self.num_blocks, self.num_places) for stage in stages], deadline)

    def _run(self, epoch: int, deadline: float) -> None:
        """Link all stages and let them run; the spares are started once nobody waits."""
        self._link(epoch, deadline)
        for i, stage in enumerate(self._stages):
            stage.running = stage.actor.run.remote(self._control.address(i), epoch)
        threading.Thread(target=self._watch, args=(self._halted,), name="stage-watch", daemon=True).start()
        self._await_ready(epoch, deadline)
        for stage in self._stages:
            stage.prepare_spare()

    def _link(self, epoch: int, deadline: float) -> None:
        if self.depth == 1:
            return
        listening = self._get([stage.actor.listen.remote(LINK_S) for stage in self._stages], deadline)
        key = f"epoch-{epoch}-{secrets.token_hex(16)}"
        refs = [stage.actor.link.remote(key, listening[i - 1], LINK_S) for i, stage in enumerate(self._stages)]
        self._feeds = not self._get(refs, deadline)[0]

    def _await_ready(self, epoch: int, deadline: float) -> None:
        waiting = set(range(self.depth))
        while waiting:
            self._raise_if_dead()
            self._check_deadline(deadline, "open its control channel", sorted(waiting))
            message = self._control.receive(POLL_S)
            if isinstance(message, Ready) and message.epoch == epoch:
                waiting.discard(message.stage)

    def _get(self, refs: list[Any], deadline: float) -> list[Any]:
        """`ray.get` with our errors: what a stage raised as a `ValueError` is for the user."""
        try:
            return list(ray.get(refs, timeout=max(0.0, deadline - time.monotonic())))
        except ray.exceptions.GetTimeoutError as error:
            timeout = self._config.pipeline.start_timeout_s
            raise StageDied(f"the stages did not start within pipeline.start_timeout_s = {timeout:g} s") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ValueError):
                raise ValueError(str(cause)) from error
            if isinstance(cause, LinkBroken):
                raise StageDied(f"the stages could not be linked: {cause}", "link") from error
            raise StageDied(f"a stage failed to start: {type(cause).__name__}: {cause}", "start") from error
        except RayActorError as error:
            raise StageDied(f"a stage died while it started: {error}", "start") from error

    def _check_deadline(self, deadline: float, what: str, stages: list[int]) -> None:
        if time.monotonic() > deadline and stages:
            names = ", ".join(map(str, stages))
            timeout = self._config.pipeline.start_timeout_s
            raise StageDied(f"stage {names} did not {what} within pipeline.start_timeout_s = {timeout:g} s", "start")

    def _watch(self, halted: threading.Event) -> None:
        """In its own thread: the end of any run() is a death, and the first cause of it is looked for."""
        runs = {stage.running: stage for stage in self._stages}
        while not halted.is_set():
            done, _ = ray.wait(list(runs), num_returns=1, timeout=POLL_S)
            if done:
                done, _ = ray.wait(list(runs), num_returns=len(runs), timeout=SETTLE_S)
                deaths = [runs[run].end().death for run in done]
                first = min(deaths, key=lambda death: BLAME.index(death.cause))
                with self._lock:
                    if not halted.is_set():
                        self._death = first
                        self.wake()
                return

    def _halt(self) -> None:
        """Make the stages leave their loops, and close the control channel. Safe to call twice."""
        with self._lock:
            if self._halted.is_set():
                return
            self._halted.set()
        self._control.stop()
        for stage in self._still_running(HEAR_S):
            stage.actor.let_go.remote()
        self._still_running(LEAVE_S)
        self._control.close()

    def _still_running(self, timeout_s: float) -> list[StageHandle]:
        """The stages that have not left their loops after so long; sooner if all have."""
        runs = {stage.running: stage for stage in self._stages if stage.running is not None}
        if not runs:
            return []
        _, late = ray.wait(list(runs), num_returns=len(runs), timeout=timeout_s)
        return [runs[run] for run in late]

    def _end_all(self) -> None:
        for stage in self._stages:
            stage.close()
        with self._lock:
            if not self._halted.is_set():
                self._halted.set()
                self._control.close()


def place_of(report: LoadReport | None) -> Place:
    """Of a stage that is being replaced nothing is known."""
    if report is None:
        return Place("", ())
    return Place(report.node, tuple(gpu for gpu in (report.visible_devices or "").split(",") if gpu), report.pid)

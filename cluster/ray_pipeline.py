"""A pipeline whose stages are Ray actors, one per bundle of a placement group."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import ray
import zmq
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import EngineConfig
from cluster.errors import StageDied
from cluster.stage_actor import LoadReport, StageActor, StageSpec
from cluster.transport import ControlServer, Ready, interface_address
from model.batch import Batch, SampledTokens, StageTiming, StepOutput
from model.config import StageLayers

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # how long stages get to leave their loops before they are killed
POLL_S = 0.5  # how often loading progress and run refs are looked at

Progress = Callable[[float], None]


class RayPipeline:
    """Stage actors in `group`, stage i in bundle `first_bundle + i`. The constructor returns when all are running.

    Raises `ValueError` for what the user must change (a bad checkpoint, too little memory) and `StageDied` for a stage
    that did not survive its start.
    """

    def __init__(
        self,
        config: EngineConfig,
        layers: Sequence[StageLayers],
        max_model_len: int,
        group: PlacementGroup,
        first_bundle: int,
        on_progress: Progress = lambda share: None,
    ) -> None:
        self._specs = [StageSpec(i, part, config, max_model_len) for i, part in enumerate(layers)]
        self._config = config
        self._group = group
        self._first_bundle = first_bundle
        self._on_progress = on_progress
        self._lock = threading.Lock()  # guards _control against wake() during close
        self._start(epoch=0)

    @property
    def depth(self) -> int:
        return len(self._specs)

    @property
    def stages(self) -> list[LoadReport]:
        """What each stage holds, and where."""
        return self._reports

    @property
    def num_blocks(self) -> int:
        """KV blocks that every stage has room for."""
        return min(report.num_blocks for report in self._reports)

    # -- the protocol -----------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        self._raise_if_dead()
        try:
            self._control.send(batch)
        except zmq.ZMQError as error:
            raise StageDied(f"a stage is not reachable: {error}") from error

    def receive(self, timeout: float | None) -> StepOutput | StageTiming | None:
        self._raise_if_dead()
        try:
            message = self._control.receive(timeout)
        except msgspec.DecodeError as error:
            raise StageDied(f"a stage sent what is no valid message: {error}") from error
        if message is None:
            self._raise_if_dead()
        assert not isinstance(message, Ready), "stages say that they are ready only once, at the start"
        if isinstance(message, StepOutput) and message.token_ids and self.depth > 1:
            self._feed_first_stage(message)
        return message

    def _feed_first_stage(self, output: StepOutput) -> None:
        """At once, before the scheduler looks at it: a batch may be waiting there for these tokens."""
        try:
            self._control.send_tokens(SampledTokens(output.step_id, output.token_ids))
        except zmq.ZMQError as error:
            raise StageDied(f"the first stage is not reachable: {error}") from error

    def wake(self) -> None:
        with self._lock:
            if not self._stopping.is_set():
                self._control.wake()

    def recover(self, epoch: int) -> None:
        """Replace all stages: fresh actors in the same bundles load, link and run again."""
        self._stop()
        self._start(epoch)

    def close(self) -> None:
        try:
            self._control.send(None)
            ray.wait(self._runs, num_returns=len(self._runs), timeout=STOP_TIMEOUT_S)
        except Exception as error:  # closing after a failure: whatever is left is killed below
            log.info("stages did not stop by themselves: %s", error)
        self._stop()

    # -- start and stop ---------------------------------------------------------------------------------------------

    def _start(self, epoch: int) -> None:
        self._death: StageDied | None = None
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._stopping = threading.Event()
        deadline = time.monotonic() + self._config.pipeline.start_timeout_s
        self._control = self._open_control()
        try:
            self._actors = [self._place(spec) for spec in self._specs]
            self._reports: list[LoadReport] = self._load(deadline)
            self._link(epoch, deadline)
            self._runs = [a.run.remote(self._control.address(i), epoch) for i, a in enumerate(self._actors)]
            self._watch = threading.Thread(target=self._watch_runs, name="stage-watch", daemon=True)
            self._watch.start()
            self._await_ready(epoch, deadline)
        except BaseException:
            self._stop()
            raise

    def _open_control(self) -> ControlServer:
        interface = self._config.pipeline.network_interface
        host = interface_address(interface) if interface else ray.util.get_node_ip_address()
        return ControlServer(host, self.depth)

    def _place(self, spec: StageSpec) -> Any:
        bundle = self._first_bundle + spec.index
        resources = self._group.bundle_specs[bundle]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        actor_class: Any = ray.remote(StageActor)
        return actor_class.options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_concurrency=2,  # run() and progress()
            scheduling_strategy=strategy,
        ).remote(spec)

    def _load(self, deadline: float) -> list[LoadReport]:
        """All stages at once, with progress."""
        loads = [actor.load.remote() for actor in self._actors]
        pending = loads
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            self._get(done, deadline)
            if pending:
                shares = [actor.progress.remote() for actor in self._actors]
                ready, _ = ray.wait(shares, num_returns=len(shares), timeout=POLL_S)
                self._on_progress(sum(self._get(ready, deadline)) / self.depth)
            self._check_deadline(deadline, "load its weights", [loads.index(ref) for ref in pending])
        self._on_progress(1.0)
        reports: list[LoadReport] = self._get(loads, deadline)
        for spec, report in zip(self._specs, reports, strict=True):
            log.info(
                "stage %d: layers %d-%d, %.1f M parameters, room for %d KV blocks, on %s pid %d",
                spec.index, spec.layers.start, spec.layers.stop - 1, report.num_parameters / 1e6,
                report.num_blocks, report.node, report.pid,
            )  # fmt: skip
        return reports

    def _link(self, epoch: int, deadline: float) -> None:
        listening = self._get([actor.listen.remote() for actor in self._actors[:-1]], deadline)
        addresses = [None, *listening]
        refs = [
            a.link.remote(epoch, address, self.num_blocks) for a, address in zip(self._actors, addresses, strict=True)
        ]
        self._get(refs, deadline)

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
            raise StageDied(f"a stage failed to start: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise StageDied(f"a stage died while it started: {error}") from error

    def _check_deadline(self, deadline: float, what: str, stages: list[int]) -> None:
        if time.monotonic() > deadline and stages:
            names = ", ".join(map(str, stages))
            timeout = self._config.pipeline.start_timeout_s
            raise StageDied(f"stage {names} did not {what} within pipeline.start_timeout_s = {timeout:g} s")

    def _watch_runs(self) -> None:
        """In its own thread: the end of any run() is the death of its stage."""
        runs, stopping = list(self._runs), self._stopping
        while not stopping.is_set():
            done, _ = ray.wait(runs, num_returns=1, timeout=POLL_S)
            if done and not stopping.is_set():
                self._death = self._post_mortem(runs.index(done[0]), done[0])
                self.wake()
                return

    def _post_mortem(self, stage: int, run: Any) -> StageDied:
        report = self._reports[stage]
        where = f"stage {stage} (pid {report.pid} on {report.node})"
        try:
            ray.get(run)
            return StageDied(f"{where} left its loop unasked")
        except RayTaskError as error:
            return StageDied(f"{where} failed: {type(error.cause).__name__}: {error.cause}")
        except RayActorError as error:
            return StageDied(f"{where} died: {str(error).strip().splitlines()[-1].strip()}")

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise self._death

    def _stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        with self._lock:
            if not self._stopping.is_set():
                self._stopping.set()
                self._control.close()

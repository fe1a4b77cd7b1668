"""A run: deploy, learn what is right, then break things under load and watch."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from model.families import SHAPES
from ops.chaos.faults import INJECTORS, Fault, NoVictim
from ops.chaos.nodes import Nodes
from ops.chaos.report import FaultRecord, Report
from ops.chaos.service import MODEL, Service, Setting, open_network
from ops.chaos.traffic import (
    Case,
    Traffic,
    make_cases,
    undisturbed,
    unstable,
)  # fmt: skip
from ops.chaos.verdict import Window, sum_up
from ops.chaos.witness import (
    OURS,
    Line,
    await_true,
    census,
    kv_blocks_in_use,
    listening_ports,
    placement_groups,
)  # fmt: skip
from ops.local import LocalError

HEAL_TIMEOUT_S = 180.0
LAST_STREAMS_S = 120.0  # for the streams that are open at the end; then they hang
LOOK_S = 0.2

Say = Callable[[str, bool], None]  # what happens; whether it only says how far things are


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done to the service."""

    kinds: Sequence[str]  # of faults; each is drawn from these
    streams: int = 64
    requests: int = 1000  # at least so many
    faults: int = 1  # at least so many
    every_s: float | None = None  # between faults; None: as soon as the last one has healed
    calm_s: float = 2.0  # between healing and the next fault
    hold_s: float = 15.0  # how long a process stays stopped, a link spoiled, a disk full
    cases: int = 64  # different requests
    tokens: tuple[int, int] = (64, 192)  # shortest and longest answer
    seed: int = 0


def run(setting: Setting, plan: Plan, say: Say = lambda text, passing: None, logs_to: Path | None = None) -> Report:
    """Everything from an empty machine to an empty machine; all logs go to `logs_to` if it is given.

    Raises `LocalError` if the service cannot be started.
    """
    report = Report({**asdict(setting), **asdict(plan)}, plan.seed)
    with ExitStack() as stack:
        network = open_network(setting)
        if network is not None:
            stack.enter_context(network)
        nodes = stack.enter_context(Nodes(network, setting.small_disks, setting.haproxy))
        if logs_to is not None:
            stack.callback(nodes.copy_logs, logs_to)
        service = Service(nodes, setting)
        say("starting the nodes and the service", False)
        service.start()
        asyncio.run(Torment(service, plan, report, say).run())
        say("shutting down", False)
        _shut_down(service, report)
    return report


def _shut_down(service: Service, report: Report) -> None:
    """Afterwards nothing of ours may be left on nodes that live on."""
    service.shutdown()
    await_true(lambda: not any(census(service.nodes.processes())[kind] for kind in OURS), 30)
    counts = census(service.nodes.processes())
    report.leftovers["processes after shutdown"] = sum(counts[kind] for kind in OURS)
    await_true(lambda: placement_groups(service.nodes) == 0, 10)
    report.leftovers["placement groups after shutdown"] = placement_groups(service.nodes)


class Torment:
    """Traffic in this thread's event loop, faults from another one."""

    def __init__(self, service: Service, plan: Plan, report: Report, say: Say) -> None:
        self._service = service
        self._plan = plan
        self._report = report
        self._say = say
        self._rng = random.Random(plan.seed)
        self._made: list[Fault] = []
        self._round: list[str] = []  # kinds still to be made in this round
        self._windows: list[Window] = []
        self._ended = threading.Event()

    async def run(self) -> None:
        plan, service = self._plan, self._service
        self._say("learning what is right", False)
        vocab = SHAPES["test-1m"].vocab_size
        cases, self._report.left_out = await undisturbed(
            service.doors, make_cases(plan.cases, MODEL, vocab, plan.tokens, plan.seed), plan.streams
        )
        ports = listening_ports(service.nodes.processes())
        self._report.started = time.time()
        traffic = await self._under_load(cases)
        self._report.seconds = time.time() - self._report.started
        if not self._report.unhealed and not self._report.hung:
            await self._forgive_unstable(traffic)
        service.logs.follow()
        sum_up(self._report, traffic.outcomes, self._made, self._windows, service.logs)
        self._look_for_leftovers(ports)

    async def _forgive_unstable(self, traffic: Traffic) -> None:
        """What is wrong without faults too says nothing about them."""
        wrong = [outcome for outcome in traffic.outcomes if outcome.ending == "wrong" and outcome.text]
        found = await unstable(self._service.doors, traffic.cases, wrong)
        self._report.left_out += len(found)
        traffic.outcomes = [o for o in traffic.outcomes if not (o.ending == "wrong" and o.case in found)]

    async def _under_load(self, cases: Sequence[Case]) -> Traffic:
        traffic = Traffic(self._service.doors, cases, self._plan.streams)
        load = asyncio.create_task(traffic.run_until_stopped())
        try:
            await asyncio.to_thread(self._torment, traffic)
            traffic.stopping = True
            _, hanging = await asyncio.wait({load}, timeout=LAST_STREAMS_S)
            self._report.hung = len(traffic.opened) if hanging else 0
        finally:
            self._ended.set()
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        return traffic

    # -- in the other thread ------------------------------------------------------------------------------------------

    def _torment(self, traffic: Traffic) -> None:
        plan = self._plan
        time.sleep(plan.calm_s)
        while not self._ended.is_set() and (traffic.finished < plan.requests or len(self._made) < plan.faults):
            began = time.monotonic()
            self._one_fault(traffic)
            if self._report.unhealed:
                self._say("the last fault has not healed: no further ones", False)
                return
            pause = plan.calm_s if plan.every_s is None else max(plan.calm_s, began + plan.every_s - time.monotonic())
            self._ended.wait(pause)

    def _one_fault(self, traffic: Traffic) -> None:
        """Rounds of all kinds: the first in the order given, the others shuffled."""
        self._round = self._round or list(self._plan.kinds if not self._made else self._shuffled())
        kind = self._round.pop(0)
        try:
            fault = INJECTORS[kind](self._service, self._rng)
        except NoVictim as error:
            raise LocalError(f"{kind}: {error}") from error
        self._made.append(fault)
        self._tell(traffic, f"{fault.kind} {fault.target}")
        notice, recovered = self._watch(fault, traffic)
        self._windows.append((fault.at, recovered or time.time()))
        alive = {process.pid for process in self._service.nodes.processes()}
        self._report.faults.append(
            FaultRecord(
                fault.kind,
                fault.target,
                fault.at - self._report.started,
                notice.time - fault.at if notice else None,
                notice.message[:200] if notice else "",
                recovered - fault.at if recovered else None,
                replaced=len(set(fault.kept) - alive),
            )
        )

    def _shuffled(self) -> list[str]:
        return self._rng.sample(list(self._plan.kinds), len(self._plan.kinds))

    def _watch(self, fault: Fault, traffic: Traffic) -> tuple[Line | None, float | None]:
        """Until all is well again: the first notice of the fault, and when that was."""
        notice: Line | None = None
        deadline = fault.at + HEAL_TIMEOUT_S
        while time.time() < deadline and not self._ended.is_set():
            self._service.nodes.supervise()
            self._service.logs.follow()
            notice = notice or self._service.logs.first_notice(fault.at)
            self._undo_in_time(fault)
            if fault.undo is None and self._is_well(fault, traffic):
                return notice, time.time()
            self._tell(traffic, f"{fault.kind} {fault.target}, {time.time() - fault.at:.0f} s ago", passing=True)
            time.sleep(LOOK_S)
        return notice, None

    def _undo_in_time(self, fault: Fault) -> None:
        """After `hold_s`, or as soon as the service has ended what was stopped."""
        ended = fault.stopped and all(p.pid != fault.stopped for p in self._service.nodes.processes())
        if fault.undo is not None and (ended or time.time() > fault.at + self._plan.hold_s):
            fault.undo()
            fault.undo = None

    def _is_well(self, fault: Fault, traffic: Traffic) -> bool:
        """The victims are gone, everything is there again, and every stream that was open then has gone on."""
        for arrivals in list(traffic.opened.values()):
            if arrivals and arrivals[-1] < fault.at:
                return False
        alive = {process.pid for process in self._service.nodes.processes()}
        if alive & set(fault.victims) or not self._service.is_whole():
            return False
        return (
            fault.kind != "head" or placement_groups(self._service.nodes) is not None
        )  # the new head knows the cluster

    def _tell(self, traffic: Traffic, what: str, passing: bool = False) -> None:
        bad = sum(outcome.ending != "right" for outcome in traffic.outcomes)
        counts = f"{traffic.finished} of {self._plan.requests} requests, {bad} not right; {len(self._made)} faults"
        self._say(f"{counts}; now: {what}", passing)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def _look_for_leftovers(self, ports_before: int) -> None:
        """With no request open, and everything healed: what is there that was not there before?"""
        service, left = self._service, self._report.leftovers
        await_true(lambda: kv_blocks_in_use(service.nodes) == 0, 20, 0.5)
        left["kv blocks in use"] = kv_blocks_in_use(service.nodes)
        counts = census(service.nodes.processes())
        left["engines too many"] = counts["engine"] - service.engines
        left["stages too many"] = counts["stage"] - service.stages
        left["gateways too many"] = counts["gateway"] - service.setting.gateways
        groups = placement_groups(service.nodes)
        left["placement groups too many"] = "unknown" if groups is None else groups - service.engines
        left["listening ports too many"] = max(0, listening_ports(service.nodes.processes()) - ports_before)

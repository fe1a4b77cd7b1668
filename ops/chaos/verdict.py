"""What a run means: every request's end, and of every fault, what it did to the streams it hit and to all others."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from ops.chaos.faults import Fault
from ops.chaos.report import FaultRecord, Report
from ops.chaos.traffic import Outcome, longest_first_waits, longest_pauses
from ops.chaos.witness import Logs, Stay

EXCUSED_S = 10.0  # a connection through a killed process breaks within this
SHOWN = 12  # details of what went wrong

Window = tuple[float, float]  # from a fault to its recovery, unix seconds
Stays = Mapping[str, Sequence[Stay]]


def sum_up(
    report: Report, outcomes: Sequence[Outcome], faults: Sequence[Fault], windows: Sequence[Window], logs: Logs
) -> None:
    """Fill in the report, whose records of faults are in the order of `faults` and `windows`."""
    seen, stays = logs.finished_requests(), logs.stays()
    for outcome in outcomes:
        if outcome.ending == "truncated" and is_excused(outcome, faults, seen):
            report.excused += 1
        else:
            _count(report, outcome)
    for record, fault, window in zip(report.faults, faults, windows, strict=True):
        measure(record, fault, window, outcomes, stays)
        record.stage_start_s = logs.stage_start(*window)
    report.calm_longest_gap_s = calm_gap(outcomes, windows)


def _count(report: Report, outcome: Outcome) -> None:
    report.requests += 1
    report.retried += outcome.refusals > 0
    if outcome.ending == "right":
        return
    name = "failed" if outcome.ending == "refused" else outcome.ending
    setattr(report, name, getattr(report, name) + 1)
    if len(report.details) < SHOWN:
        at, chunks = outcome.ended - report.started, len(outcome.arrivals)
        report.details.append(f"{outcome.ending} at {at:.1f} s after {chunks} chunks: {outcome.detail}")


def is_excused(outcome: Outcome, faults: Iterable[Fault], seen: set[str]) -> bool:
    """Its connection went through what was killed: by its address, or no living gateway has heard its end."""
    near = [f for f in faults if f.cuts_clients and f.at <= outcome.ended <= f.at + EXCUSED_S]
    unheard = outcome.request_id not in seen
    return any(unheard if f.cuts_clients == "gateway" else outcome.url == f.cuts_clients for f in near)


def measure(record: FaultRecord, fault: Fault, window: Window, outcomes: Sequence[Outcome], stays: Stays) -> None:
    """The silences of streams that the fault hit, and those of all others."""
    hit: list[Outcome] = []
    others: list[Outcome] = []
    for outcome in outcomes:
        its = stays.get(outcome.request_id, ())
        if not its or its[-1].until > fault.at:  # else only its last chunks were still on their way
            (hit if is_hit(fault, window, its) else others).append(outcome)
    pauses = longest_pauses(hit, *window)
    record.streams_hit = len(pauses)
    record.longest_pause_s = next(iter(pauses), None)
    record.others_longest_gap_s = next(iter(longest_pauses(others, *window)), None)
    record.longest_first_wait_s = longest_first_waits(outcomes, *window)


def is_hit(fault: Fault, window: Window, stays: Sequence[Stay]) -> bool:
    """Whether it was on a pipeline or came through a gateway that the fault hit, or had to move meanwhile."""
    start, end = window
    began = 0.0
    for stay in stays:
        here = stay.replica in fault.pipelines or (fault.gateway and stay.gateway == fault.gateway)
        if began < end and stay.until > start and here:
            return True
        if stay.moved and start <= stay.until <= end:
            return True
        began = stay.until
    return False


def calm_gap(outcomes: Iterable[Outcome], windows: Sequence[Window]) -> float | None:
    """The longest silence of any stream while nothing was broken."""
    gaps = (
        b - a
        for outcome in outcomes
        for a, b in itertools.pairwise(outcome.arrivals)
        if not any(a < end and b > start for start, end in windows)
    )
    return max(gaps, default=None)

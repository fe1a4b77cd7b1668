"""What a run under faults has shown, as numbers."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table


@dataclass(slots=True)
class FaultRecord:
    """One fault and what came of it; seconds since the fault, None for what was not seen."""

    kind: str
    target: str
    at_s: float  # since the start of the run
    detect_s: float | None  # until the first of our processes said so
    noticed: str  # what it said
    recover_s: float | None  # until everything was there again, ready, and every stream had gone on
    streams_hit: int = 0  # streams on the pipelines or through the gateway that it hit, or that had to move
    longest_pause_s: float | None = None  # of the streams that were hit
    others_longest_gap_s: float | None = None  # of all others
    stage_start_s: float | None = None  # the longest that a stage took to start and load meanwhile
    longest_first_wait_s: float = 0.0  # to the first token, of requests that began meanwhile
    replaced: int = 0  # processes that it cost and should not have


@dataclass(slots=True)
class Report:
    """A whole run."""

    setting: dict[str, Any]
    seed: int
    started: float = 0.0  # unix seconds
    seconds: float = 0.0
    requests: int = 0
    failed: int = 0  # an error instead of the rest of the answer, or never let in
    truncated: int = 0  # a connection that ended in the middle
    wrong: int = 0  # other tokens than without faults
    hung: int = 0  # streams that had to be given up
    excused: int = 0  # connections that went through the very process that was killed
    retried: int = 0  # requests that were refused at first, and served when tried again
    calm_longest_gap_s: float | None = None  # of any stream, while nothing was broken
    left_out: int = 0  # cases that give two texts even without faults
    faults: list[FaultRecord] = field(default_factory=list)
    leftovers: dict[str, Any] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)  # of what was not right, the first few

    @property
    def bad(self) -> int:
        """Requests that did not end as they should have."""
        return self.failed + self.truncated + self.wrong + self.hung

    @property
    def left(self) -> dict[str, Any]:
        """Leftovers that should not be."""
        return {name: value for name, value in self.leftovers.items() if value}

    @property
    def unhealed(self) -> list[FaultRecord]:
        return [fault for fault in self.faults if fault.recover_s is None]

    @property
    def passed(self) -> bool:
        return not self.bad and not self.left and not self.unhealed and not any(f.replaced for f in self.faults)

    def as_json(self) -> str:
        return json.dumps({"passed": self.passed, **asdict(self)})

    def render(self) -> RenderableType:
        """Tables for a terminal."""
        faults = Table("fault", "target", "at", "detected", "recovered", "hit", "longest pause", "others' gap", "wait",
                       "cost")  # fmt: skip
        for f in self.faults:
            faults.add_row(
                f.kind, f.target, f"{f.at_s:.0f} s", seconds(f.detect_s), seconds(f.recover_s),
                "-" if f.streams_hit is None else str(f.streams_hit), seconds(f.longest_pause_s),
                seconds(f.others_longest_gap_s), seconds(f.longest_first_wait_s), str(f.replaced),
            )  # fmt: skip
        totals = Table("requests", "failed", "truncated", "wrong", "hung", "excused", "retried", "seconds", "left over")
        totals.add_row(
            str(self.requests), str(self.failed), str(self.truncated), str(self.wrong), str(self.hung),
            str(self.excused), str(self.retried), f"{self.seconds:.0f}", json.dumps(self.left) if self.left else "none",
        )  # fmt: skip
        return Group(faults, totals, *self.details, "[green]passed[/green]" if self.passed else "[red]FAILED[/red]")


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"

"""One request's record: who asks for what, how long each part of it took, and how it ended.

Whatever serves a request finds its record in the context of its task, as log lines find the request's id.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from deployments.metrics import Part


@dataclass(slots=True, eq=False)
class Record:
    """Times are of the monotonic clock."""

    request_id: str = ""
    endpoint: str = "other"  # its name in metrics and logs
    tenant: str = "anonymous"
    started: float = field(default_factory=time.monotonic)  # its first byte
    first_token: float = 0.0  # 0: none has come
    status: int = 0  # of the answer; 0: none has been sent
    outcome: str = ""  # of a generation: stop, length, cancelled, rejected or error
    parts: dict[Part, float] = field(default_factory=dict)  # seconds
    fields: dict[str, Any] = field(default_factory=dict)  # further ones of its log line

    marks: list[tuple[str, float, float, dict[str, str]]] | None = None  # name, start, end; only of one that is traced

    def spend(self, part: Part, seconds: float, ended: float | None = None) -> None:
        """`ended`: it was one piece of time, which a trace shows."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        if ended is not None:
            self.mark(part, ended - seconds, ended)

    def mark(self, name: str, started: float, ended: float, **attributes: str) -> None:
        if self.marks is not None:
            self.marks.append((name, started, ended, attributes))


_current: ContextVar[Record] = ContextVar("record")


def begin(record: Record) -> None:
    """From now on it is the record of this task, and of those it starts."""
    _current.set(record)


def current() -> Record:
    """That of the request which is being served; outside of one, a record that nobody reads."""
    return _current.get(None) or Record()


@contextmanager
def spent(part: Part) -> Iterator[None]:
    """What is done inside is this part of the request, waiting included."""
    started = time.monotonic()
    try:
        yield
    finally:
        now = time.monotonic()
        current().spend(part, now - started, now)

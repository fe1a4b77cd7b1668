"""Which engine replica each open request of this gateway is on, and which of them are going, gone or silent.

Serve's router knows where a request goes and which replicas run, in a thread of its own; the token link knows which
engines speak. Put together they say, sooner than the end of a call would, that a stream has to go on elsewhere.
"""

import asyncio
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import CaravanError, EngineLeaving, EngineStopped

SILENCE_S = 4.0  # engines say something every second to whoever has a request with them


class Failing(Protocol):
    """What ends a stream's wait for tokens: see `token_link.Inbox`."""

    def fail(self, error: CaravanError) -> None: ...


@dataclass(slots=True)
class Assignment:
    """One open request."""

    inbox: Failing
    loop: asyncio.AbstractEventLoop
    replica: str = ""  # none yet
    since: float = 0.0

    def fail(self, error: CaravanError) -> None:
        self.loop.call_soon_threadsafe(self.inbox.fail, error)


class Assignments:
    """Safe from any thread. Times are `time.monotonic`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Assignment] = {}
        self._heard: dict[str, float] = {}
        self._suspects: set[str] = set()
        self.running: frozenset[str] | None = None  # replicas that Serve routes to; None: not known yet

    def open(self, request_id: str, inbox: Failing, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._open[request_id] = Assignment(inbox, loop)

    def close(self, request_id: str) -> None:
        with self._lock:
            self._open.pop(request_id, None)

    def assign(self, request_id: str, replica: str) -> None:
        """The router sends the request to `replica`."""
        with self._lock:
            assignment = self._open.get(request_id)
            if assignment is not None and assignment.replica != replica:
                assignment.replica, assignment.since = replica, time.monotonic()

    def set_running(self, replicas: Collection[str]) -> None:
        """Serve routes to these now. Requests on others are handed over, if there is anybody to take them."""
        with self._lock:
            self.running = frozenset(replicas)
            self._suspects &= self.running
            leaving = [a for a in self._open.values() if replicas and a.replica and a.replica not in self.running]
        for assignment in leaving:
            assignment.fail(EngineLeaving(f"engine {assignment.replica} takes no more requests"))

    def heard(self, replica: str) -> None:
        """The engine has just sent something."""
        self._heard[replica] = time.monotonic()
        if self._suspects:
            self.trust(replica)

    def trust(self, replica: str) -> None:
        """There is news of this replica."""
        with self._lock:
            self._suspects.discard(replica)

    def is_suspect(self, replica: str) -> bool:
        """Whether it fell silent, and nothing was heard of it since."""
        return replica in self._suspects

    def fail_silent(self) -> None:
        """End the waiting for engines that have said nothing for too long."""
        now = time.monotonic()
        with self._lock:
            silent = [
                a
                for a in self._open.values()
                if a.replica and now - max(a.since, self._heard.get(a.replica, 0.0)) > SILENCE_S
            ]
            self._suspects |= {a.replica for a in silent}
        for assignment in silent:
            assignment.fail(EngineStopped(f"engine {assignment.replica} has been silent for {SILENCE_S:g} s"))
            assignment.since = now  # once is enough


ASSIGNMENTS = Assignments()  # of this process: Serve makes the router by itself, so it cannot be handed one

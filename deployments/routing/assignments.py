"""Which engine replica each open request of this gateway is on, and which of them are going, silent or rebuilding.

Serve's router knows where a request goes and which replicas run, in a thread of its own; the token link knows which
engines speak. Put together they say, sooner than the end of a call would, that a stream has to go on elsewhere.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import CaravanError, EngineLeaving, EngineStopped
from deployments.routing.outlook import Prompt

SILENCE_S = 4.0  # engines say something every second to whoever has a request with them


class Failing(Protocol):
    """What ends a stream's wait for tokens: see `token_link.Inbox`."""

    def fail(self, error: CaravanError) -> None: ...


@dataclass(slots=True)
class Assignment:
    """One open request."""

    inbox: Failing
    loop: asyncio.AbstractEventLoop
    prompt: Prompt
    replica: str = ""  # none yet
    since: float = 0.0

    def fail(self, error: CaravanError) -> None:
        self.loop.call_soon_threadsafe(self.inbox.fail, error)


class Assignments:
    """Safe from any thread. Times are `time.monotonic`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Assignment] = {}
        self._counts: Counter[str] = Counter()  # open requests by replica; "": on none
        self._heard: dict[str, float] = {}
        self._silent: set[str] = set()
        self._rebuilding: set[str] = set()
        self.running: frozenset[str] | None = None  # replicas that Serve routes to; None: not known yet

    def open(
        self, request_id: str, inbox: Failing, loop: asyncio.AbstractEventLoop, prompt: Prompt | None = None
    ) -> None:
        with self._lock:
            assignment = self._open[request_id] = Assignment(inbox, loop, prompt or Prompt())
            self._counts[assignment.replica] += 1

    def close(self, request_id: str) -> None:
        with self._lock:
            assignment = self._open.pop(request_id, None)
            if assignment is not None:
                self._counts[assignment.replica] -= 1

    def assign(self, request_id: str, replica: str) -> None:
        """The router sends the request to `replica`."""
        with self._lock:
            assignment = self._open.get(request_id)
            if assignment is not None and assignment.replica != replica:
                self._put(assignment, replica)
                assignment.since = time.monotonic()

    def _put(self, assignment: Assignment, replica: str) -> None:
        """On `replica` from now on, or on none. Under the lock."""
        self._counts[assignment.replica] -= 1
        self._counts[replica] += 1
        assignment.replica = replica

    def count(self, replica: str) -> int:
        """How many open requests are on it."""
        return self._counts[replica]

    def prompt_of(self, request_id: str) -> Prompt:
        """What is known of it here."""
        assignment = self._open.get(request_id)
        return assignment.prompt if assignment is not None else Prompt()

    def replica_of(self, request_id: str) -> str:
        """Where it is now; empty if nowhere."""
        assignment = self._open.get(request_id)
        return assignment.replica if assignment is not None else ""

    def set_running(self, replicas: Collection[str]) -> None:
        """Serve routes to these now. Requests on others are handed over, if there is anybody to take them."""
        with self._lock:
            self.running = frozenset(replicas)
            self._counts = +self._counts  # forgets those that nothing is open on: replicas come and go
            self._silent &= self.running
            self._rebuilding &= self.running
            leaving = {a.replica for a in self._open.values() if a.replica} - self.running if replicas else set()
            for replica in leaving:
                self._move(replica, EngineLeaving(f"engine {replica} takes no more requests", "leaving"))

    def heard(self, replica: str, ready: bool) -> None:
        """The engine has just sent something, and said whether its pipeline works."""
        self._heard[replica] = time.monotonic()
        if ready and not self.is_doubtful(replica):
            return  # as always: no lock for every message
        with self._lock:
            self._silent.discard(replica)
            (self._rebuilding.discard if ready else self._rebuilding.add)(replica)
            others = (self.running or frozenset()) - self._silent - self._rebuilding - {replica}
            if not ready and others:
                self._move(replica, EngineLeaving(f"engine {replica} rebuilds its pipeline", "rebuilding"))

    def reported(self, replica: str) -> None:
        """Serve has news of it, so it is not silent, even if it has nothing to say to this gateway."""
        if replica in self._silent:
            with self._lock:
                self._silent.discard(replica)

    def is_doubtful(self, replica: str) -> bool:
        """Whether it has fallen silent, or rebuilds its pipeline: a last resort for new requests."""
        return replica in self._silent or replica in self._rebuilding

    def fail_silent(self) -> None:
        """End the waiting for engines that have said nothing for too long."""
        now = time.monotonic()
        with self._lock:
            waits = ((a.replica, now - max(a.since, self._heard.get(a.replica, 0.0))) for a in self._open.values())
            for replica in {replica for replica, seconds in waits if replica and seconds > SILENCE_S}:
                self._silent.add(replica)
                self._move(replica, EngineStopped(f"engine {replica} has been silent for {SILENCE_S:g} s"))

    def _move(self, replica: str, why: CaravanError) -> None:
        """End the waiting of all that is open on `replica`; whoever waits asks again, and is assigned anew."""
        for assignment in self._open.values():
            if assignment.replica == replica:
                assignment.fail(why)
                self._put(assignment, "")


ASSIGNMENTS = Assignments()  # of this process: Serve makes the router by itself, so it cannot be handed one

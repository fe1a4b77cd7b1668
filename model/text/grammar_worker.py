"""A process that judges what clients send, so that a grammar that crashes or hangs takes nothing else with it.

`python -m model.text.grammar_worker PATH`: JSON objects in, one a line, {"id", "kind", "text", "seconds", "nice"} or
{"cancel": id}; one out for each that is not cancelled, {"id", "error": null or why it is refused, "late": bool}. It
ends with its input.

Each constraint is judged by a child of its own that is forked when vocabulary and library are there already: it may be
killed at any time, and costs 10 ms. `seconds` are the processor time that it may take, so that a verdict does not
depend on what else the machine does; then it is `late`. What the library says that it ignores counts as an error: what
is promised is kept.
"""

import json
import os
import random
import re
import resource
import selectors
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.text.constraint import Constraint
from model.text.grammar import Grammars, Matcher, plain
from model.text.tokenizer import load_tokenizer
from model.weights import resolve_path

WALK = 12  # tokens
SLOW_MASK_S = 0.03  # for each token
HARMLESS = "The character itself will be matched"  # of an escape that escapes nothing, as re.escape writes it
# What the library would do, and does not: we refuse.
NOT_DONE = re.compile(r"[,;]?\s*((it|they|this) )?((will|is|are) (be )?)?(ignor\w+|falling back)[^.;]*", re.IGNORECASE)
MEMORY_BYTES = 2_000_000_000  # that a grammar may need
WALL = 20.0  # a child that gets less than this share of a processor, in all its time, is late too
CRASHED = "cannot be compiled: make it simpler"


@dataclass(slots=True)
class Child:
    """One constraint being judged."""

    request: int
    pid: int
    deadline: float  # by time.monotonic
    said: bytes = b""


class GrammarServer:
    """Forks a child for each constraint that comes in, and passes on what it says."""

    def __init__(self, path: str) -> None:
        tokenizer = load_tokenizer(resolve_path(path))
        self._grammars = Grammars(tokenizer)
        self._ends = tuple(sorted(tokenizer.eos_ids))
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._input = b""
        self._children: dict[int, Child] = {}  # by the pipe that its verdict comes through

    def run(self) -> None:
        """Until the input ends."""
        print(json.dumps({"ready": True}), flush=True)
        while True:
            soonest = min((child.deadline for child in self._children.values()), default=None)
            wait = None if soonest is None else max(0.0, soonest - time.monotonic())
            for key, _ in self._selector.select(wait):
                if key.fd == 0:
                    if not self._read_requests():
                        return self._end_all()
                elif key.fd in self._children:
                    self._read_verdict(key.fd)
            for pipe in [p for p, child in self._children.items() if child.deadline < time.monotonic()]:
                self._end(pipe)

    def _read_requests(self) -> bool:
        part = os.read(0, 1 << 20)
        *lines, self._input = (self._input + part).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "cancel" in request:
                for pipe in [p for p, child in self._children.items() if child.request == request["cancel"]]:
                    self._forget(pipe)
            else:
                self._fork(request)
        return bool(part)

    def _fork(self, request: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            _judge(self._grammars, request, self._ends, theirs)
        os.close(theirs)
        self._selector.register(ours, selectors.EVENT_READ)
        self._children[ours] = Child(request["id"], pid, time.monotonic() + WALL * request["seconds"])

    def _read_verdict(self, pipe: int) -> None:
        part = os.read(pipe, 1 << 16)
        self._children[pipe].said += part
        if not part:
            self._end(pipe)

    def _end(self, pipe: int) -> None:
        """It has said all, or is dead, or takes too long."""
        child = self._children[pipe]
        status = self._forget(pipe)
        if child.said:
            error, late = json.loads(child.said), False
        else:
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL)
            error = None if late else CRASHED
        print(json.dumps({"id": child.request, "error": error, "late": late}), flush=True)

    def _forget(self, pipe: int) -> int:
        """End the child at once; how it ended."""
        child = self._children.pop(pipe)
        self._selector.unregister(pipe)
        os.close(pipe)
        if not child.said:
            os.kill(child.pid, signal.SIGKILL)  # a child that has ended already keeps its own status
        return os.waitpid(child.pid, 0)[1]

    def _end_all(self) -> None:
        for pipe in list(self._children):
            self._forget(pipe)


def _judge(grammars: Grammars, request: dict[str, Any], ends: tuple[int, ...], pipe: int) -> None:
    """In the child: write the verdict, and end."""
    try:
        os.nice(request["nice"])
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # its signal ends the process
        with open("/proc/self/statm") as statm:
            limit = int(statm.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        verdict = json.dumps(problem(grammars, Constraint(request["kind"], request["text"], ends)))
        with os.fdopen(pipe, "w") as out:
            out.write(verdict)
    finally:
        os._exit(0)


def _seconds_per_mask(matcher: Matcher, end_ids: tuple[int, ...]) -> float:
    """The median along an answer that takes any of the tokens that may come."""
    rng, seconds = random.Random(0), [0.0]
    for _ in range(WALK):
        bits = np.unpackbits(np.frombuffer(matcher.mask, np.uint8), bitorder="little").nonzero()[0]
        token_id = int(rng.choice(bits))
        if token_id in end_ids:
            break
        started = time.thread_time()
        matcher.step(token_id)
        seconds.append(time.thread_time() - started)
    return statistics.median(seconds)


def problem(grammars: Grammars, constraint: Constraint) -> str | None:
    """Why a constraint is refused, or None."""
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            matcher = grammars.matcher(constraint, lambda matcher, token_id: None)
            matcher.step()
            if matcher.failure is not None:
                return matcher.failure
            if (seconds := _seconds_per_mask(matcher, constraint.end_ids)) > SLOW_MASK_S:
                return f"takes {1000 * seconds:.0f} ms for each token: make it simpler"
        except (ValueError, MemoryError) as error:
            return str(error) or "it needs too much memory"
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        for line in said.read().decode("utf-8", "replace").splitlines():
            if "Warning: " in line and HARMLESS not in line:
                warning = NOT_DONE.sub("", plain(line.split("Warning: ", 1)[1]))
                return f"cannot be guaranteed by this service: {warning.rstrip('. ')}"
        return None


if __name__ == "__main__":
    GrammarServer(sys.argv[1]).run()

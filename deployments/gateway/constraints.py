"""Constraints as clients write them, checked before an engine sees them."""

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import Any, cast

from deployments.errors import ApiError, bad_request
from model.text.constraint import MAX_CONSTRAINT_CHARS, Constraint

START_TIMEOUT_S = 120.0  # of the process that compiles
REMEMBERED = 1024  # verdicts
MAX_WAITING = 32  # requests that wait for a verdict; more are asked to come back
MAX_CHOICES = 1024


class GrammarWorker:
    """The process that compiles; see model/text/grammar_worker.py. Started when first needed, and after a death."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, constraint: Constraint, timeout_s: float) -> str | None:
        """Why a constraint is refused, or None. Raises `TimeoutError`, `EOFError`; `OSError` if it does not start."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        line = json.dumps({"kind": constraint.kind, "text": constraint.text})
        try:
            self._process.stdin.write(line.encode("ascii") + b"\n")
            self._process.stdin.flush()
            return self._answer(timeout_s)
        except (TimeoutError, BrokenPipeError, EOFError):
            self.close()
            raise

    def _start(self) -> None:
        command = [sys.executable, "-m", "model.text.grammar_worker", self._path]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        try:
            self._answer(START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise OSError("the process that compiles grammars did not start") from error

    def _answer(self, timeout_s: float) -> str | None:
        """The next line. Raises `TimeoutError`, or `EOFError` if the process ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        out, line = self._process.stdout.fileno(), b""
        deadline = time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(out, 65_536)
            if not part:
                raise EOFError
            line += part
        return cast("str | None", json.loads(line)["error"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class ConstraintChecker:
    """Says which constraints can be served, and remembers what it said. Safe from any thread."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._worker = GrammarWorker(path)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # one at a time asks the worker
        self._verdicts: OrderedDict[tuple[str, str], str | None] = OrderedDict()
        self._waiting = 0

    async def accept(self, constraint: Constraint, param: str) -> None:
        """`check`, without holding up the event loop."""
        if not self.known(constraint):
            await asyncio.to_thread(self.check, constraint, param)

    def check(self, constraint: Constraint, param: str) -> None:
        """May take long. Raises `ApiError`: 400 if it cannot be served, 503 if too many wait for an answer."""
        if self._waiting >= MAX_WAITING:
            raise ApiError(
                503, "too many constraints wait to be compiled; try again shortly", kind="server_error",
                code="engine_unavailable", headers={"Retry-After": "2"},
            )  # fmt: skip
        self._waiting += 1
        try:
            with self._lock:
                found = self._verdict(constraint)
        finally:
            self._waiting -= 1
        if found is not None:
            raise bad_request(f"{param}: {found}", param)

    def known(self, constraint: Constraint) -> bool:
        """Whether this one has been found good before."""
        return self._verdicts.get((constraint.kind, constraint.text), "") is None

    def _verdict(self, constraint: Constraint) -> str | None:
        key = (constraint.kind, constraint.text)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._worker.ask(constraint, self._timeout_s)
            except TimeoutError:
                self._verdicts[key] = f"takes longer than {self._timeout_s:g} s to compile: make it simpler"
            except (EOFError, BrokenPipeError):
                self._verdicts[key] = "cannot be compiled: make it simpler"
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        return self._verdicts[key]

    def close(self) -> None:
        with self._lock:
            self._worker.close()


def make_constraint(param: str, kind: str, value: Any, end_ids: frozenset[int]) -> Constraint:
    """`kind` is that of `Constraint`, or "choice". Raises `ApiError` that names `param`."""
    if not end_ids:
        raise bad_request(f"{param}: this model has no token that ends an answer, so none can be constrained", param)
    text, kind = _as_text(param, kind, value)
    if len(text) > MAX_CONSTRAINT_CHARS:
        raise bad_request(f"{param}: is longer than {MAX_CONSTRAINT_CHARS} characters", param)
    return Constraint(kind, text, tuple(sorted(end_ids)))  # type: ignore[arg-type]


def _as_text(param: str, kind: str, value: Any) -> tuple[str, str]:
    """A value as a constraint's text and kind."""
    if kind == "choice":
        return _choices(param, value), "grammar"
    if kind == "json_schema" and isinstance(value, dict | bool):
        return json.dumps(value), kind
    if not isinstance(value, str) or not value:
        what = "an object, or a string with one" if kind == "json_schema" else "a string that is not empty"
        raise bad_request(f"{param}: must be {what}", param)
    return value, kind


def _choices(param: str, value: Any) -> str:
    """A grammar of one of several strings."""
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= MAX_CHOICES
        or not all(isinstance(choice, str) and choice for choice in value)
    ):
        raise bad_request(f"{param}: must be up to {MAX_CHOICES} strings, none of them empty", param)
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)

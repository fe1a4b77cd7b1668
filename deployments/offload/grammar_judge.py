"""The process that judges constraints, as its gateway speaks to it; see model/text/grammar_worker.py."""

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from model.text.constraint import MAX_CONSTRAINT_CHARS, Constraint

START_TIMEOUT_S = 120.0
WALL = 20.0  # a verdict that gets less than this share of a processor counts as late (see grammar_worker.py)
ANSWER_S = 10.0  # how much later than that the process may say so
MAX_LINE = 8 * MAX_CONSTRAINT_CHARS  # bytes of a verdict: it may repeat what it is about


@dataclass(frozen=True, slots=True)
class Patience:
    """How much a verdict may cost."""

    seconds: float  # of a processor
    niceness: int  # 0 to 19: what others that want the processor get first


class GrammarJudge:
    """Started when first needed, and after a death. For one event loop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._numbers = itertools.count()
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, constraint: Constraint, patience: Patience) -> str | None:
        """Why a constraint is refused, or None. Cancelling it ends the work.

        Raises `TimeoutError` if it takes too long, `EOFError` if the process dies, `OSError` if it does not start.
        """
        async with self._starting:
            if self._process is None or self._process.poll() is not None:
                await self._start()
        assert self._writer is not None
        number = next(self._numbers)
        verdict = self._open[number] = asyncio.get_running_loop().create_future()
        question = {"kind": constraint.kind, "text": constraint.text}
        try:
            self._say(id=number, seconds=patience.seconds, nice=patience.niceness, **question)
            async with asyncio.timeout(ANSWER_S + WALL * patience.seconds):
                found = await verdict
        except TimeoutError:
            self.close()  # it hangs itself, or it would have said so
            raise
        except asyncio.CancelledError:
            self._say(cancel=number)
            raise
        finally:
            del self._open[number]
        if found["late"]:
            raise TimeoutError
        error = found["error"]
        assert error is None or isinstance(error, str)
        return error

    def _say(self, **request: Any) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps(request).encode("ascii") + b"\n")

    async def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "model.text.grammar_worker", self._path]
        with theirs:
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await reader.readline()
        except TimeoutError:
            ready = b""
        if not ready:
            self.close()
            raise OSError("the process that judges grammars did not start")
        self._reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                verdict = json.loads(line)
                waiting = self._open.get(verdict["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(verdict)
        self._fail_all()
        if self._process is not None:
            self._process.kill()

    def _fail_all(self) -> None:
        for waiting in self._open.values():
            if not waiting.done():
                waiting.set_exception(EOFError("the process that judges grammars has ended"))

    def close(self) -> None:
        """End the process, and with it whatever it works on."""
        with contextlib.suppress(RuntimeError):  # the event loop may have been closed before
            self._fail_all()
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # the event loop may have been closed before
                self._writer.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._reading = self._writer = self._process = None

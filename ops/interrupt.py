"""How a command that has started processes is asked to end, and how it asks another one."""

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_S = 30.0


def end_on_signals() -> None:
    """From now on SIGTERM raises `KeyboardInterrupt` as Ctrl-C does: whatever was started with `with` is ended.

    Ctrl-C too is set: a shell's background jobs start with it ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """A signal that would end the command does so at the end of this block; a second one at once.

    For what can only be ended once it has started: Ray, whose processes nobody knows of before `ray.init` returns.
    Does nothing but in the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    handlers = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def run(command: Sequence[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run` with its words captured, but a command that is cut short may end what it has started.

    Raises `subprocess.TimeoutExpired`.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.terminate()
            try:
                process.communicate(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)

"""How a command that has started processes is asked to end, and how it asks another one."""

import signal
import subprocess
from collections.abc import Sequence
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

"""Ends the Ray node of this container or machine as one wants it before it is switched off: `python -m ops.drain`.

Its `ray start --block` is told to end, upon which Ray drains the node: what runs there goes elsewhere, streams with
it. Returns when the node has ended, or after the timeout. The preStop hook of the chart's pods.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ops.processes import living_processes

POLL_S = 0.2


def main(
    timeout: Annotated[float, typer.Option(help="seconds that it may take")] = 600.0,
    pid: Annotated[int, typer.Option(help="of the `ray start --block`; default: the only one here")] = 0,
) -> None:
    """Drain this node and wait for its end."""
    nodes = [pid] if pid else list(starters())
    if len(nodes) > 1:
        typer.echo(f"several `ray start --block` run here ({', '.join(map(str, nodes))}): say which by --pid", err=True)
        raise typer.Exit(2)
    for node in nodes:
        with suppress(ProcessLookupError):
            os.kill(node, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while any(lives(node) for node in nodes):
        if time.monotonic() > deadline:
            typer.echo(f"the node did not end within {timeout:g} s", err=True)
            raise typer.Exit(1)
        time.sleep(POLL_S)


def starters() -> Iterator[int]:
    """Processes that are a `ray start --block`; not the shell that may have started one."""
    for process in living_processes():
        with suppress(OSError):
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
            if b"start" in words and b"--block" in words and b"python" in Path(os.fsdecode(words[0])).name.encode():
                yield process.pid


def lives(pid: int) -> bool:
    return any(process.pid == pid for process in living_processes())


if __name__ == "__main__":
    typer.run(main)

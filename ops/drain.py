"""Ends the Ray node of this container or machine as one wants it before it is switched off: `python -m ops.drain`.

First its clients: no new ones are sent here any more (a pod that is deleted is no endpoint), and answers on their way
through its port get time to end, for Ray takes a node for idle whose proxy still carries streams. Then `ray start
--block` is told to end, upon which Ray drains the node: what runs there goes elsewhere, streams with it. Returns when
the node has ended. The preStop hook of the chart's pods, ExecStop of the systemd units.
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
from ops.sockets import ESTABLISHED, sockets

POLL_S, CALM_S = 0.2, 1.0


def main(
    timeout: Annotated[float, typer.Option(help="seconds that clients may take, and again the node")] = 600.0,
    port: Annotated[int, typer.Option(help="of the service")] = 8000,
    pid: Annotated[int, typer.Option(help="of the `ray start --block`; default: the only one here")] = 0,
) -> None:
    """Drain this node and wait for its end."""
    nodes = [pid] if pid else list(starters())
    if len(nodes) > 1:
        typer.echo(f"several `ray start --block` run here ({', '.join(map(str, nodes))}): say which by --pid", err=True)
        raise typer.Exit(2)
    await_no_clients(port, timeout)
    for node in nodes:
        with suppress(ProcessLookupError):
            os.kill(node, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while any(lives(node) for node in nodes):
        if time.monotonic() > deadline:
            typer.echo(f"the node did not end within {timeout:g} s", err=True)
            raise typer.Exit(1)
        time.sleep(POLL_S)


def await_no_clients(port: int, timeout_s: float) -> None:
    """Until nobody is connected, for a moment: what probes is not there for long."""
    deadline = time.monotonic() + timeout_s
    calm = time.monotonic()
    while time.monotonic() < min(deadline, calm + CALM_S):
        if any(True for _ in sockets(port, ESTABLISHED)):
            calm = time.monotonic()
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

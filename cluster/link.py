"""The data path between two neighbouring stages: a process group of two over torch.distributed.

Legend: T tokens, C model dim.
"""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

UPSTREAM, DOWNSTREAM = 0, 1  # ranks in the pair: the sender and the receiver


class Rendezvous:
    """The sender's store, through which the pair finds each other; bound to the node's cluster address."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self.host = host
        self.store = TCPStore(
            host,
            0,  # any free port
            world_size=2,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )

    @property
    def address(self) -> tuple[str, int]:
        return self.host, int(self.store.port)


def join(address: tuple[str, int], timeout_s: float) -> TCPStore:
    """The receiver's view of its sender's store."""
    host, port = address
    return TCPStore(host, port, world_size=2, is_master=False, timeout=timedelta(seconds=timeout_s))


class Link:
    """One direction of traffic between neighbours. Every operation has a deadline; a dead peer is a RuntimeError."""

    def __init__(self, store: TCPStore, rank: int, host: str, epoch: int, timeout_s: float) -> None:
        """`host` is this node's address: left to itself gloo picks an interface by name resolution, often wrongly."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_s)
        self._peer = 1 - rank
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = ProcessGroupGloo(PrefixStore(f"epoch-{epoch}", store), rank, 2, options)
        self._store = store  # the group's connections last as long as their store
        self._sending: tuple[object, torch.Tensor] | None = None

    def send(self, hidden: torch.Tensor) -> None:
        """Send [T, C] while the caller goes on computing; waits only for the send before this one."""
        self.flush()
        hidden = hidden.contiguous()
        self._sending = (self._group.send([hidden], self._peer, 0), hidden)  # keep it alive until it is gone

    def flush(self) -> None:
        """Wait until everything sent has left."""
        if self._sending is not None:
            work, _ = self._sending
            self._sending = None
            work.wait(self._timeout)  # type: ignore[attr-defined]

    def receive(self, into: torch.Tensor) -> torch.Tensor:
        """Fill `into` with the next hidden state; the shape follows from the batch, so none is sent."""
        self._group.recv([into], self._peer, 0).wait(self._timeout)
        return into

    def close(self) -> None:
        self._sending = None

"""The data path between two neighbouring stages: a process group of two over torch.distributed.

Legend: T tokens, C model dim.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from cluster.errors import LinkBroken

UPSTREAM, DOWNSTREAM = 0, 1  # ranks in the pair: the sender and the receiver
TO_NEXT, FROM_PREVIOUS = "sending to the next stage", "receiving from the stage before"


class Link(Protocol):
    """One direction of traffic between neighbours, made anew for every epoch. Used by one thread.

    Every operation has a deadline; a neighbour that is dead or silent is a `LinkBroken`.
    """

    on_device: bool  # tensors stay on the GPU, and `receive` returns before they are there

    def send(self, hidden: torch.Tensor, timeout_s: float) -> None:
        """Send [T, C] while the caller goes on computing; waits only for the send before this one."""
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait until everything sent has left."""
        ...

    def receive(self, into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """Fill `into` with the next hidden state; the shape follows from the batch, so none is sent."""
        ...

    def is_waiting(self) -> bool:
        """Whether something that `receive` promised is not there yet. Safe from any thread."""
        ...

    def check(self) -> None:
        """Raises `LinkBroken` if what `receive` promised never came: ask before passing on what became of it."""
        ...

    def close(self) -> None:
        """Let go of the connection, whatever is still on its way."""
        ...


class Rendezvous:
    """The sender's store, through which the pair finds each other; bound to the node's cluster address."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self.host = host
        # A socket of our own: the store's would listen on all addresses of the node.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self.store = TCPStore(
            host,
            listener.getsockname()[1],
            world_size=2,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),  # the store's from now on
        )

    @property
    def address(self) -> tuple[str, int]:
        return self.host, int(self.store.port)


def join(address: tuple[str, int], timeout_s: float) -> TCPStore:
    """The receiver's view of its sender's store. Raises `LinkBroken` if nobody is there."""
    host, port = address
    with broken_if_it_fails(f"finding the stage before at {host}:{port}"):
        return TCPStore(host, port, world_size=2, is_master=False, timeout=timedelta(seconds=timeout_s))


class GlooLink:
    """A `Link` through host memory. A peer that dies is noticed at once, one that is cut off at the deadline."""

    on_device = False

    def __init__(self, store: TCPStore, rank: int, host: str, key: str, timeout_s: float) -> None:
        """`key`, which only the two ends know, is new for every epoch: a stranger does not find the pair in the store.

        `host` is this node's address: left to itself gloo picks an interface by name resolution, often wrongly.
        """
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=timeout_s)
        self._peer = 1 - rank
        with broken_if_it_fails("connecting with the neighbour"):
            self._group: Any = ProcessGroupGloo(PrefixStore(key, store), rank, 2, options)
        self._store: Any = store  # the group's connections last as long as their store
        self._sending: tuple[Any, torch.Tensor] | None = None

    def send(self, hidden: torch.Tensor, timeout_s: float) -> None:
        self.flush(timeout_s)
        hidden = hidden.contiguous()
        with broken_if_it_fails(TO_NEXT):
            self._sending = (self._group.send([hidden], self._peer, 0), hidden)  # keep it alive until it is gone

    def flush(self, timeout_s: float) -> None:
        if self._sending is not None:
            work, _ = self._sending
            self._sending = None
            with broken_if_it_fails(TO_NEXT):
                work.wait(timedelta(seconds=timeout_s))

    def receive(self, into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        with broken_if_it_fails(FROM_PREVIOUS):
            self._group.recv([into], self._peer, 0).wait(timedelta(seconds=timeout_s))
        return into

    def is_waiting(self) -> bool:
        return False  # `receive` waits itself

    def check(self) -> None:
        """`receive` has said it already."""

    def close(self) -> None:
        self._sending = self._group = self._store = None


def make_link(store: TCPStore, rank: int, host: str, key: str, timeout_s: float, device: torch.device) -> Link:
    """Over NCCL between two GPUs; through host memory on CPUs, and between stages that share a GPU, as NCCL refuses to.

    Both ends say which device they have, so both choose the same. Raises `LinkBroken`.
    """
    with broken_if_it_fails("meeting the neighbour"):
        theirs = exchanged(PrefixStore(f"{key}-devices", store), rank, identity(device))
    if fits_nccl(identity(device), theirs):
        from cluster.nccl_link import connect

        return connect(store, rank, host, key, timeout_s, device)
    return GlooLink(store, rank, host, key, timeout_s)


def identity(device: torch.device) -> str:
    """The same for two processes if they share a device that NCCL can use; empty if it is none."""
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def fits_nccl(mine: str, theirs: str) -> bool:
    return bool(mine and theirs) and mine != theirs


def exchanged(store: PrefixStore, rank: int, word: str) -> str:
    """What the other one of a pair gives for `word`; waits for it as long as the store does."""
    store.set(f"word-{rank}", word)
    return store.get(f"word-{1 - rank}").decode()


@contextmanager
def broken_if_it_fails(what: str) -> Iterator[None]:
    """torch's errors as ours, in one line."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).strip().splitlines()[0].split("] ", 1)[-1]
        raise LinkBroken(f"{what}: {words[:200]}") from error

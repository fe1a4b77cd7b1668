"""What two stages send through: one direction of hidden states, or of tokens, with deadlines.

Legend: T tokens, C model dim.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from cluster.errors import LinkBroken

UPSTREAM, DOWNSTREAM = 0, 1  # ranks in the pair: the sender and the receiver
TO_NEXT, FROM_PREVIOUS = "sending to the next stage", "receiving from the stage before"
TO_FIRST, FROM_LAST = "sending tokens to the first stage", "receiving tokens from the last stage"


class Link(Protocol):
    """One direction of traffic between neighbours, made anew for every epoch. Used by one thread.

    Every operation has a deadline; a neighbour that is dead or silent is a `LinkBroken`.
    """

    on_device: bool  # tensors stay on the GPU, `receive` returns before they are there, and any thread may `close`

    def send(self, hidden: torch.Tensor, timeout_s: float) -> None:
        """Send [T, C] while the caller goes on computing; waits only for the send before this one."""
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait until everything sent has left."""
        ...

    def receive(self, into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """Fill `into` with the next hidden state; the shape follows from the batch, so none is sent."""
        ...

    def check(self) -> None:
        """Raises `LinkBroken` if what `receive` promised never came: ask before passing on what became of it."""
        ...

    def close(self) -> None:
        """Let go of the connection, whatever is still on its way."""
        ...


def close_all(links: Iterable[Link | None]) -> None:
    """Those between GPUs at once: to let go of one waits for the device, which may wait for what comes by another."""
    open_ = [link for link in links if link is not None]
    threads = [threading.Thread(target=link.close, name="link-close") for link in open_ if link.on_device]
    for thread in threads:
        thread.start()
    for link in open_:
        if not link.on_device:
            link.close()
    for thread in threads:
        thread.join()


@contextmanager
def broken_if_it_fails(what: str) -> Iterator[None]:
    """torch's errors as ours, in one line."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).strip().splitlines()[0].split("] ", 1)[-1]
        raise LinkBroken(f"{what}: {words[:200]}") from error

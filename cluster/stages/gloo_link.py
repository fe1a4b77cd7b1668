"""A `Link` through host memory over gloo: between CPUs, and between stages that share a GPU."""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from cluster.stages.link import FROM_PREVIOUS, TO_NEXT, broken_if_it_fails


class GlooLink:
    """See `Link`. A peer that dies is noticed at once, one that is cut off at the deadline."""

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

    def check(self) -> None:
        """`receive` has said it already."""

    def close(self) -> None:
        self._sending = self._group = self._store = None

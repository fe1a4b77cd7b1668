"""One end of a link that is measured: the same rendezvous and the same `Link` as between two stages."""

import secrets
import time
from dataclasses import dataclass

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cluster.errors import LinkBroken
from cluster.stages.link import DOWNSTREAM, UPSTREAM, Link, close_all
from cluster.stages.rendezvous import Rendezvous, join, make_link

ROUNDS, PIECE_BYTES, PIECES = 20, 2**20, 32
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """What stages would get out of it."""

    kind: str  # nccl or gloo
    round_trip_s: float  # of a few bytes, the shortest of several
    bytes_per_s: float


class LinkEnd:
    """Lives on one node (or in the bundle of one stage); meets one neighbour after another."""

    def __init__(self, host: str, cuda: bool) -> None:
        self._host = host
        self._device = torch.device("cuda" if cuda else "cpu")
        self._rendezvous: Rendezvous | None = None

    def listen(self) -> tuple[tuple[str, int], str]:
        """Where the neighbour finds this end, and under which key."""
        self._rendezvous = Rendezvous(self._host, TIMEOUT_S)
        return self._rendezvous.address, secrets.token_hex(16)

    def send(self, key: str) -> LinkFigures | str:
        """Be upstream; returns the figures, or why there are none."""
        assert self._rendezvous is not None, "listen comes first"
        return self._measured(self._rendezvous.store, UPSTREAM, key)

    def receive(self, address: tuple[str, int], key: str) -> LinkFigures | str:
        """Be downstream."""
        try:
            return self._measured(join(address, TIMEOUT_S), DOWNSTREAM, key)
        except LinkBroken as error:
            return str(error)

    def _measured(self, store: TCPStore, rank: int, key: str) -> LinkFigures | str:
        link: Link | None = None
        try:
            link = make_link(store, rank, self._host, key, TIMEOUT_S, self._device)
            trip = min(self._round_trip(link, rank) for _ in range(ROUNDS))
            return LinkFigures("nccl" if link.on_device else "gloo", trip, self._rate(link, rank))
        except LinkBroken as error:
            return str(error)
        finally:
            close_all([link])

    def _round_trip(self, link: Link, rank: int) -> float:
        word = self._tensor(8)
        started = time.perf_counter()
        if rank == UPSTREAM:
            self._send(link, word)
            self._receive(link, word)
        else:
            self._receive(link, word)
            self._send(link, word)
        return time.perf_counter() - started

    def _rate(self, link: Link, rank: int) -> float:
        """Pieces one way, a word back: then all of them have come."""
        piece, word = self._tensor(PIECE_BYTES), self._tensor(8)
        started = time.perf_counter()
        for _ in range(PIECES):
            if rank == UPSTREAM:
                link.send(piece, TIMEOUT_S)
            else:
                self._receive(link, piece)
        if rank == UPSTREAM:
            self._receive(link, word)
        else:
            self._send(link, word)
        return PIECES * PIECE_BYTES / (time.perf_counter() - started)

    def _tensor(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self._device)

    def _send(self, link: Link, tensor: torch.Tensor) -> None:
        link.send(tensor, TIMEOUT_S)
        link.flush(TIMEOUT_S)

    def _receive(self, link: Link, tensor: torch.Tensor) -> None:
        """It is there when this returns, on a GPU too."""
        link.receive(tensor, TIMEOUT_S)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            link.check()

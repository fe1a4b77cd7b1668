"""How two stages find each other, and which kind of `Link` they then use."""

import os
import socket
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cluster.stages import nccl_link
from cluster.stages.gloo_link import GlooLink
from cluster.stages.link import FROM_LAST, TO_FIRST, Link, broken_if_it_fails


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
    with broken_if_it_fails(f"finding the sending stage at {host}:{port}"):
        return TCPStore(host, port, world_size=2, is_master=False, timeout=timedelta(seconds=timeout_s))


def make_link(store: TCPStore, rank: int, host: str, key: str, timeout_s: float, device: torch.device) -> Link:
    """Over NCCL between two GPUs; through host memory on CPUs, and between stages that share a GPU, as NCCL refuses to.

    Both ends say which device they have, so both choose the same. Raises `LinkBroken`.
    """
    if _agree_on_nccl(store, rank, key, device):
        return nccl_link.connect(store, rank, host, key, timeout_s, device)
    return GlooLink(store, rank, host, key, timeout_s)


def make_token_link(
    store: TCPStore, rank: int, host: str, key: str, timeout_s: float, device: torch.device
) -> Link | None:
    """From the last stage to the first, if NCCL fits. None if not: then tokens go by way of the engine, as they must.

    Both ends get the same answer. Raises `LinkBroken`.
    """
    key = f"{key}-tokens"
    if not _agree_on_nccl(store, rank, key, device):
        return None
    return nccl_link.connect(store, rank, host, key, timeout_s, device, TO_FIRST, FROM_LAST)


def _agree_on_nccl(store: TCPStore, rank: int, key: str, device: torch.device) -> bool:
    with broken_if_it_fails("meeting the neighbour"):
        theirs = exchanged(PrefixStore(f"{key}-devices", store), rank, identity(device))
    return fits_nccl(identity(device), theirs)


def identity(device: torch.device) -> str:
    """The same for two processes if they share a device that NCCL can use; empty if it is none.

    NCCL refuses one device twice within what it takes for one host. It may be told to take processes for several.
    """
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return ""
    return f"{os.environ.get('NCCL_HOSTID', '')}/{torch.cuda.get_device_properties(device).uuid}"


def fits_nccl(mine: str, theirs: str) -> bool:
    return bool(mine and theirs) and mine != theirs


def exchanged(store: PrefixStore, rank: int, word: str) -> str:
    """What the other one of a pair gives for `word`; waits for it as long as the store does."""
    store.set(f"word-{rank}", word)
    return store.get(f"word-{1 - rank}").decode()

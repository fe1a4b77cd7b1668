"""The adapters of a stage: those that it keeps in the host's memory, and where on its devices some of them are."""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from model.adapters import AdapterError, AdapterFiles, check_ranks, open_adapter
from model.adapters.layout import Layout, Packed, width_of
from model.adapters.slots import AdapterSlots
from model.batch import Batch, Placed
from model.group import DecoderGroup, on
from model.weights import resolve_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterArgs:
    """How many adapters a stage has room for."""

    on_device: int  # at once
    max_rank: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """One has been read, or could not be."""

    digest: str
    error: str | None


class StageAdapters:
    """What is read is read beside the steps, in a thread; only `place` is a step's affair."""

    def __init__(self, group: DecoderGroup, args: AdapterArgs) -> None:
        self.args = args
        leader = group.leader
        self._base = leader.shard.whole
        if len(group.decoders) > 1 and self._base.int4 is not None:
            raise ValueError(
                "model.adapters: on a base in 4 bits they need pipeline.tensor_parallel: 1: its order of inputs is cut "
                "otherwise than theirs"
            )
        self._layouts = [Layout(decoder.shard, decoder.stage) for decoder in group.decoders]
        self._devices, self._dtype = group.devices, leader.dtype
        self.max_rank = width_of(args.max_rank)
        self.slots = [
            AdapterSlots(layout, args.on_device, self.max_rank, self._dtype, device)
            for layout, device in zip(self._layouts, self._devices, strict=True)
        ]
        self._held: dict[str, Future[list[Packed]]] = {}
        self._pending: deque[str] = deque()
        self._reader = ThreadPoolExecutor(1, "adapters")

    @property
    def is_reading(self) -> bool:
        return bool(self._pending)

    def load(self, digest: str, path: str) -> None:
        """Begin to read one; `take_loaded` says how it went. What is held already is not read again."""
        if digest not in self._held:
            self._held[digest] = self._reader.submit(self._read, digest, path)
        self._pending.append(digest)

    def take_loaded(self) -> list[Loaded]:
        """Those that have been read since, in the order of `load`."""
        found: list[Loaded] = []
        while self._pending and self._held[self._pending[0]].done():
            digest = self._pending.popleft()
            error = self._held[digest].exception()
            if error is not None:
                if digest not in self._pending:
                    del self._held[digest]
                if not isinstance(error, ValueError):
                    log.error("adapter %s could not be read", digest[:12], exc_info=error)
            found.append(Loaded(digest, None if error is None else f"{error}"))
        return found

    def drop(self, digests: Sequence[str]) -> None:
        """Let go of these in the host's memory; where they are on a device they stay."""
        for digest in digests:
            if digest not in self._pending:
                self._held.pop(digest, None)

    def place(self, placed: Sequence[Placed]) -> None:
        """Put adapters that are held where a step finds them."""
        for one in placed:
            packed = self._held[one.digest].result()
            for slots, share, device in zip(self.slots, packed, self._devices, strict=True):
                with on(device):
                    slots.place(one.slot, share)

    def mark_used(self, batch: Batch) -> None:
        """A step has been launched on all devices."""
        for slots in self.slots:
            with on(slots.device):
                slots.mark_used(batch)

    def _read(self, digest: str, path: str) -> list[Packed]:
        files = AdapterFiles(resolve_path(path))
        before = files.state()
        if files.digest() != digest:
            raise AdapterError(
                f"adapter {files.path}: is another one on this node than where it was named: copy the same files to "
                "every node with a stage, and name it again"
            )
        try:
            adapter = open_adapter(files, self._base)
            width = width_of(check_ranks(files.path, adapter.ranks, self.args.max_rank))
            pin = torch.cuda.is_available() and self._devices[0].type == "cuda"
            packed = [layout.pack(adapter, width, self._dtype, pin) for layout in self._layouts]
        except OSError as error:
            raise AdapterError(f"adapter {files.path} cannot be read: {error}") from error
        if files.state() != before:
            raise AdapterError(f"adapter {files.path}: has been changed while it was read: name it again")
        return packed

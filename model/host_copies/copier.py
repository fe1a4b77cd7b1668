"""Copies of KV blocks between a device and a host arena, beside what the device computes.

Blocks lie in pieces on the device, layer by layer, and whole in the arena: a staging buffer stands between, so that
what crosses the bus are whole blocks. What goes out is gathered in the order of the steps, in microseconds, and crosses
on a stream of its own; what comes in does all on that stream, and steps do not wait for it.

Legend: n blocks, L layers, W words (int64) of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.batch import Copies
from model.host_copies.arena import HASH_BYTES, HostArena
from model.kv_cache import KVCache

STAGING_BYTES = 256_000_000  # for what goes out, and as much for what comes in
MIX = 0x2545F4914F6CDD1D  # odd


def window_of(block_bytes: int) -> int:
    """How many blocks may be on their way out: as many as the staging buffer holds."""
    return max(1, min(1024, STAGING_BYTES // block_bytes))


@dataclass(slots=True)
class Copying:
    """Copies that a device may still be busy with."""

    copies: Copies
    parts: "list[Part]"

    @property
    def is_over(self) -> bool:
        return all(part.done is None or part.done.query() for part in self.parts)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class Part:
    """Of one device of a stage."""

    out_sums: torch.Tensor  # [n] on the host once `done`
    in_sums: torch.Tensor
    done: torch.cuda.Event | None  # None: it is


class BlockCopier:
    """Of one stage: the caches of all its devices, which share the places of one arena."""

    def __init__(self, caches: Sequence[KVCache], arenas: Sequence[HostArena], window: int) -> None:
        self._arenas = arenas
        self._devices = [DeviceCopier(c, a, window) for c, a in zip(caches, arenas, strict=True)]

    @torch.inference_mode()
    def start(self, copies: Copies) -> Copying:
        """Behind what the devices have been given before."""
        out_places = copies.out_places.tolist()
        for arena in self._arenas:
            arena.begin(out_places)
        return Copying(copies, [device.start(copies) for device in self._devices])

    def finish(self, copying: Copying) -> list[int]:
        """Of copies that are over: which of those that came in are not what was put there, by index."""
        copies, bad = copying.copies, set[int]()
        out_places, in_places = copies.out_places.tolist(), copies.in_places.tolist()
        for arena, part in zip(self._arenas, copying.parts, strict=True):
            arena.keep(out_places, copies.out_hashes, _with_hashes(part.out_sums, copies.out_hashes))
            expected = arena.sums(in_places, copies.in_hashes)
            found = _with_hashes(part.in_sums, copies.in_hashes)
            bad.update(i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
        return sorted(bad)

    def close(self, keep: bool = False) -> None:
        for device in self._devices:
            device.close()
        for arena in self._arenas:
            arena.close(keep)


class DeviceCopier:
    """Of one device."""

    def __init__(self, cache: KVCache, arena: HostArena, window: int) -> None:
        self._pieces = [_words(storage) for storage in cache.storages]  # each [L, N, W of a layer]
        self._device = self._pieces[0].device
        words = sum(piece.shape[0] * piece.shape[2] for piece in self._pieces)
        assert arena.block_bytes == words * 8
        self._arena = arena.places.view(torch.int64)
        self._window = window
        self._next = 0  # row of the outgoing staging buffer
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._out, self._in = (torch.empty(window, words, dtype=torch.int64, device=self._device) for _ in "oi")
            _pin(arena.places)

    def start(self, copies: Copies) -> Part:
        if self._stream is None:
            return self._copy_on_host(copies)
        return self._copy_beside(copies, self._stream)

    def _copy_on_host(self, copies: Copies) -> Part:
        out = self._gather(_index(copies.out_blocks, self._device))
        self._arena[_index(copies.out_places, self._device)] = out
        coming = self._arena[_index(copies.in_places, self._device)]
        self._scatter(_index(copies.in_blocks, self._device), coming)
        return Part(sums(out), sums(coming), None)

    def _copy_beside(self, copies: Copies, stream: torch.cuda.Stream) -> Part:
        num_out, num_in = len(copies.out_blocks), len(copies.in_blocks)
        assert num_out <= self._window
        out_sums = torch.empty(num_out, dtype=torch.int64, pin_memory=True)
        in_sums = torch.empty(num_in, dtype=torch.int64, pin_memory=True)
        rows = [(self._next + i) % self._window for i in range(num_out)]
        self._next = (self._next + num_out) % self._window
        if num_out:  # rows are free again: at most `window` blocks are under way
            self._out.index_copy_(0, _rows(rows, self._device), self._gather(_index(copies.out_blocks, self._device)))
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for row, place in zip(rows, copies.out_places.tolist(), strict=True):
                self._arena[place].copy_(self._out[row], non_blocking=True)
            if num_out:
                out_sums.copy_(sums(self._out.index_select(0, _rows(rows, self._device))), non_blocking=True)
            blocks = _index(copies.in_blocks, self._device)
            for first in range(0, num_in, self._window):
                places = copies.in_places[first : first + self._window].tolist()
                for row, place in enumerate(places):
                    self._in[row].copy_(self._arena[place], non_blocking=True)
                coming = self._in[: len(places)]
                self._scatter(blocks[first : first + len(places)], coming)
                in_sums[first : first + len(places)].copy_(sums(coming), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
        return Part(out_sums, in_sums, done)

    def _gather(self, blocks: torch.Tensor) -> torch.Tensor:
        """[n, W]."""
        return torch.cat([p.index_select(1, blocks).transpose(0, 1).flatten(1) for p in self._pieces], 1)

    def _scatter(self, blocks: torch.Tensor, rows: torch.Tensor) -> None:
        start = 0
        for piece in self._pieces:
            layers, _, words = piece.shape
            part = rows[:, start : start + layers * words].view(-1, layers, words)
            piece.index_copy_(1, blocks, part.transpose(0, 1))
            start += layers * words

    def close(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def sums(rows: torch.Tensor) -> torch.Tensor:
    """[n] of rows [n, W]: another one if any word is, or if neighbours are exchanged."""
    return rows.sum(1) + rows[:, 1::2].sum(1) * MIX


def _with_hashes(found: torch.Tensor, hashes: bytes) -> list[int]:
    """The sums, with what they are known by: zeros that were never written are nobody's."""
    names = np.frombuffer(hashes, np.int64).reshape(-1, HASH_BYTES // 8)[:, 0]
    with np.errstate(over="ignore"):
        mixed: list[int] = (found.numpy() * np.int64(3) + names).tolist()
    return mixed


def _words(storage: torch.Tensor) -> torch.Tensor:
    """[L, N, W of a layer], of [L, N, ...] with whole words."""
    return storage.flatten(2).view(torch.int64)


def _index(values: np.ndarray, device: torch.device) -> torch.Tensor:
    found = torch.from_numpy(values.astype(np.int64))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _rows(rows: list[int], device: torch.device) -> torch.Tensor:
    return _index(np.array(rows, np.int32), device)


def _pin(memory: torch.Tensor) -> None:
    """So that a GPU reads and writes it by itself."""
    error = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
        memory.data_ptr(), memory.numel(), 0
    )
    if int(error) != 0:
        raise ValueError(f"cache.host_gb: the memory cannot be pinned (CUDA error {int(error)}): lower it")

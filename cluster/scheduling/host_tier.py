"""Which KV blocks have a copy in the stages' host memory, and what is copied when.

Every full block is copied out soon after it is computed, so that its place on the device can be taken at any time, and
what a lost stage had computed is still there. A sequence whose beginning is here and not on the device is loaded: it
has its blocks, and is computed from where the copies end once all stages say that they have arrived. Stages check them:
what was damaged, or is not there any more, is computed again.

Copies are ordered between batches and done in that order (see Copies). Of what is copied out at most `window` blocks
are under way. All stages do the same, each with its layers.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.scheduling.prefix import short
from cluster.scheduling.rates import Durations, Rate
from model.batch import Copied, Copies, Int32Array

NOTHING = 0  # the content of a place


class BlockHolder(Protocol):
    """Who knows the device's blocks."""

    def hash_of(self, block_id: int) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class HostStats:
    """Blocks; all but the first two since the start."""

    used: int = 0
    total: int = 0
    copied_in: int = 0  # to the device
    copied_out: int = 0  # from it
    evicted: int = 0
    damaged: int = 0  # they were not what was put there, or lost


@dataclass(slots=True)
class Load:
    """Blocks that are brought back for a sequence."""

    slot: int
    serial: int  # of the slot's owner then
    places: list[int]
    blocks: list[int]  # held until they have arrived, whatever becomes of the sequence
    hashes: list[bytes]


@dataclass(slots=True)
class Order:
    """What is under way."""

    out: list[tuple[int, bytes, int]]  # place, hash, depth
    loads: list[Load]
    waits_for: set[int]  # stages
    bad: set[int] = field(default_factory=set)  # of all that is loaded, by number


class HostTier:
    """The books of `num_places` places for blocks."""

    def __init__(self, num_places: int, window: int, num_stages: int) -> None:
        self.num_places = num_places
        self.num_copied_out = self.num_copied_in = self.num_evicted = self.num_damaged = 0  # blocks, since the start
        self._window, self._num_stages = window, num_stages
        self.copying, self.computing = Durations(), Rate()  # blocks that come in; prompt tokens
        self.contents = np.full(num_places, NOTHING, np.int64)  # of each place: never the same again
        self.shorts = np.zeros(num_places, np.uint32)  # see prefix.py
        self.depths = np.zeros(num_places, np.int32)
        self._hashes: list[bytes | None] = [None] * num_places
        self._found: dict[bytes, int] = {}  # places of copies that are complete
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_places))  # used longest ago first
        self._wanted: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # to be copied out: block, depth
        self._coming: set[bytes] = set()  # are being copied out
        self._num_leaving = 0  # blocks that are being copied out
        self._readers: Counter[int] = Counter()  # of each place
        self._loads: list[Load] = []  # not ordered yet
        self._orders: dict[int, Order] = {}  # by number
        self._next_order = 0
        self._next_content = NOTHING + 1

    def stats(self) -> HostStats:
        return HostStats(
            len(self._found),
            self.num_places,
            self.num_copied_in,
            self.num_copied_out,
            self.num_evicted,
            self.num_damaged,
        )

    @property
    def num_orders(self) -> int:
        """That are under way."""
        return len(self._orders)

    def find(self, block_hash: bytes) -> int | None:
        """Where its copy is."""
        return self._found.get(block_hash)

    def is_worth(self, num_blocks: int, block_size: int) -> bool:
        """Whether to copy so many blocks back is quicker than to compute them, as far as is known."""
        rate = self.computing.per_second
        return num_blocks > 0 and (not rate or self.copying.seconds(num_blocks) < num_blocks * block_size / rate)

    def want(self, block: int, block_hash: bytes, depth: int) -> None:
        """This block of the device, with so many of its sequence ending with it, is to be copied out."""
        if block_hash not in self._found and block_hash not in self._coming:
            self._wanted[block_hash] = block, depth

    def touch(self, block_hash: bytes) -> None:
        """It has been of use."""
        place = self._found.get(block_hash)
        if place is not None and place in self._free:
            self._free.move_to_end(place)

    def load(self, load: Load) -> None:
        for place in load.places:
            self._free.pop(place, None)  # until it has been read
        self._readers.update(load.places)
        self._loads.append(load)

    def order(self, epoch: int, is_there: BlockHolder) -> Copies | None:
        """What is to be copied now, if anything is. `is_there`: whether a block of the device still holds a hash."""
        out = self._take_wanted(is_there) if self._wanted else []
        loads, self._loads = self._loads, []
        if not out and not loads:
            return None
        number = self._next_order
        self._next_order += 1
        self._num_leaving += len(out)
        copied = [(place, block_hash, depth) for _, place, block_hash, depth in out]
        self._orders[number] = Order(copied, loads, set(range(self._num_stages)))
        return Copies(
            epoch,
            number,
            _array(block for block, *_ in out),
            _array(place for place, *_ in copied),
            b"".join(block_hash for _, block_hash, _ in copied),
            _array(place for load in loads for place in load.places),
            _array(block for load in loads for block in load.blocks),
            b"".join(block_hash for load in loads for block_hash in load.hashes),
        )

    def _take_wanted(self, is_there: BlockHolder) -> list[tuple[int, int, bytes, int]]:
        """Block, place, hash and depth of what is copied out next."""
        taken: list[tuple[int, int, bytes, int]] = []
        while self._wanted and self._free and self._num_leaving + len(taken) < self._window:
            block_hash, (block, depth) = self._wanted.popitem(last=False)
            if is_there.hash_of(block) == block_hash:
                place, _ = self._free.popitem(last=False)
                self.num_evicted += self._hashes[place] is not None
                self._clear(place)
                self._coming.add(block_hash)
                taken.append((block, place, block_hash, depth))
        return taken

    def take(self, copied: Copied) -> list[tuple[Load, int]] | None:
        """A stage is done. Once all are: the loads of that order, and how many blocks of each are good."""
        order = self._orders[copied.number]
        order.waits_for.discard(copied.stage)
        order.bad.update(copied.bad)
        if order.waits_for:
            return None
        del self._orders[copied.number]
        self._num_leaving -= len(order.out)
        for place, block_hash, depth in order.out:
            if block_hash in self._coming:  # or it was dropped meanwhile
                self._coming.discard(block_hash)
                self._keep(place, block_hash, depth)
            self._free[place] = None
            self.num_copied_out += 1
        return self._finish(order)

    def _finish(self, order: Order) -> list[tuple[Load, int]]:
        done: list[tuple[Load, int]] = []
        number = 0
        for load in order.loads:
            good = next((i for i in range(len(load.places)) if number + i in order.bad), len(load.places))
            for i, place in reversed([*enumerate(load.places)]):
                if number + i in order.bad and self._hashes[place] == load.hashes[i]:
                    self._clear(place)
                    self.num_damaged += 1
                self._readers[place] -= 1
                if not self._readers[place]:
                    del self._readers[place]
                    self._free[place] = None
            number += len(load.places)
            self.num_copied_in += good
            done.append((load, good))
        return done

    def _all_loads(self) -> list[Load]:
        return [*self._loads, *(load for order in self._orders.values() for load in order.loads)]

    def forget_orders(self) -> list[Load]:
        """Stages were lost: what was under way is not to be had, what is complete is. Returns the loads."""
        loads = self._all_loads()
        places = {place for order in self._orders.values() for place, *_ in order.out}
        places.update(place for load in loads for place in load.places)
        self._free.update(dict.fromkeys(places))
        self._orders.clear()
        self._loads.clear()
        self._readers.clear()
        self._num_leaving = 0
        self._wanted.clear()
        self._coming.clear()
        return loads

    def forget(self) -> None:
        """All copies. What is under way is of no use to others any more."""
        for place in [*self._found.values()]:
            self._clear(place)
        self._wanted.clear()
        self._coming.clear()

    def _keep(self, place: int, block_hash: bytes, depth: int) -> None:
        self._found[block_hash], self._hashes[place] = place, block_hash
        self.shorts[place], self.depths[place] = short(block_hash), depth
        self.contents[place] = self._next_content
        self._next_content += 1

    def _clear(self, place: int) -> None:
        if (block_hash := self._hashes[place]) is not None:
            del self._found[block_hash]
            self._hashes[place] = None
        self.contents[place], self.depths[place] = NOTHING, 0

    def held_blocks(self) -> list[list[int]]:
        """Of the device, for what is being loaded."""
        return [load.blocks for load in self._all_loads()]

    def check(self) -> None:
        """Assert that no place is lost, or free while it is read or written."""
        busy = {place for order in self._orders.values() for place, *_ in order.out}
        assert len(busy) == sum(len(order.out) for order in self._orders.values()), "two copies go to one place"
        busy.update(place for load in self._all_loads() for place in load.places)
        assert busy.isdisjoint(self._free), "a place is free while it is read or written"
        assert len(busy) + len(self._free) == self.num_places, "a place is lost"
        assert all(self._hashes[place] == block_hash for block_hash, place in self._found.items())
        assert np.count_nonzero(self.depths) == np.count_nonzero(self.contents) == len(self._found)


def _array(values: Iterable[int]) -> Int32Array:
    found: NDArray[np.int32] = np.fromiter(values, np.int32)
    return found

"""Which KV block belongs to whom.

A full block of a sequence is known by a hash of its tokens and all before them (prefix.py). A block whose last user
left keeps its content until its room is needed (least recently used first), and is found again by that hash.
"""

from collections import OrderedDict
from collections.abc import Set
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cluster.scheduling.host_tier import HostTier
from cluster.scheduling.prefix import Digest, short
from cluster.scheduling.sequence import Sequence

NO_CONTENT = 0


class BlockManager:
    """Hands out blocks by reference count; `check()` proves that none is lost or shared wrongly."""

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, host: HostTier | None = None
    ) -> None:
        """`host` keeps copies of full blocks."""
        self.host = host if prefix_caching else None
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_blocks = num_blocks
        self._users = np.zeros(num_blocks, np.int32)  # of each block
        self._contents = np.full(num_blocks, NO_CONTENT, np.int64)  # of a cached block: never the same again
        self._hashes: list[bytes | None] = [None] * num_blocks  # under which it is cached
        self._shorts = np.zeros(num_blocks, np.uint32)  # of those
        self._depths = np.zeros(num_blocks, np.int32)  # how many blocks of its sequence end with it; 0: not cached
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))  # oldest first
        self._cached: dict[bytes, int] = {}  # block ids
        self._next_content = NO_CONTENT + 1
        self.num_evicted = 0  # blocks, since the start

    @property
    def num_free(self) -> int:
        """Blocks nobody uses now, cached content included."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def look_up(self, seq: Sequence) -> None:
        """Bring up to date which blocks hold its beginning, at least one token short of all.

        What was found before is not walked again: who waits long is looked up often.
        """
        found, size = seq.found, self.block_size
        if len(gone := np.flatnonzero(self._contents[found.blocks] != found.contents)):
            found.blocks, found.contents = found.blocks[: gone[0]], found.contents[: gone[0]]
        more: list[int] = []
        count = len(found.blocks)
        while self.prefix_caching and not len(found.places) and (count + len(more) + 1) * size < seq.num_tokens:
            block_id = self._cached.get(seq.chain.hash(seq.token_ids, count + len(more), size))
            if block_id is None:
                break
            more.append(block_id)
        if more:
            found.blocks = np.append(found.blocks, np.array(more, np.int32))
            found.contents = self._contents[found.blocks]

        if self.host is not None:
            self._look_up_copies(seq, self.host)

    def _look_up_copies(self, seq: Sequence, host: HostTier) -> None:
        """Of what follows the blocks that were found."""
        found, size = seq.found, self.block_size
        if len(gone := np.flatnonzero(host.contents[found.places] != found.copies)):
            found.places, found.copies = found.places[: gone[0]], found.copies[: gone[0]]
        more: list[int] = []
        count = len(found.blocks) + len(found.places)
        while (count + len(more) + 1) * size < seq.num_tokens:
            place = host.find(seq.chain.hash(seq.token_ids, count + len(more), size))
            if place is None:
                break
            more.append(place)
        if more:
            found.places = np.append(found.places, np.array(more, np.int32))
            found.copies = host.contents[found.places]

    def hash_of(self, block_id: int) -> bytes | None:
        """What it is cached under."""
        return self._hashes[block_id]

    def digest(self) -> Digest:
        """What is cached. Any thread may ask: at worst it is a step old in one place and new in another."""
        shorts, depths = self._shorts, self._depths
        if self.host is not None:
            shorts, depths = np.append(shorts, self.host.shorts), np.append(depths, self.host.depths)
        return Digest.of(shorts, depths)

    def num_users(self, block_id: int) -> int:
        return int(self._users[block_id])

    def can_allocate(
        self, prefix: list[int] | NDArray[np.int32], num_tokens: int, freed: Set[int] = frozenset()
    ) -> bool:
        """Whether `num_tokens`, whose beginning is in the blocks of `prefix`, fit once those of `freed` are free."""
        idle_prefix = np.count_nonzero(self._users[prefix] == 0)
        if freed:
            idle_prefix += sum(1 for i in prefix if i in freed)
        return bool(self.blocks_for(num_tokens) - len(prefix) + idle_prefix <= self.num_free + len(freed))

    def allocate(self, seq: Sequence, prefix: list[int], num_tokens: int) -> None:
        """Give `seq`, which has none, blocks for `num_tokens`, the first of them being `prefix`."""
        assert not seq.block_table
        for block_id in prefix:
            self._acquire(block_id)
        seq.block_table = [*prefix, *self.take(self.blocks_for(num_tokens) - len(prefix))]
        seq.num_full_blocks = len(prefix)
        if self.host is not None:
            for i, block_id in enumerate(prefix):  # their copies may have been given up meanwhile
                self._want_copy(block_id, i + 1)

    def _want_copy(self, block_id: int, depth: int) -> None:
        block_hash = self._hashes[block_id]
        if self.host is not None and block_hash is not None:
            self.host.want(block_id, block_hash, depth)

    def hold(self, block_ids: list[int]) -> None:
        """One user more for each of these."""
        for block_id in block_ids:
            self._acquire(block_id)

    def let_go(self, block_ids: list[int]) -> None:
        """One user less."""
        for block_id in reversed(block_ids):
            self._users[block_id] -= 1
            if self._users[block_id] == 0:
                self._free[block_id] = None

    def take(self, count: int) -> list[int]:
        """So many blocks, which must be free: those whose content was used longest ago."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        self._evict(taken)
        self._users[taken] = 1
        return taken

    def mark_computed(self, seq: Sequence, num_tokens: int) -> None:
        """Make the blocks that `seq` has filled with its first tokens, which are known, findable by their content."""
        full, table = num_tokens // self.block_size if self.prefix_caching else 0, seq.block_table
        for i in range(seq.num_full_blocks, full):
            block_id, block_hash = table[i], seq.chain.hash(seq.token_ids, i, self.block_size)
            if self._cached.setdefault(block_hash, block_id) == block_id:  # or a twin holds the same
                self._contents[block_id], self._hashes[block_id] = self._next_content, block_hash
                self._shorts[block_id], self._depths[block_id] = short(block_hash), i + 1
                self._next_content += 1
                self._want_copy(block_id, i + 1)
        seq.num_full_blocks = max(full, seq.num_full_blocks)

    def free(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`; the last ones are reused first, for beginnings are shared most."""
        self.let_go(seq.block_table)
        if self.host is not None:
            for block_id in reversed(seq.block_table):
                if (block_hash := self._hashes[block_id]) is not None:
                    self.host.touch(block_hash)
        seq.block_table = []
        seq.num_full_blocks = 0

    def forget(self) -> None:
        """Drop all cached content: nobody finds any of it any more. Who uses it goes on."""
        self._evict(range(self.num_blocks))

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that exactly the blocks of `sequences` are in use, each as often as it is referenced."""
        counts = [0] * self.num_blocks
        held = self.host.held_blocks() if self.host is not None else []
        for block_id in chain(*(seq.block_table for seq in sequences), *held):
            counts[block_id] += 1
        for block_id, (users, count) in enumerate(zip(self._users.tolist(), counts, strict=True)):
            assert users == count, f"block {block_id}: {users} references, {count} users"
            assert (block_id in self._free) == (count == 0), f"block {block_id} is free and used, or lost"
        if self.host is not None:
            self.host.check()
        assert all(self._hashes[block_id] == block_hash for block_hash, block_id in self._cached.items())
        assert np.count_nonzero(self._depths) == len(self._cached)

    def _acquire(self, block_id: int) -> None:
        self._free.pop(block_id, None)
        self._users[block_id] += 1

    def _evict(self, block_ids: list[int] | range) -> None:
        for block_id in block_ids:
            if (block_hash := self._hashes[block_id]) is not None:
                self.num_evicted += 1
                del self._cached[block_hash]
                self._hashes[block_id] = None
        self._contents[block_ids] = NO_CONTENT
        self._depths[block_ids] = 0

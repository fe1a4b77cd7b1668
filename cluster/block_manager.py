"""Which KV block belongs to whom.

A full block of a sequence is known by (what came before it, its tokens): the key is compared by value, so two different
prompts can never share a block by accident of a hash. A block whose last user left keeps its content until its room is
needed (least recently used first), and is found again by its key.
"""

from collections import OrderedDict

from cluster.sequence import Sequence

NO_CONTENT = 0  # the content id of "nothing before", and of a block that is not full
Key = tuple[int, tuple[int, ...]]  # (content id of the block before, this block's tokens)


class Block:
    """One KV block. `content` identifies its tokens and all tokens before them, or is NO_CONTENT."""

    __slots__ = ("block_id", "content", "key", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.content = NO_CONTENT
        self.key: Key | None = None


class BlockManager:
    """Hands out blocks by reference count; `check()` proves that none is lost or shared wrongly."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict((i, None) for i in range(num_blocks))  # oldest first
        self._cached: dict[Key, Block] = {}
        self._next_content = NO_CONTENT + 1

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks nobody uses now, cached content included."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, token_ids: list[int]) -> list[int]:
        """Blocks that already hold the beginning of `token_ids`, at least one token short of all of them."""
        found: list[int] = []
        before = NO_CONTENT
        while self.prefix_caching and (len(found) + 1) * self.block_size < len(token_ids):
            block = self._cached.get((before, self._tokens(token_ids, len(found))))
            if block is None:
                break
            found.append(block.block_id)
            before = block.content
        return found

    def can_allocate(self, prefix: list[int], num_tokens: int) -> bool:
        """Whether `num_tokens`, whose beginning is in the blocks of `prefix`, fit."""
        idle_prefix = sum(1 for i in prefix if self._blocks[i].ref_count == 0)
        return self.blocks_for(num_tokens) - len(prefix) + idle_prefix <= self.num_free

    def allocate(self, seq: Sequence, prefix: list[int], num_tokens: int) -> None:
        """Give `seq`, which has none, blocks for `num_tokens`, the first of them being `prefix`."""
        assert not seq.block_table
        for block_id in prefix:
            self._acquire(block_id)
        seq.block_table = [*prefix, *(self._take() for _ in range(self.blocks_for(num_tokens) - len(prefix)))]
        seq.num_full_blocks = len(prefix)

    def can_grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether `seq` can be extended to `num_tokens`."""
        return self.blocks_for(num_tokens) - len(seq.block_table) <= self.num_free

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Extend the block table of `seq` to hold `num_tokens`."""
        while len(seq.block_table) < self.blocks_for(num_tokens):
            seq.block_table.append(self._take())

    def mark_computed(self, seq: Sequence) -> None:
        """Make the blocks that `seq` has filled findable by their content."""
        known = min(seq.num_computed_tokens, seq.num_tokens)  # the newest token may still be on its way
        full = known // self.block_size if self.prefix_caching else 0
        for i in range(seq.num_full_blocks, full):
            before = self._blocks[seq.block_table[i - 1]].content if i else NO_CONTENT
            block = self._blocks[seq.block_table[i]]
            key = (before, self._tokens(seq.token_ids, i))
            twin = self._cached.setdefault(key, block)
            # A twin with the same tokens may be cached already: ours then takes its content id, so that what
            # follows in our sequence is found behind either of them.
            if twin is block:
                block.content, block.key = self._next_content, key
                self._next_content += 1
            else:
                block.content = twin.content
        seq.num_full_blocks = max(full, seq.num_full_blocks)

    def free(self, seq: Sequence) -> None:
        """Take back all blocks of `seq`; the last ones are reused first, for beginnings are shared most."""
        for block_id in reversed(seq.block_table):
            block = self._blocks[block_id]
            assert block.ref_count > 0
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
        seq.block_table = []
        seq.num_full_blocks = 0

    def forget(self) -> None:
        """Drop all cached content (the blocks' memory is new). Nothing may be in use."""
        assert self.num_free == self.num_blocks
        for block in self._blocks:
            self._evict(block)

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that exactly the blocks of `sequences` are in use, each as often as it is referenced."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            for block_id in seq.block_table:
                counts[block_id] += 1
        for block, count in zip(self._blocks, counts, strict=True):
            assert block.ref_count == count, f"block {block.block_id}: {block.ref_count} references, {count} users"
            assert (block.block_id in self._free) == (count == 0), f"block {block.block_id} is free and used, or lost"
        assert all(block.key == key for key, block in self._cached.items())

    def _tokens(self, token_ids: list[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _acquire(self, block_id: int) -> None:
        self._free.pop(block_id, None)
        self._blocks[block_id].ref_count += 1

    def _take(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        block = self._blocks[block_id]
        self._evict(block)
        block.ref_count = 1
        return block_id

    def _evict(self, block: Block) -> None:
        if block.key is not None:
            del self._cached[block.key]
        block.content, block.key = NO_CONTENT, None

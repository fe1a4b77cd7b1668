"""What the beginning of a prompt is known by, here and in every gateway: a chain of hashes, one per full KV block.

A block's hash covers its tokens, all tokens before them, and where the chain begins: equal hashes are equal keys and
values. 128 bits of BLAKE2b: nobody finds two prompts that share one. Needs no torch.
"""

import hashlib
from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
MAX_DIGEST = 4096  # entries: 16 kB that every gateway reads of every engine
Shorts = NDArray[np.uint32]


def root(*identity: str) -> bytes:
    """Where a chain begins: all that keys and values depend on beside the tokens, and who may share them.

    An engine has one model, which therefore needs no mention; what outlives an engine names it beside the hashes.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES, person=b"caravan-kv")
    for part in identity:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


class Chain:
    """The hashes of the full blocks of one sequence's tokens, made when they are asked for."""

    __slots__ = ("_before", "_hashes")

    def __init__(self, before: bytes) -> None:
        self._before = before
        self._hashes: list[bytes] = []

    def hash(self, token_ids: Sequence[int], index: int, block_size: int) -> bytes:
        """Of block `index`, which is full."""
        hashes = self._hashes
        while len(hashes) <= index:
            start = len(hashes) * block_size
            tokens = array("i", token_ids[start : start + block_size]).tobytes()
            before = hashes[-1] if hashes else self._before
            hashes.append(hashlib.blake2b(before + tokens, digest_size=HASH_BYTES).digest())
        return hashes[index]

    def shorts(self, token_ids: Sequence[int], block_size: int) -> Shorts:
        """All of them, as digests have them."""
        count = len(token_ids) // block_size
        if count:
            self.hash(token_ids, count - 1, block_size)
        return np.frombuffer(b"".join(h[:4] for h in self._hashes[:count]), np.uint32)


def short(block_hash: bytes) -> int:
    """Its first 32 bits: enough to tell which engine holds most of a prompt, not what may be reused."""
    return int.from_bytes(block_hash[:4], "little")


class Digest(msgspec.Struct, frozen=True, array_like=True):
    """Which blocks an engine holds: of every `stride`th of each sequence the first 32 bits of its hash, sorted."""

    stride: int
    shorts: bytes

    @classmethod
    def of(cls, shorts: Shorts, depths: NDArray[np.int32]) -> "Digest":
        """Of blocks at these depths: 1 is the first of a sequence, 0 none at all. As fine as MAX_DIGEST allows."""
        stride, held = 1, np.count_nonzero(depths)
        while held > MAX_DIGEST * stride:
            stride *= 2
        while len(found := np.unique(shorts[(depths > 0) & (depths % stride == 0)])) > MAX_DIGEST:
            stride *= 2
        return cls(stride, found.tobytes())


class Held:
    """A digest that is looked up in."""

    def __init__(self, digest: Digest) -> None:
        self._stride = digest.stride
        self._shorts: Shorts = np.frombuffer(digest.shorts, np.uint32)

    def num_blocks(self, prompt: Shorts) -> int:
        """How many of a prompt's first blocks are held."""
        asked = prompt[self._stride - 1 :: self._stride]
        if not len(self._shorts) or not len(asked):
            return 0
        places = self._shorts.searchsorted(asked).clip(max=len(self._shorts) - 1)
        missing = (self._shorts[places] != asked).nonzero()[0]
        return self._stride * int(missing[0] if len(missing) else len(asked))

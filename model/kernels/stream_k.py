"""How a product of few rows is cut on Hopper: into as many equal shares as there are multiprocessors.

Stream-K (arXiv 2301.03598). The tiles are laid end to end, each cut into units of DEPTH bytes of every row, and each
program takes the same number of neighbouring units. So all of them read until the end, whatever the number of tiles;
where a tile lies in several shares, their sums are added.

Legend: T tokens, n columns of the result, k elements summed.
"""

from functools import cache
from typing import NamedTuple

MAX_ROWS = 32  # with more, the sums that are added cost more than even shares save
DEPTH = 256  # bytes of a row in a unit
SHARED_BYTES = 224 * 1024  # of a multiprocessor's shared memory
MAX_PARTS = 16  # of a tile that is cut evenly


class Tile(NamedTuple):
    """A part of the result."""

    rows: int  # a power of 2, at least 8
    columns: int

    @property
    def stages(self) -> int:
        """Units on their way at once: as many as fit.

        With room for a second program, those of the next product, which start early, would take places unevenly.
        """
        return SHARED_BYTES // ((self.rows + self.columns) * DEPTH)


class Shares(NamedTuple):
    """What each program does of a product."""

    blocks: int  # units of a tile
    units: int  # of all tiles
    per_program: int
    programs: int


def bfloat16_tile(rows: int, n: int, k: int) -> Tile | None:
    """The tiles of a product in 16 bits where this kernel beats all others; measured on an H200."""
    if rows > 16 and min(n, k) < 8192:
        return None
    return float8_tile(rows, n, k)


def float8_tile(rows: int, n: int, k: int) -> Tile | None:
    """The same in 8 bits."""
    if not 1 < rows <= MAX_ROWS or k % 64:
        return None
    narrow = n < (24_000 if rows > 8 else 8193)
    return Tile(8 if rows <= 8 else 16 if rows <= 16 else 32, 64 if narrow else 128)


@cache
def shares(tile: Tile, n: int, row_bytes: int, programs: int) -> Shares:
    """The work of at most `programs` programs, with rows of weights of `row_bytes` each.

    Whole tiles, halves, thirds and so on, where that is at most 4% more than an even share.
    """
    blocks = _parts(row_bytes, DEPTH)
    units = _parts(n, tile.columns) * blocks
    even = _parts(units, programs)
    whole = (_parts(blocks, parts) for parts in range(1, MAX_PARTS + 1))
    per_program = next((size for size in whole if even <= size <= 1.04 * even + 1), even)
    return Shares(blocks, units, per_program, _parts(units, per_program))


def _parts(total: int, size: int) -> int:
    return -(-total // size)

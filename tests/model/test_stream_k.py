"""How products are cut for the stream-K kernel: arithmetic, no GPU."""

import pytest

from model.families import SHAPES
from model.kernels.stream_k import MAX_ROWS, Tile, bfloat16_tile, float8_tile, shares

HOPPER_SHARED_BYTES = 227 * 1024  # what one program may have
PRODUCTS = sorted(
    {
        shape
        for c in SHAPES.values()
        for shape in (
            ((c.n_heads + 2 * c.n_kv_heads) * c.head_dim, c.dim), (c.dim, c.n_heads * c.head_dim),
            (2 * c.hidden_dim, c.dim), (c.dim, c.hidden_dim), (c.vocab_size, c.dim),
        )
    }
)  # fmt: skip


@pytest.mark.parametrize(("n", "k"), PRODUCTS)
def test_every_product_of_the_families_has_tiles_that_fit(n: int, k: int) -> None:
    for rows in range(2, MAX_ROWS + 1):
        tile = float8_tile(rows, n, k)
        assert tile is not None
        assert rows <= tile.rows < max(16, 2 * rows)
        assert bfloat16_tile(rows, n, k) in ({tile} if rows <= 16 or min(n, k) >= 8192 else {None})
        used = tile.stages * (tile.rows + tile.columns) * 256 + 1024
        assert HOPPER_SHARED_BYTES / 2 < used <= HOPPER_SHARED_BYTES
    for rows in (1, MAX_ROWS + 1):
        assert float8_tile(rows, n, k) is bfloat16_tile(rows, n, k) is None
    assert float8_tile(8, n, k + 32) is bfloat16_tile(8, n, k + 32) is None


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("multiprocessors", [132, 114, 7])
@pytest.mark.parametrize(("n", "row_bytes"), [*((n, 2 * k) for n, k in PRODUCTS), (30, 128), (1000, 1392), (208, 1152)])
def test_shares_are_even_and_whole(n: int, row_bytes: int, multiprocessors: int, columns: int) -> None:
    work = shares(Tile(8, columns), n, row_bytes, multiprocessors)
    even = work.units / multiprocessors
    assert work.programs <= multiprocessors
    assert (work.programs - 1) * work.per_program < work.units <= work.programs * work.per_program
    assert work.per_program <= 1.04 * even + 3
    begun = [tile * work.blocks // work.per_program for tile in range(work.units // work.blocks)]
    ends = [((tile + 1) * work.blocks - 1) // work.per_program for tile in range(work.units // work.blocks)]
    split = [first for first, last in zip(begun, ends, strict=True) if first != last]
    assert len(split) == len(set(split)), "two tiles would draw the same ticket"

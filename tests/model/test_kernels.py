"""The fused kernels against their references, over odd sizes. Needs a CUDA device."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from model.attention import pieces_of
from model.batch import SAMPLED
from model.kernels import (
    Cache,
    Int4Weight,
    Pieces,
    PrefillMetadata,
    Quantized,
    Tokens,
    kernels_for,
    piece_tokens,
)
from model.kernels.device import has_warp_groups, tickets
from model.kernels.reference import ReferenceKernels, cached
from model.kernels.stream_k import MAX_ROWS, Tile
from model.kv_cache import FLOAT8, KVCache
from model.layers import CudaLinear, DenseLinear, Float8Linear, rotary_table
from model.packing import packed
from tests.conftest import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
GPU = torch.device("cuda")
REFERENCE = ReferenceKernels()
BLOCK = 16
needs_warp_groups = pytest.mark.skipif(not has_warp_groups(), reason="Hopper's kernel")


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN if anything is not a number."""
    out, reference = out.double(), reference.double()
    return float((out - reference).norm() / reference.norm().clamp(min=1e-30))


TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (7, 4096), (300, 8192), (2, 100)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_rms_norm(dtype: torch.dtype, rows: int, width: int, with_residual: bool) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(rows, width, device=GPU, dtype=dtype) for _ in range(2))
    weight = torch.rand(width, device=GPU, dtype=dtype) + 0.5
    expected = REFERENCE.add_rms_norm(x.float(), residual.float() if with_residual else None, weight.float(), 1e-5)
    found = kernels_for(GPU).add_rms_norm(x, residual.clone() if with_residual else None, weight, 1e-5)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < TOLERANCE[dtype]  # type: ignore[arg-type]  # not quantized


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (7, 11008), (300, 28672), (2, 100)])
def test_silu_and_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 2 * width, device=GPU, dtype=dtype) * 3
    assert error(kernels_for(GPU).silu_and_mul(x), REFERENCE.silu_and_mul(x.float())) < TOLERANCE[dtype]


HEADS = [(64, 8, 128), (32, 32, 128), (9, 3, 64), (40, 40, 128), (4, 1, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "k", "d"), HEADS)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_rotate_and_write(dtype: torch.dtype, h: int, k: int, d: int, tokens: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(tokens, (h + 2 * k) * d, device=GPU, dtype=dtype)
    rotary = rotary_table(4096, replace(TINY, head_dim=d), GPU)
    positions = torch.randint(0, 4096, (tokens,), device=GPU)
    cells = torch.randperm(20 * BLOCK, device=GPU)[:tokens]
    caches = [[torch.zeros(20, BLOCK, k, d, device=GPU, dtype=t) for _ in range(2)] for t in (dtype, torch.float32)]
    found = kernels_for(GPU).rotate_and_write(qkv, h, rotary, positions, *caches[0], cells)
    expected = REFERENCE.rotate_and_write(qkv.float(), h, rotary, positions, *caches[1], cells)
    assert error(found, expected) < TOLERANCE[dtype]
    for a, b in zip(*caches, strict=True):
        assert error(a, b) < TOLERANCE[dtype]
        assert torch.equal(a == 0, b == 0), "written where it should not have been"


@pytest.mark.parametrize(("h", "k", "d"), HEADS)
@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_rotate_and_write_in_8_bits(h: int, k: int, d: int, tokens: int) -> None:
    torch.manual_seed(0)
    config = replace(TINY, n_heads=h, n_kv_heads=k, head_dim=d)
    qkv = torch.randn(tokens, (h + 2 * k) * d, device=GPU, dtype=torch.bfloat16)
    rotary = rotary_table(4096, config, GPU)
    positions = torch.randint(0, 4096, (tokens,), device=GPU)
    cells = torch.randperm(20 * BLOCK, device=GPU)[:tokens]
    found, expected = (KVCache(config, 1, 19, BLOCK, FLOAT8, GPU) for _ in range(2))
    for kernels, kv in ((kernels_for(GPU), found), (REFERENCE, expected)):
        kernels.rotate_and_write(qkv, h, rotary, positions, kv.k[0], kv.v[0], cells)
    every = torch.arange(20 * BLOCK, device=GPU)
    for a, b in ((found.k[0], expected.k[0]), (found.v[0], expected.v[0])):
        x, y = (cached(cache, every, torch.float32) for cache in (a, b))
        assert error(x, y) < 2e-2  # a value between two of 8 bits may fall to either
        assert torch.equal(x == 0, y == 0), "written where it should not have been"


def in_8_bits(cache: torch.Tensor) -> Cache:
    """The same cache as `KVCache` lays it out in FLOAT8."""
    rows = REFERENCE.quantize_rows(cache)
    return Quantized(rows.values, rows.scales.transpose(1, 2).contiguous().transpose(1, 2))


def test_8_bit_caches_are_laid_out_as_the_kernels_read_them() -> None:
    held = KVCache(TINY, 1, 3, BLOCK, FLOAT8, GPU).k[0]
    made = in_8_bits(torch.randn(4, BLOCK, TINY.n_kv_heads, TINY.head_dim, device=GPU))
    assert isinstance(held, Quantized)
    assert isinstance(made, Quantized)
    assert [x.stride() for x in made] == [x.stride() for x in held]


def paged(lens: list[int], k: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Caches full of poison but for the sequences' own cells, the tables [slots, W], and the slot of each sequence."""
    blocks = [-(-n // BLOCK) for n in lens]
    width, total = max(max(blocks), 1), sum(blocks) + 3
    order = torch.randperm(total)
    slots = torch.randperm(len(lens) + 2)[: len(lens)]
    tables = torch.zeros(len(lens) + 2, width, dtype=torch.int64)
    k_cache, v_cache = (torch.full((total, BLOCK, k, d), 1e4, device=GPU, dtype=dtype) for _ in range(2))
    start = 0
    for slot, n, length in zip(slots.tolist(), blocks, lens, strict=True):
        tables[slot, :n] = order[start : start + n]
        start += n
        position = torch.arange(length)
        cells = (tables[slot, position // BLOCK] * BLOCK + position % BLOCK).to(GPU)
        for cache in (k_cache, v_cache):
            cache.flatten(0, 1)[cells] = torch.randn(length, k, d, device=GPU, dtype=dtype)
    return k_cache, v_cache, tables.to(GPU), slots.to(GPU)


LENGTHS = [[1], [16], [17], [1, 15, 16, 17, 63, 64, 65, 0, 1000], [2048], [300] * 40, [33] * 130, [100_000]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "k", "d"), HEADS)
@pytest.mark.parametrize("lens", LENGTHS, ids=lambda x: f"{len(x)}x{max(x)}")
def test_decode_attention(dtype: torch.dtype, h: int, k: int, d: int, lens: list[int]) -> None:
    torch.manual_seed(0)
    k_cache, v_cache, *where = paged(lens, k, d, dtype)
    q = torch.randn(len(lens), h, d, device=GPU, dtype=dtype)
    context = torch.tensor(lens, device=GPU)
    found = kernels_for(GPU).decode_attention(q, k_cache, v_cache, *where, context)
    expected = REFERENCE.decode_attention(q.float(), k_cache.float(), v_cache.float(), *where, context)
    assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "k", "d"), HEADS)
@pytest.mark.parametrize("lens", LENGTHS, ids=lambda x: f"{len(x)}x{max(x)}")
def test_decode_attention_over_8_bits(dtype: torch.dtype, h: int, k: int, d: int, lens: list[int]) -> None:
    torch.manual_seed(0)
    *caches, tables, slots = paged(lens, k, d, dtype)
    k_cache, v_cache = (in_8_bits(cache) for cache in caches)
    where = tables, slots
    q = torch.randn(len(lens), h, d, device=GPU, dtype=dtype)
    context = torch.tensor(lens, device=GPU)
    found = kernels_for(GPU).decode_attention(q, k_cache, v_cache, *where, context)
    expected = REFERENCE.decode_attention(q.float(), k_cache, v_cache, *where, context)
    assert error(found, expected) < TOLERANCE[dtype]


PROMPTS = [[(0, 2)], [(0, 1), (7, 1), (0, 64), (3, 65)], [(1000, 1), (15, 9), (900, 130), (0, 7), (16, 16)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_8", [False, True])
@pytest.mark.parametrize(("h", "k", "d"), HEADS)
@pytest.mark.parametrize("sequences", PROMPTS, ids=str)  # (tokens computed before, tokens to compute now)
def test_pieces_of_prompts_attend_as_each_token_for_itself(
    dtype: torch.dtype, in_8: bool, h: int, k: int, d: int, sequences: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    *caches, tables, slots = paged([before + now for before, now in sequences], k, d, dtype)
    k_cache, v_cache = (in_8_bits(cache) if in_8 else cache for cache in caches)
    exact = (k_cache, v_cache) if in_8 else tuple(cache.float() for cache in caches)
    query_lens = np.array([now for _, now in sequences], np.int32)
    of_token = torch.cat([slots[i].expand(now) for i, (_, now) in enumerate(sequences)])
    context = torch.cat([torch.arange(before + 1, before + now + 1) for before, now in sequences]).to(GPU)
    starts, counts = (torch.from_numpy(part).int().to(GPU) for part in pieces_of(query_lens, piece_tokens(h // k, 64)))
    alone = torch.from_numpy(np.repeat(query_lens == 1, query_lens)).to(GPU)
    pieces = Pieces(starts, counts, context * alone)
    q = torch.randn(len(context), h, d, device=GPU, dtype=dtype)
    expected = REFERENCE.decode_attention(q.float(), *exact, tables, of_token, context)  # type: ignore[arg-type]
    found = kernels_for(GPU).decode_attention(q, k_cache, v_cache, tables, of_token, context, pieces)
    assert error(found, expected) < TOLERANCE[dtype]


PREFILLS = [
    [(0, 2)], [(0, 300), (0, 7)], [(0, 300), (5, 3), (1000, 17), (16, 16), (63, 2), (64, 130)], [(3000, 1000)],
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_8", [False, True])
@pytest.mark.parametrize(("h", "k", "d"), HEADS)
@pytest.mark.parametrize("sequences", PREFILLS, ids=str)
def test_prefill_attention(
    dtype: torch.dtype, in_8: bool, h: int, k: int, d: int, sequences: list[tuple[int, int]]
) -> None:
    """Chunks of (tokens before, tokens now)."""
    torch.manual_seed(0)
    lens, contexts = [n for _, n in sequences], [b + n for b, n in sequences]
    *caches, tables, slots = paged(contexts, k, d, dtype)
    k_cache, v_cache = (in_8_bits(cache) if in_8 else cache for cache in caches)
    q = torch.randn(sum(lens), h, d, device=GPU, dtype=dtype)
    starts = torch.tensor([0, *lens]).cumsum(0).int().to(GPU)
    tokens = Tokens.empty(sum(lens), GPU)
    tokens.slots.copy_(torch.cat([slots[i].expand(n) for i, n in enumerate(lens)]))
    tokens.positions.copy_(torch.cat([torch.arange(before, before + now) for before, now in sequences]))
    tokens.context_lens.copy_(tokens.positions + 1)
    blocks = tables[tokens.slots, tokens.positions // BLOCK]
    tokens.cells.copy_(blocks * BLOCK + tokens.positions % BLOCK)
    pieces = [torch.from_numpy(part).int().to(GPU) for part in pieces_of(np.array(lens), piece_tokens(h // k, 128))]
    prefill = PrefillMetadata(lens, contexts, starts, tokens, Pieces(pieces[0], pieces[1], tokens.lone_lens))
    found = kernels_for(GPU).prefill_attention(q, k_cache, v_cache, tables, prefill)
    expected = REFERENCE.prefill_attention(
        q.float(), *(c.float() if isinstance(c, torch.Tensor) else c for c in (k_cache, v_cache)), tables, prefill
    )
    assert error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("rows", "width"), [(1, 576), (7, 4096), (300, 28672), (2, 100)])
def test_quantizing_kernels(rows: int, width: int) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(rows, width, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    both = torch.randn(rows, 2 * width, device=GPU, dtype=torch.bfloat16)
    weight = torch.rand(width, device=GPU, dtype=torch.bfloat16) + 0.5
    fused = kernels_for(GPU)
    found = (
        fused.quantize_rows(x),
        fused.silu_and_mul(both, True),
        fused.add_rms_norm(x, residual.clone(), weight, 1e-5, True)[0],
    )
    expected = x, REFERENCE.silu_and_mul(both), REFERENCE.add_rms_norm(x, residual, weight, 1e-5)[0]
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, Quantized)
        assert isinstance(b, torch.Tensor)
        own = REFERENCE.quantize_rows(b)
        assert error(a.values.float() * a.scales, own.values.float() * own.scales) < 1e-2
        assert error(a.values.float() * a.scales, b) < 4e-2


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 60, 64, 65, 300])
@pytest.mark.parametrize(("out", "width"), [(8192, 8192), (208, 576), (10240, 1024)])
def test_float8_products_equal_the_reference(rows: int, out: int, width: int) -> None:
    """The same numbers in 8 bits on both sides: only sums and the last rounding differ."""
    torch.manual_seed(0)
    x, weight = (REFERENCE.quantize_rows(torch.randn(n, width, device=GPU)) for n in (rows, out))
    assert error(kernels_for(GPU).float8_linear(x, weight), REFERENCE.float8_linear(x, weight)) < 5e-3


@pytest.mark.parametrize("rows", [1, 3, 16, 250])
def test_float8_linear(rows: int) -> None:
    """Rounding to 4 bits of mantissa on both sides: about 3 % per product, averaged over the sum."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 4096, device=GPU, dtype=torch.bfloat16) / 64
    x = torch.randn(rows, 4096, device=GPU, dtype=torch.bfloat16)
    x[0] *= 1000  # one loud token does not hurt the others
    found, expected = Float8Linear(weight)(x), DenseLinear(weight.float())(x.float())
    for i in range(rows):
        assert error(found[i], expected[i]) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 33, 64, 65, 300])
@pytest.mark.parametrize(("out", "width"), [(8192, 8192), (208, 576), (1000, 11008), (50, 100)])
def test_linear(dtype: torch.dtype, rows: int, out: int, width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out, width, device=GPU, dtype=dtype) / width**0.5
    x, bias = torch.randn(rows, width, device=GPU, dtype=dtype), torch.randn(out, device=GPU, dtype=dtype)
    expected = DenseLinear(weight.double(), bias.double())(x.double())
    assert error(CudaLinear(weight, bias)(x), expected) < TOLERANCE[dtype]


@needs_warp_groups
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize(("out", "width"), [(1000, 1408), (208, 576), (4104, 11008), (30, 64), (10240, 8192)])
def test_stream_k_products(dtype: torch.dtype, columns: int, out: int, width: int) -> None:
    """Columns and elements that fill no tile; all numbers of rows; the same bits from the same numbers."""
    from model.kernels.stream_k_product import stream_k_linear

    torch.manual_seed(0)
    exact = torch.randn(MAX_ROWS, width, device=GPU), torch.randn(out, width, device=GPU) / width**0.5
    if dtype == torch.float8_e4m3fn:
        (x, x_scales), (weight, scales) = (REFERENCE.quantize_rows(t) for t in exact)
        expected = (x.double() * x_scales) @ (weight.double() * scales).t()
    else:
        (x, weight), x_scales, scales = (t.to(dtype) for t in exact), None, None
        expected = x.double() @ weight.double().t()
    for rows in range(2, MAX_ROWS + 1):
        tile = Tile(max(8, 1 << (rows - 1).bit_length()), columns)
        some = x_scales[:rows] if x_scales is not None else None
        first, second = (stream_k_linear(x[:rows], weight, tile, some, scales) for _ in range(2))
        assert error(first, expected[:rows]) < (1e-3 if dtype == torch.float16 else 5e-3), rows
        assert torch.equal(first, second), rows
    assert not tickets(x.device).any()


@needs_warp_groups
@pytest.mark.parametrize("in_8", [False, True])
def test_stream_k_products_in_graphs(in_8: bool) -> None:
    """Products in a row, each of which starts while the one before it ends, in graphs that share memory and tickets."""
    from model.kernels.stream_k_product import stream_k_linear

    torch.manual_seed(0)
    widths = [8192, 1408, 4032, 8192, 10240, 704, 64, 8192] * 3
    weights = [torch.randn(n, k, device=GPU, dtype=torch.bfloat16) / k**0.5 for k, n in pairwise(widths)]
    in_8_bits = [REFERENCE.quantize_rows(weight) for weight in weights] if in_8 else []
    start = torch.randn(MAX_ROWS, widths[0], device=GPU, dtype=torch.bfloat16)
    torch.cuda.synchronize()

    def chain(rows: int) -> torch.Tensor:
        x = start[:rows]
        for i, weight in enumerate(weights):
            tile = Tile(rows, (64, 128)[i % 2])
            if in_8:
                q = kernels_for(GPU).quantize_rows(x)
                x = stream_k_linear(q.values, in_8_bits[i].values, tile, q.scales, in_8_bits[i].scales)
            else:
                x = stream_k_linear(x, weight, tile)
        return x

    expected = {rows: chain(rows).clone() for rows in (32, 16, 8)}
    graphs, found, pool = {}, {}, torch.cuda.graph_pool_handle()
    for rows in expected:
        graphs[rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[rows], pool=pool):
            found[rows] = chain(rows)
    for rows in (32, 8, 8, 16, 32, 16):
        found[rows].zero_()
        graphs[rows].replay()
        assert torch.equal(found[rows], expected[rows]), rows
    assert bool(expected[32].isfinite().all())
    assert bool(expected[32].any())
    assert not tickets(start.device).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 17, 60, 65, 256, 300])
@pytest.mark.parametrize(
    ("out", "width", "groups"),
    [(4096, 4096, 32), (200, 576, 18), (1000, 11008, 86), (48, 192, 2), (56, 200, 1), (9000, 512, 8), (8192, 1024, 4)],
)
def test_int4_linear(dtype: torch.dtype, rows: int, out: int, width: int, groups: int) -> None:
    """Groups of 128, 32, 96, 64 and 256 inputs, and one of all; narrow products and wide ones."""
    torch.manual_seed(0)
    q = torch.randint(0, 16, (out, width), dtype=torch.uint8, device=GPU)
    scales = torch.rand(groups, out, device=GPU).half() / width**0.5
    weight = Int4Weight(packed(q), scales, torch.randint(0, 16, (groups, out), dtype=torch.int16, device=GPU))
    x = torch.randn(rows, width, device=GPU, dtype=dtype)
    expected = REFERENCE.int4_linear(x.double(), weight)
    assert error(kernels_for(GPU).int4_linear(x, weight), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("rows", "tiling"),
    [
        (3, (8, 32, 4, 1, 3, 4)),
        (60, (64, 64, 1, 4, 3, 2)),  # what devices without warp groups have
        (70, (64, 64, 1, 4, 3, 1)),
        (70, (64, 128, 1, 8, 3, 4, True)),
    ],
)
def test_int4_products_in_parts_are_the_same_every_time(rows: int, tiling: tuple[int, ...]) -> None:
    """Parts are added in one order, whichever comes last, and leave all tickets for the next product."""
    from model.kernels.int4 import Int4Tiling, skinny_int4_linear

    torch.manual_seed(0)
    out, width, groups = 1000, 1408, 11  # 11 blocks: parts of unequal length, one of them empty
    q = torch.randint(0, 16, (out, width), dtype=torch.uint8, device=GPU)
    scales = torch.rand(groups, out, device=GPU).half() / width**0.5
    weight = Int4Weight(packed(q), scales, torch.randint(0, 16, (groups, out), dtype=torch.int16, device=GPU))
    x = torch.randn(rows, width, device=GPU, dtype=torch.bfloat16)
    expected = REFERENCE.int4_linear(x.double(), weight)
    first, *others = [skinny_int4_linear(x, weight, Int4Tiling(*tiling)) for _ in range(10)]
    assert error(first, expected) < TOLERANCE[torch.bfloat16]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("size", [3, 4, 64, 300])
@pytest.mark.parametrize("width", [2, 300])
def test_unpack_tokens(size: int, width: int) -> None:
    torch.manual_seed(0)
    n, slots = 3, 5
    positions = torch.randint(0, width * BLOCK, (n,))
    ids, of_token, flags = torch.tensor([7, SAMPLED, 9]), torch.tensor([2, 0, 2]), torch.tensor([1, 3, 2])
    packed = torch.cat([torch.tensor([n]), ids, positions, of_token, flags]).int().to(GPU)
    newest = torch.randint(0, 1000, (slots + 1,), device=GPU)
    tables = torch.randint(0, 1000, (slots + 1, width), device=GPU, dtype=torch.int32)
    made = Tokens.empty(size, GPU), Tokens.empty(size, GPU)
    for kernels, tokens in zip((kernels_for(GPU), REFERENCE), made, strict=True):
        kernels.unpack_tokens(packed, newest, tables, BLOCK, tokens)
    for field in fields(Tokens):
        assert torch.equal(*(getattr(tokens, field.name) for tokens in made)), field.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize(("out", "width"), [(12288, 4096), (208, 576), (4096, 11008), (50, 100)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_linear_after_norm(dtype: torch.dtype, rows: int, out: int, width: int, with_residual: bool) -> None:
    torch.manual_seed(0)
    x, other = (torch.randn(rows, width, device=GPU, dtype=dtype) for _ in range(2))
    residual = other if with_residual else None
    weight = torch.randn(out, width, device=GPU, dtype=dtype) / width**0.5
    norm = torch.rand(width, device=GPU, dtype=dtype) + 0.5
    exact = [None if t is None else t.double() for t in (x, residual, norm, weight)]
    expected = REFERENCE.linear_after_norm(exact[0], exact[1], exact[2], 1e-5, exact[3])  # type: ignore[arg-type]
    found = kernels_for(GPU).linear_after_norm(x, residual, norm, 1e-5, weight)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize(("out", "width"), [(4096, 11008), (208, 576), (50, 100)])
def test_linear_after_gate(dtype: torch.dtype, rows: int, out: int, width: int) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(rows, 2 * width, device=GPU, dtype=dtype)
    weight = torch.randn(out, width, device=GPU, dtype=dtype) / width**0.5
    expected = REFERENCE.linear_after_gate(gate_up.double(), weight.double())
    assert error(kernels_for(GPU).linear_after_gate(gate_up, weight), expected) < TOLERANCE[dtype]

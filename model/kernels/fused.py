"""The kernels in Triton, for CUDA. Each computes in float32 and rounds where the reference rounds.

Legend: T tokens, C model dim, F feed-forward dim, S sequences, H query heads, K KV heads, G = H / K, D head dim.
"""

import torch
import triton
import triton.language as tl
from torch.nn.attention.varlen import varlen_attn

from model.kernels import Activations, PrefillMetadata, Quantized
from model.kernels.reference import ReferenceKernels

PROGRAMS = 1056  # enough to keep every multiprocessor of an H100 or H200 (132) busy with memory reads
MAX_SPLITS = 32
TILE = 64  # context tokens that one turn of the decode kernel reads
HEADS_PER_PROGRAM = 8


class FusedKernels:
    """See `Kernels`."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        rows, width = x.shape
        total = x if residual is None else residual
        out, scales = _outputs(x, width, quantize)
        block = triton.next_power_of_2(width)
        warps = min(16, max(4, block // 512))
        _add_rms_norm[(rows,)](
            x, total, weight, out, scales, eps, width, residual is not None, quantize, block, num_warps=warps
        )
        return Quantized(out, scales) if quantize else out, total

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        n_heads: int,
        rotary: torch.Tensor,
        positions: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        tokens = len(qkv)
        kv_heads, d = k_cache.shape[2:]
        q = torch.empty(tokens, n_heads, d, dtype=qkv.dtype, device=qkv.device)
        grid = (tokens, triton.cdiv(n_heads + 2 * kv_heads, HEADS_PER_PROGRAM))
        _rotate_and_write[grid](
            qkv, q, k_cache, v_cache, rotary, positions, slot_mapping,
            n_heads, kv_heads, d, HEADS_PER_PROGRAM, triton.next_power_of_2(d), num_warps=4,
        )  # fmt: skip
        return q

    def decode_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> torch.Tensor:
        n, h, d = q.shape
        block_size, kv_heads = k_cache.shape[1:3]
        # Fixed by the shapes alone, so that a captured graph holds for any lengths.
        splits = min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(PROGRAMS, n * kv_heads)))
        out = torch.empty_like(q)
        partial = torch.empty(n, h, splits, d, dtype=torch.float32, device=q.device) if splits > 1 else out
        lse = torch.empty(n, h, splits, dtype=torch.float32, device=q.device) if splits > 1 else out
        groups, width = h // kv_heads, triton.next_power_of_2(d)
        _decode_split[(n, kv_heads, splits)](
            q, k_cache, v_cache, block_tables, context_lens, out, partial, lse,
            d**-0.5 * 1.4426950408889634, block_tables.stride(0),
            h, kv_heads, groups, max(16, triton.next_power_of_2(groups)), d, width, block_size, TILE, splits,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            _combine_splits[(n, h)](partial, lse, out, h, d, width, splits, num_warps=2)
        return out

    def prefill_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, prefill: PrefillMetadata
    ) -> torch.Tensor:
        if q.dtype == torch.float32:  # flash attention takes 16 bits only
            return ReferenceKernels().prefill_attention(q, k_cache, v_cache, prefill)
        k = k_cache.flatten(0, 1).index_select(0, prefill.slots)
        v = v_cache.flatten(0, 1).index_select(0, prefill.slots)
        out = varlen_attn(
            q, k, v, prefill.query_starts, prefill.context_starts, max(prefill.query_lens), max(prefill.context_lens),
            window_size=(-1, 0),
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor, quantize: bool = False) -> Activations:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out, scales = _outputs(gate_up, width, quantize)
        if not quantize:
            _silu_and_mul[(rows, triton.cdiv(width, 1024))](gate_up, out, width, 1024, num_warps=4)
            return out
        block = triton.next_power_of_2(width)
        warps = min(32, max(4, block // 1024))
        _silu_and_mul_quantized[(rows,)](gate_up, out, scales, width, block, num_warps=warps)
        return Quantized(out, scales)

    def quantize_rows(self, x: torch.Tensor) -> Quantized:
        rows, width = x.shape
        out, scales = _outputs(x, width, True)
        block = triton.next_power_of_2(width)
        _quantize_rows[(rows,)](x, out, scales, width, block, num_warps=min(16, max(4, block // 1024)))
        return Quantized(out, scales)

    def float8_linear(self, x: Quantized, weight: Quantized) -> torch.Tensor:
        tuned = _skinny_parameters(len(x.values), len(weight.values))
        if tuned is not None:
            return skinny_linear(x.values, x.scales, weight.values, weight.scales, *tuned)
        return torch._scaled_mm(
            x.values, weight.values.t(), x.scales, weight.scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )


def _skinny_parameters(rows: int, n: int) -> tuple[int, int, int, int] | None:
    """Parameters of `skinny_linear` where it beats the library, which it does for few rows; measured on an H200."""
    if rows <= 16:
        return (64, 256, 4, 4) if n > 16_384 else (32, 256, 4, 4)
    if rows <= 32:
        return (64, 256, 8, 4) if n > 16_384 else None
    if rows <= 64:
        return (128, 128, 8, 4) if n > 16_384 else (64, 256, 4, 4) if n < 10_000 else None
    return None


def skinny_linear(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    columns: int, depth: int, warps: int, stages: int,
) -> torch.Tensor:  # fmt: skip
    """`float8_linear` for a few rows, where all that counts is to read the weights at full speed.

    `columns` output columns per program, `depth` input elements per turn.
    """
    (rows, k), n = x.shape, len(weight)
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)
    block = max(16, triton.next_power_of_2(rows))
    _skinny_linear[(triton.cdiv(n, columns),)](
        x, x_scales, weight, weight_scales, out, rows, n, k, block, columns, depth,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _outputs(x: torch.Tensor, width: int, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a kernel writes its result [T, width], and its scales if it quantizes."""
    out = torch.empty(len(x), width, dtype=torch.float8_e4m3fn if quantize else x.dtype, device=x.device)
    return out, torch.empty(len(x), 1, dtype=torch.float32, device=x.device) if quantize else out


@triton.jit
def _store_row(out, scales, row, i, value, width, dtype, quantize: tl.constexpr):
    """One row of a result that has been rounded to `dtype`, in 8 bits if asked for."""
    if quantize:
        exact = value.to(dtype).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(exact)), 1e-12) / 448.0
        tl.store(out + row * width + i, (exact / scale).to(out.dtype.element_ty), mask=i < width)
        tl.store(scales + row, scale)
    else:
        tl.store(out + row * width + i, value.to(dtype), mask=i < width)


@triton.jit
def _add_rms_norm(
    x, total, weight, out, scales, eps, width,
    has_residual: tl.constexpr, quantize: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < width
    value = tl.load(x + row * width + i, mask=inside, other=0.0)
    if has_residual:
        before = tl.load(total + row * width + i, mask=inside, other=0.0)
        value = (value.to(tl.float32) + before.to(tl.float32)).to(value.dtype)
        tl.store(total + row * width + i, value, mask=inside)
    exact = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(exact * exact) / width + eps)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    _store_row(out, scales, row, i, exact * scale * w, width, value.dtype, quantize)


# What changes from step to step is not specialised on: a kernel compiled in the middle of traffic is a stall.
@triton.jit(do_not_specialize=["positions", "slots"])
def _rotate_and_write(
    qkv, q, k_cache, v_cache, rotary, positions, slots,
    n_heads: tl.constexpr, kv_heads: tl.constexpr, d: tl.constexpr, heads: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)[:, None]
    i = tl.arange(0, width)[None, :]
    slot = tl.load(slots + token)
    position = tl.load(positions + token)
    inside = (head < n_heads + 2 * kv_heads) & (i < d)
    x = tl.load(qkv + token * (n_heads + 2 * kv_heads) * d + head * d + i, mask=inside, other=0.0)
    turns = inside & (head < n_heads + kv_heads)  # values are stored as they are
    angle = tl.load(rotary + position * d + i + tl.zeros_like(head), mask=turns, other=0.0)
    cos, sin = tl.split(tl.reshape(angle, (heads, width // 2, 2)))
    first, second = tl.split(tl.reshape(x.to(tl.float32), (heads, width // 2, 2)))
    turned = tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (heads, width)).to(x.dtype)
    tl.store(q + (token * n_heads + head) * d + i, turned, mask=inside & (head < n_heads))
    to_k = k_cache + (slot * kv_heads + head - n_heads) * d + i
    tl.store(to_k, turned, mask=turns & (head >= n_heads))
    to_v = v_cache + (slot * kv_heads + head - n_heads - kv_heads) * d + i
    tl.store(to_v, x, mask=inside & (head >= n_heads + kv_heads))


@triton.jit(do_not_specialize=["tables", "lens", "table_stride"])
def _decode_split(
    q, k_cache, v_cache, tables, lens, out, partial, lse, scale, table_stride,
    h: tl.constexpr, kv_heads: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr, d: tl.constexpr,
    width: tl.constexpr, block_size: tl.constexpr, tile: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """Flash decoding (arXiv 2205.14135, online softmax in base 2) over one of `splits` parts of a context."""
    seq = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lens + seq).to(tl.int32)
    per = tl.cdiv(tl.cdiv(length, tile), splits) * tile
    start = split * per
    stop = tl.minimum(start + per, length)
    g = tl.arange(0, rows)
    i = tl.arange(0, width)
    t = tl.arange(0, tile)
    at = (seq * h + kv * groups + g[:, None]) * d + i[None, :]
    ours = (g < groups)[:, None] & (i < d)[None, :]
    query = tl.load(q + at, mask=ours, other=0.0)
    best = tl.full([rows], -float("inf"), tl.float32)
    weight = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, width], tl.float32)
    for begin in range(start, stop, tile):
        position = begin + t
        inside = position < stop
        block = tl.load(tables + seq * table_stride + position // block_size, mask=inside, other=0)
        row = ((block * block_size + position % block_size) * kv_heads + kv).to(tl.int64) * d
        mask = inside[:, None] & (i < d)[None, :]
        keys = tl.load(k_cache + row[:, None] + i[None, :], mask=mask, other=0.0)
        values = tl.load(v_cache + row[:, None] + i[None, :], mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - better[:, None])
        shrink = tl.exp2(best - better)
        weight = weight * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        best = better
    acc = acc / tl.where(weight > 0, weight, 1.0)[:, None]
    if splits == 1:
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=ours)
    else:
        head = seq * h + kv * groups + g
        tl.store(partial + (head[:, None] * splits + split) * d + i[None, :], acc, mask=ours)
        # log2 of the part's weight; -inf where the part is empty
        tl.store(lse + head * splits + split, best + tl.log2(weight), mask=g < groups)


@triton.jit
def _combine_splits(partial, lse, out, h: tl.constexpr, d: tl.constexpr, width: tl.constexpr, splits: tl.constexpr):
    head = (tl.program_id(0) * h + tl.program_id(1)).to(tl.int64)
    s = tl.arange(0, splits)
    i = tl.arange(0, width)
    part = tl.load(lse + head * splits + s)
    best = tl.max(part, 0)
    share = tl.exp2(part - tl.where(best == -float("inf"), 0.0, best))
    mask = (share > 0)[:, None] & (i < d)[None, :]
    values = tl.load(partial + (head * splits + s[:, None]) * d + i[None, :], mask=mask, other=0.0)
    total = tl.sum(share, 0)
    result = tl.sum(values * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * d + i, result.to(out.dtype.element_ty), mask=i < d)


@triton.jit
def _silu_times(gate, up):
    exact = gate.to(tl.float32)
    return (exact / (1.0 + tl.exp(-exact))).to(gate.dtype) * up


@triton.jit
def _silu_and_mul(gate_up, out, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    inside = i < width
    gate = tl.load(gate_up + row * 2 * width + i, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=inside, other=0.0)
    tl.store(out + row * width + i, _silu_times(gate, up), mask=inside)


@triton.jit
def _silu_and_mul_quantized(gate_up, out, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    gate = tl.load(gate_up + row * 2 * width + i, mask=i < width, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=i < width, other=0.0)
    _store_row(out, scales, row, i, _silu_times(gate, up), width, gate.dtype, True)


@triton.jit
def _quantize_rows(x, out, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    value = tl.load(x + row * width + i, mask=i < width, other=0.0)
    _store_row(out, scales, row, i, value, width, value.dtype, True)


@triton.jit(do_not_specialize=["rows"])
def _skinny_linear(
    x, x_scales, weight, weight_scales, out, rows, n, k,
    block: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * columns + tl.arange(0, columns)
    row = tl.arange(0, block)
    i = tl.arange(0, depth)
    to_x = x + row[:, None] * k + i[None, :]
    to_w = weight + column[:, None].to(tl.int64) * k + i[None, :]
    acc = tl.zeros([block, columns], tl.float32)
    for start in range(0, k, depth):
        left = i[None, :] < k - start
        a = tl.load(to_x + start, mask=(row < rows)[:, None] & left, other=0.0)
        b = tl.load(to_w + start, mask=(column < n)[:, None] & left, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    scale = tl.load(x_scales + row, mask=row < rows, other=0.0)[:, None]
    scale = scale * tl.load(weight_scales + column, mask=column < n, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], (acc * scale).to(out.dtype.element_ty), mask=inside)

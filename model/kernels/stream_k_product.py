"""Products of few rows on Hopper, where all that counts is to read the weights at full speed (in Gluon).

Weights are the left operand, weights [n, k] times inputs [k, T]: 64 of their rows are what four warps multiply at once,
and the other side may be as few as 8. Units of both come by TMA into a ring in shared memory. See `stream_k` for how
the work is cut.

Legend: T tokens, n columns of the result, k elements summed.
"""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from model.kernels.device import MAX_TICKETS, multiprocessors, tickets
from model.kernels.early import await_inputs, early, let_next_start
from model.kernels.stream_k import DEPTH, Tile, shares

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name up to Triton 3.6


def stream_k_linear(
    x: torch.Tensor, weight: torch.Tensor, tile: Tile,
    x_scales: torch.Tensor | None = None, weight_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [T, k] times weight [n, k] transposed -> [T, n]; float8 inputs come with their scales and give bfloat16.

    `weight` is read before what the kernels before have written is awaited: it may come from none that lets the next
    one start early.
    """
    (rows, k), n = x.shape, len(weight)
    scaled = x_scales is not None
    out = torch.empty(rows, n, dtype=torch.bfloat16 if scaled else x.dtype, device=x.device)
    work = shares(tile, n, k * x.itemsize, multiprocessors(x.device))
    assert rows <= tile.rows
    assert work.programs <= MAX_TICKETS
    partial = torch.empty(work.programs, 2, tile.columns, tile.rows, dtype=torch.float32, device=x.device)
    scales = (out, out) if x_scales is None or weight_scales is None else (x_scales, weight_scales)
    _stream_k_product[(work.programs,)](
        _descriptor(weight, tile.columns), _descriptor(x, tile.rows), out, partial, tickets(x.device), *scales,
        rows, n, work.blocks, work.units, work.per_program, tile.stages, scaled, num_warps=4, **early(),
    )  # fmt: skip
    return out


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of x [.., k], read `rows` at once; what lies outside is read as zeros."""
    return TensorDescriptor.from_tensor(x, [rows, DEPTH // x.itemsize], _in_shared_memory(x.itemsize))


@cache
def _in_shared_memory(itemsize: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, itemsize * 8, 2)


@gluon.jit
def _expect(turn, turns, bars, size: gl.constexpr, stages: gl.constexpr):
    mbarrier.expect(bars.index(turn % stages), size, pred=turn < turns)


@gluon.jit
def _fetch(turn, turns, unit, blocks, desc, bars, ring, depth: gl.constexpr, over: gl.constexpr, stages: gl.constexpr):
    """Ask for one operand's part of a turn's unit; `over` is what a tile spans of its rows, 0 for the inputs."""
    at = unit + turn
    slot = turn % stages
    corner = [at // blocks * over, at % blocks * depth]
    tma.async_copy_global_to_shared(desc, corner, bars.index(slot), ring.index(slot), pred=turn < turns)


@gluon.jit
def _store(total, out, x_scales, w_scales, left, column, row, rows, n, scaled: gl.constexpr):
    column = left + column
    if scaled:
        scale = gl.load(w_scales + column, mask=column < n, other=0.0)
        total *= scale * gl.load(x_scales + row, mask=row < rows, other=0.0)
    result = total.to(out.dtype.element_ty)
    gl.store(out + row * n + column, result, mask=(row < rows) & (column < n))


@gluon.jit(do_not_specialize=["rows", "n", "blocks", "units", "per"])
def _stream_k_product(
    w_desc, x_desc, out, partial, tickets, x_scales, w_scales, rows, n, blocks, units, per,
    stages: gl.constexpr, scaled: gl.constexpr, early: gl.constexpr,
):  # fmt: skip
    """Of the `units` (tiles x `blocks`) this program has `per` neighbouring ones, one after the other."""
    let_next_start(early)
    columns: gl.constexpr = w_desc.block_type.shape[0]
    depth: gl.constexpr = w_desc.block_type.shape[1]
    block: gl.constexpr = x_desc.block_type.shape[0]
    bits: gl.constexpr = w_desc.dtype.primitive_bitwidth
    size: gl.constexpr = (columns + block) * depth * bits // 8
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, block, 256 // bits])
    unit = gl.program_id(0) * per
    first = unit
    last = gl.minimum(unit + per, units)
    turns = last - unit
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [stages, columns, depth], w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [stages, block, depth], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    _barrier()
    for turn in gl.static_range(stages - 1):
        _expect(turn, turns, bars, size, stages)
        _fetch(turn, turns, first, blocks, w_desc, bars, w_ring, depth, columns, stages)
    await_inputs(early)
    for turn in gl.static_range(stages - 1):
        _fetch(turn, turns, first, blocks, x_desc, bars, x_ring, depth, 0, stages)
    column = gl.arange(0, columns, gl.SliceLayout(1, sums))[:, None]
    row = gl.arange(0, block, gl.SliceLayout(0, sums))[None, :]
    turn = 0
    while unit < last:
        tile = unit // blocks
        end = gl.minimum(last, (tile + 1) * blocks)
        acc = gl.zeros([columns, block], gl.float32, sums)
        for _ in range(end - unit):
            slot = turn % stages
            mbarrier.wait(bars.index(slot), turn // stages & 1)
            acc = warpgroup_mma(w_ring.index(slot), x_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            _barrier()  # all have done with the turn before, and its place is free
            _expect(turn + stages - 1, turns, bars, size, stages)
            _fetch(turn + stages - 1, turns, first, blocks, w_desc, bars, w_ring, depth, columns, stages)
            _fetch(turn + stages - 1, turns, first, blocks, x_desc, bars, x_ring, depth, 0, stages)
            turn += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        if end - unit == blocks:
            _store(acc, out, x_scales, w_scales, tile * columns, column, row, rows, n, scaled)
        else:
            _join(acc, out, partial, tickets, x_scales, w_scales, tile, unit, blocks, per, column, row, rows, n, scaled)
        unit = end


@gluon.jit
def _join(
    acc, out, partial, tickets, x_scales, w_scales, tile, unit, blocks, per, column, row, rows, n, scaled: gl.constexpr
):
    """Leave the sums of a part of a tile; the last of its programs, told by a ticket, adds all in the tile's order.

    A program has two places, for its part of a tile that another begins and for that of one which it begins itself. The
    latter is its last tile, so that the program that begins a tile names its ticket.
    """
    columns: gl.constexpr = acc.shape[0]
    block: gl.constexpr = acc.shape[1]
    size: gl.constexpr = columns * block
    inside = (row < rows) & (column < columns)
    begins = tile * blocks // per
    parts = ((tile + 1) * blocks - 1) // per - begins + 1
    place = column * block + row
    mine = 2 * gl.program_id(0) + (unit == tile * blocks).to(gl.int32)
    gl.store(partial + mine.to(gl.int64) * size + place, acc, mask=inside)
    _barrier()  # all of the part is written before its ticket is drawn
    if gl.atomic_add(tickets + begins, 1, sem="acq_rel", scope="gpu") == parts - 1:
        to_part = partial + (2 * begins).to(gl.int64) * size + place
        total = gl.load(to_part + size, mask=inside, other=0.0, cache_modifier=".cg")
        for _ in range(parts - 1):
            to_part += 2 * size
            total += gl.load(to_part, mask=inside, other=0.0, cache_modifier=".cg")
        _store(total, out, x_scales, w_scales, tile * columns, column, row, rows, n, scaled)
        gl.store(tickets + begins, 0)

"""Products with weights in 4 bits whose words are unpacked in the registers that the matrix unit reads (in Gluon).

Legend: T tokens, n columns of the result, k elements summed, G groups. A block is 128 inputs, a plane 32 of them.

Weights are the left operand, weights [n, k] times inputs [k, T]: the one that may come from registers. A thread has, of
each 16 inputs that the unit multiplies at once, the pairs 2t and 2t + 8 (t = 0..3), and a word unpacks to pairs. So
unpacking moves nothing between threads, and all that is left is three instructions for two weights.

Both kernels have `stages` turns of words and inputs on their way to shared memory. With `splits` > 1, each part of the
inputs has its own programs; the last one of a tile, told by its ticket, adds their sums in a fixed order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.runtime.jit import constexpr_function

from model.kernels.early import await_inputs, let_next_start

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name up to Triton 3.6


@constexpr_function
def _powers(first, count):
    """first, 2 * first, ...: one for each time that `count` is divided by 2."""
    return [first << i for i in range(count.bit_length() - 1)]


@constexpr_function
def _in_a_row(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@constexpr_function
def _copied(rows, at_once, warps):
    """[.., rows, 4 * at_once] from memory, `at_once` elements of 16 bytes in all per thread."""
    over = min(warps, rows // 8)
    return gl.BlockedLayout([1, 1, at_once], [1, 8, 4], [warps // over, over, 1], [2, 1, 0])


@constexpr_function
def _result_layout(warps):
    return gl.BlockedLayout([2, 1], [32, 1], [1, warps], [0, 1])


@constexpr_function
def _one_of(layout, dim):
    """Of the dimensions of a layout that one only."""
    for other in reversed(range(layout.rank)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@constexpr_function
def _rank(layout):
    return layout.rank


@gluon.jit
def _along(dim: gl.constexpr, size: gl.constexpr, layout: gl.constexpr):
    """0 to size - 1 along one dimension, of size 1 along the others."""
    i = gl.arange(0, size, _one_of(layout, dim))
    for other in gl.static_range(_rank(layout)):
        if other != dim:
            i = gl.expand_dims(i, other)
    return i


@gluon.jit
def _of_group(values, start, column, n, groups, size):
    """Scales or zeros of the inputs from `start` on; past the last input it does not matter which."""
    return gl.load(values + gl.minimum(start // size, groups - 1) * n + column)


@gluon.jit
def _as_floats(zero, kind: gl.constexpr):
    """Two floats in a word, each 128 + zero in bfloat16 or 1024 + zero in float16."""
    return zero.to(gl.int32) * 0x00010001 + (0x64006400 if kind == gl.float16 else 0x43004300)


@gluon.jit
def _pairs(nibbles, zeros, kind: gl.constexpr):
    """q - zero for the two q at the ends of both halves of each word, as [..., 2]; `zeros` are `_as_floats`."""
    asm: gl.constexpr = (
        "{.reg .b32 q; lop3.b32 q, $1, 0x000F000F, 0x64006400, 0xEA; sub.f16x2 $0, q, $2;}"
        if kind == gl.float16
        else "{.reg .b32 q; lop3.b32 q, $1, 0x000F000F, 0x43004300, 0xEA; sub.bf16x2 $0, q, $2;}"
    )
    both = gl.inline_asm_elementwise(asm, "=r,r,r", [nibbles, zeros], dtype=gl.int32, is_pure=True, pack=1)
    first = both.to(gl.int16).to(kind, bitcast=True)
    return gl.join(first, (both >> 16).to(gl.int16).to(kind, bitcast=True))


@gluon.jit
def _store(total, out, partial, tickets, rows, n, top, left, splits: gl.constexpr):
    """A tile [columns, rows] of the result, or of one part of it."""
    columns: gl.constexpr = total.shape[0]
    block: gl.constexpr = total.shape[1]
    layout: gl.constexpr = _result_layout(gl.num_warps())
    total = gl.convert_layout(total, layout)
    column = left + gl.arange(0, columns, gl.SliceLayout(1, layout))[:, None]
    row = gl.arange(0, block, gl.SliceLayout(0, layout))[None, :]
    whole = (top + row < rows) & (column < n)
    if splits == 1:
        gl.store(out + (top + row) * n + column, total.to(out.dtype.element_ty), mask=whole)
    else:
        tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
        to_part = partial + tile * (splits * block * columns) + row * columns + (column - left)
        gl.store(to_part + gl.program_id(2) * (block * columns), total, mask=top + row < rows)
        _barrier()  # all of the part is written before its ticket is drawn
        if gl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == splits - 1:
            total = gl.zeros_like(total)
            for s in gl.static_range(splits):
                total += gl.load(
                    to_part + s * (block * columns), mask=top + row < rows, other=0.0, cache_modifier=".cg"
                )
            gl.store(out + (top + row) * n + column, total.to(out.dtype.element_ty), mask=whole)
            gl.store(tickets + tile, 0)


# -- by single warps ---------------------------------------------------------------------------------------------------


@constexpr_function
def _sums_of_warps(depth, across):
    return gl.NVMMADistributedLayout([2, 0], [depth, across, 1], [1, 16, 8])


@constexpr_function
def _words_of_warps(depth, columns, across):
    """Thread t of four has words 4t to 4t + 3: inputs 8t to 8t + 7 of a plane."""
    wide = [[0, i, 0] for i in _powers(16 * across, columns // (16 * across))]
    warps = [[0, i, 0] for i in _powers(16, across)] + [[i, 0, 0] for i in _powers(1, depth)]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 8, 0], *wide], lanes, warps, [], [depth, columns, 16])


@constexpr_function
def _inputs_of_warps(depth, rows, across):
    """The same inputs, eight in a row, of row l of eight."""
    high = [[0, i, 0] for i in _powers(8, rows // 8)]
    warps = [[0, 0, 0] for _ in _powers(1, across)] + [[i, 0, 0] for i in _powers(1, depth)]
    lanes = [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 0, 4], *high], lanes, warps, [], [depth, rows, 32])


@constexpr_function
def _inputs_copied(depth, rows, warps):
    over = min(warps, rows // 8)
    along = min(warps // over, depth)
    return gl.BlockedLayout([1, 1, 1, 8], [1, 1, 8, 4], [warps // over // along, along, over, 1], [3, 2, 1, 0])


@gluon.jit
def _in_order_of_words(plane):
    """[..., 8t + 2r + h] -> [..., 8r + 2t + h]: as the unit counts, without a move; sums do not care."""
    split: gl.constexpr = [plane.shape[0], plane.shape[1], 4, 4, 2]
    return gl.reshape(gl.permute(gl.reshape(plane, split), (0, 1, 3, 2, 4)), [plane.shape[0], plane.shape[1], 32])


@gluon.jit
def _fetch(
    turn, turns, first, last, to_w, to_x, inside, w_smem, x_smem, w_d, x_d, depth: gl.constexpr, stages: gl.constexpr
):
    """Ask for a turn's words and inputs; inputs past the end are zeros, so words may be any."""
    if turn < turns:
        at = first + turn * depth
        slot = turn % stages
        async_copy.async_copy_global_to_shared(w_smem.index(slot), to_w + gl.minimum(at + w_d, last - 1) * 16)
        async_copy.async_copy_global_to_shared(
            x_smem.index(slot), to_x + (at + x_d) * 128, mask=inside & (at + x_d < last)
        )
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows", "blocks", "groups", "size"])
def product_of_warps(
    x, words, scales, zeros, out, partial, tickets, rows, n, blocks, groups, size, run: gl.constexpr,
    block: gl.constexpr, columns: gl.constexpr, depth: gl.constexpr, across: gl.constexpr, stages: gl.constexpr,
    splits: gl.constexpr, early: gl.constexpr,
):  # fmt: skip
    """`depth` blocks of inputs are summed each for itself, by `across` warps, and added at the end.

    Scales come in after each `run` planes. With `run` 4, a block of one group, they are read one turn ahead.
    """
    let_next_start(early)
    await_inputs(early)
    kind: gl.constexpr = x.dtype.element_ty
    WORDS: gl.constexpr = _words_of_warps(depth, columns, across)
    INPUTS: gl.constexpr = _inputs_of_warps(depth, block, across)
    SUMS: gl.constexpr = _sums_of_warps(depth, across)
    W: gl.constexpr = _copied(columns, 4, depth * across)
    X: gl.constexpr = _inputs_copied(depth, block, depth * across)
    left = gl.program_id(1) * columns
    top = gl.program_id(0) * block
    per = gl.cdiv(gl.cdiv(blocks, splits), depth) * depth
    first = gl.program_id(2) * per
    last = gl.minimum(first + per, blocks)
    turns = gl.cdiv(last - first, depth)
    w_d = _along(0, depth, W)
    w_c = gl.minimum(left + _along(1, columns, W), n - 1)  # past the end like the last, and not stored
    w_i = _along(2, 16, W)
    to_w = words + w_c.to(gl.int64) * (blocks * 16) + w_i
    x_j, x_d, x_r, x_i = _along(0, 4, X), _along(1, depth, X), top + _along(2, block, X), _along(3, 32, X)
    to_x = x + x_r * (blocks * 128) + 32 * x_j + x_i
    w_smem = gl.allocate_shared_memory(gl.int32, [stages, depth, columns, 16], _in_a_row(3))
    x_smem = gl.allocate_shared_memory(kind, [stages, 4, depth, block, 32], _in_a_row(4))
    planes = x_smem._reinterpret(kind, [stages * 4, depth, block, 32], _in_a_row(3))
    for turn in gl.static_range(stages - 1):
        _fetch(turn, turns, first, last, to_w, to_x, x_r < rows, w_smem, x_smem, w_d, x_d, depth, stages)
    column = left + gl.arange(0, columns, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    near = gl.minimum(column, n - 1)[None, :]
    d = gl.arange(0, depth, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None]
    acc = gl.zeros([depth, columns, block], gl.float32, SUMS)
    scale = _of_group(scales, (first + d) * 128, near, n, groups, size)
    zero = _of_group(zeros, (first + d) * 128, near, n, groups, size)
    for turn in range(turns):
        async_copy.wait_group(stages - 2)
        _fetch(turn + stages - 1, turns, first, last, to_w, to_x, x_r < rows, w_smem, x_smem, w_d, x_d, depth, stages)
        at = first + turn * depth + d
        if run == 4:
            next_scale = _of_group(scales, (at + depth) * 128, near, n, groups, size)
            next_zero = _of_group(zeros, (at + depth) * 128, near, n, groups, size)
        w = w_smem.index(turn % stages).load(WORDS)
        part = gl.zeros([depth, columns, block], gl.float32, SUMS)
        for j in gl.static_range(4):
            if run < 4 and j % run == 0:
                scale = _of_group(scales, at * 128 + 32 * j, near, n, groups, size)
                zero = _of_group(zeros, at * 128 + 32 * j, near, n, groups, size)
            a = gl.reshape(_pairs(w >> (4 * j), _as_floats(zero, kind)[:, :, None], kind), [depth, columns, 32])
            a = gl.convert_layout(_in_order_of_words(a), gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
            b = gl.permute(_in_order_of_words(planes.index(turn % stages * 4 + j).load(INPUTS)), (0, 2, 1))
            part = mma_v2(a, gl.convert_layout(b, gl.DotOperandLayout(1, SUMS, 2), assert_trivial=True), part)
            if (j + 1) % run == 0:
                times = gl.convert_layout(scale.to(gl.float32), gl.SliceLayout(2, SUMS), assert_trivial=True)
                acc += part * times[:, :, None]
                part = gl.zeros([depth, columns, block], gl.float32, SUMS)
        if run == 4:
            scale, zero = next_scale, next_zero
    _store(gl.sum(acc, 0), out, partial, tickets, rows, n, top, left, splits)


# -- by groups of four warps, on Hopper --------------------------------------------------------------------------------


@constexpr_function
def _sums_of_groups(across, rows):
    return gl.NVMMADistributedLayout([3, 0], [across, 1], [16, rows, 16])


@constexpr_function
def _words_of_groups(columns, across):
    """Thread t of four has words t, t + 4, t + 8 and t + 12: shared memory gives inputs in their own order only."""
    wide = [[i, 0] for i in _powers(16 * across, columns // (16 * across))]
    warps = [[i, 0] for i in _powers(16, across)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 4], [0, 8], [8, 0], *wide], lanes, warps, [], [columns, 16])


@gluon.jit
def _fetch_block(turn, turns, first, to_w, to_x, inside, w_smem, x_smem, stages: gl.constexpr):
    if turn < turns:
        at = first + turn
        slot = turn % stages
        async_copy.async_copy_global_to_shared(w_smem.index(slot), to_w + at * 16)
        async_copy.async_copy_global_to_shared(x_smem.index(slot), to_x + at * 128, mask=inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["rows", "blocks", "groups", "size"])
def product_of_groups(
    x, words, scales, zeros, out, partial, tickets, rows, n, blocks, groups, size, run: gl.constexpr,
    block: gl.constexpr, columns: gl.constexpr, across: gl.constexpr, stages: gl.constexpr, splits: gl.constexpr,
    early: gl.constexpr,
):  # fmt: skip
    """The same a block at a time: more multiplications at once, and inputs that no thread loads."""
    let_next_start(early)
    await_inputs(early)
    kind: gl.constexpr = x.dtype.element_ty
    WORDS: gl.constexpr = _words_of_groups(columns, across)
    SUMS: gl.constexpr = _sums_of_groups(across, block)
    W: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [across, 1], [1, 0])
    X: gl.constexpr = _copied(block, 8, across)
    left = gl.program_id(1) * columns
    top = gl.program_id(0) * block
    per = gl.cdiv(blocks, splits)
    first = gl.program_id(2) * per
    turns = gl.minimum(first + per, blocks) - first
    w_c = gl.minimum(left + gl.arange(0, columns, gl.SliceLayout(1, W)), n - 1)[:, None]
    to_w = words + w_c.to(gl.int64) * (blocks * 16) + gl.arange(0, 16, gl.SliceLayout(0, W))[None, :]
    x_r, x_i = top + _along(1, block, X), _along(2, 32, X)
    to_x = x + x_r * (blocks * 128) + 32 * _along(0, 4, X) + x_i
    w_smem = gl.allocate_shared_memory(gl.int32, [stages, columns, 16], gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))
    x_smem = gl.allocate_shared_memory(kind, [stages, 4, block, 32], gl.NVMMASharedLayout(64, 16, 3))
    planes = x_smem._reinterpret(kind, [stages * 4, block, 32], gl.NVMMASharedLayout(64, 16, 2))
    for turn in gl.static_range(stages - 1):
        _fetch_block(turn, turns, first, to_w, to_x, x_r < rows, w_smem, x_smem, stages)
    near = gl.minimum(left + gl.arange(0, columns, gl.SliceLayout(1, WORDS)), n - 1)
    acc = gl.zeros([columns, block], gl.float32, SUMS)
    part = gl.zeros([columns, block], gl.float32, SUMS)
    scale = _of_group(scales, first * 128, near, n, groups, size)
    zero = _of_group(zeros, first * 128, near, n, groups, size)
    for turn in range(turns):
        async_copy.wait_group(stages - 2)
        fence_async_shared()
        _barrier()
        _fetch_block(turn + stages - 1, turns, first, to_w, to_x, x_r < rows, w_smem, x_smem, stages)
        at = first + turn
        if run == 4:
            next_scale = _of_group(scales, (at + 1) * 128, near, n, groups, size)
            next_zero = _of_group(zeros, (at + 1) * 128, near, n, groups, size)
        w = w_smem.index(turn % stages).load(WORDS)
        for j in gl.static_range(4):
            if run < 4 and j % run == 0:
                scale = _of_group(scales, at * 128 + 32 * j, near, n, groups, size)
                zero = _of_group(zeros, at * 128 + 32 * j, near, n, groups, size)
            a = gl.reshape(_pairs(w >> (4 * j), _as_floats(zero, kind)[:, None], kind), [columns, 32])
            a = gl.convert_layout(a, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
            b = planes.index(turn % stages * 4 + j).permute((1, 0))
            part = warpgroup_mma(a, b, part, use_acc=j % run != 0, is_async=True)
            if (j + 1) % run == 0:
                part = warpgroup_mma_wait(0, deps=[part])
                times = gl.convert_layout(scale.to(gl.float32), gl.SliceLayout(1, SUMS), assert_trivial=True)
                acc += part * times[:, None]
        if run == 4:
            scale, zero = next_scale, next_zero
    _store(acc, out, partial, tickets, rows, n, top, left, splits)

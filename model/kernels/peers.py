"""Sums over the GPUs of one stage, by kernels that write into each other's memory (one-shot all-reduce over NVLink).

Each GPU sends its share of a row to all others, waits for theirs, adds them up in the order of the GPUs, so that all
get the same, and goes on with what follows a sum: the residual and RMSNorm. Rows do not wait for each other, and there
is no barrier: a row has turns, counted on every GPU alike. What is received lies in one of two places in turns: whoever
sends turn n + 2 has received turn n + 1, which was sent after turn n had been read.

Few rows travel as words of a value and the turn that it belongs to, each of which says by itself that it has come (the
LL protocol of NCCL); more rows as they are, with a flag per row behind them. Every wait has a limit: what waited longer
counts as broken, and so does all that follows.

All GPUs must take the same steps in the same order, and a step must be launched on all of them before the host waits
for any: a GPU that waits in a kernel keeps the host from loading a kernel or freeing memory there, for as long as it
waits. So these kernels are for captured steps alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from model.kernels import Activations, Quantized
from model.kernels.early import begin, early
from model.kernels.fused import FusedKernels, _outputs, _store_row

WORD_ROWS = 32  # up to so many rows travel as words
POLLS_PER_S = 4_000_000  # about so often a kernel looks whether something has come
CHUNK = 4096  # columns of logits that travel together


class Peers:
    """What one of the GPUs of a stage receives into, and where it sends to."""

    def __init__(self, rank: int, of: int, rows: int, width: int, words: Sequence[range], dtype: torch.dtype,
                 device: torch.device) -> None:  # fmt: skip
        def zeros(*shape: int, as_type: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=as_type, device=device)

        self.rank, self.of, self.rows, self.words = rank, of, rows, words
        self.patience = zeros(1)  # looks; 0: wait for nothing
        self.turns = zeros(rows)  # that each row has had
        self.flags = zeros(of, rows)  # the newest turn of each row that has come from each GPU
        self.inbox = zeros(2, of, rows, width, as_type=dtype)
        self.word_inbox = zeros(2, of, min(rows, WORD_ROWS), width * dtype.itemsize // 4, as_type=torch.int64)
        self.broken = zeros(1)
        self.alarm = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # the same, where the host sees it at once
        # Logits of the first GPU, which others send theirs to:
        self.chunks = max(-(-len(part) // CHUNK) for part in words)  # that each sends of a row
        self.logits = zeros(rows if rank == 0 else 0, words[-1].stop, as_type=torch.float32)
        self.logit_turns, self.logit_flags = zeros(rows), zeros(of, rows)

    def connect(self, all_: "Sequence[Peers]") -> None:
        """Learn where everybody receives."""
        for other in all_:  # makes the memory of both reachable
            torch.zeros(1, device=self.turns.device).copy_(torch.zeros(1, device=other.turns.device))
        device = self.turns.device
        self.inboxes, self.word_inboxes, self.all_flags = (
            torch.tensor([getattr(other, name).data_ptr() for other in all_], dtype=torch.int64, device=device)
            for name in ("inbox", "word_inbox", "flags")
        )
        self.leader = all_[0]

    def be_patient(self, looks: int) -> None:
        """From now on, captured steps too."""
        self.patience.fill_(looks)

    def reset(self) -> None:
        """As at the start. Nothing may be under way on any of the GPUs."""
        for tensor in (self.turns, self.flags, self.inbox, self.word_inbox, self.broken, self.logit_turns):
            tensor.zero_()
        self.logit_flags.zero_()
        self.alarm.zero_()


class PeerKernels(FusedKernels):
    """Kernels that take shares of sums; see `Peers`."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        p, (rows, width) = self._peers, x.shape
        assert rows <= p.rows
        assert x.is_contiguous()
        total = torch.empty_like(x) if residual is None else residual
        out, scales = _outputs(x, width, quantize)
        block = triton.next_power_of_2(width)
        options = {"num_warps": min(16, max(4, block // 512)), **early()}
        common = (residual is not None, quantize, block, p.rank, p.of)
        if rows <= WORD_ROWS:
            per_word = 4 // x.itemsize
            _sum_words[(rows,)](
                x.view(torch.int32), total, weight, out, scales, eps, width, p.turns, p.word_inbox, p.word_inboxes,
                p.broken, p.alarm.data_ptr(), p.patience, p.word_inbox.shape[2], per_word, *common, **options,
            )  # fmt: skip
        else:
            _sum_rows[(rows,)](
                x, total, weight, out, scales, eps, width, p.turns, p.inbox, p.inboxes, p.flags, p.all_flags,
                p.broken, p.alarm.data_ptr(), p.patience, p.rows, *common, **options,
            )  # fmt: skip
        return Quantized(out, scales) if quantize else out, total

    def linear_after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = self.add_rms_norm(x, residual, norm, eps)
        assert isinstance(normed, torch.Tensor)
        return self.linear(normed, weight), total

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.add_rms_norm(x, residual, residual[0], 1.0)[1]  # of a norm that nobody looks at

    def gather(self, share: torch.Tensor) -> torch.Tensor:
        """On the first GPU [rows, V], valid until the next sum; others return their share."""
        p, leader, (rows, width) = self._peers, self._peers.leader, share.shape
        assert rows <= p.rows
        options = {"num_warps": 4, **early()}
        if p.rank == 0:
            _collect_columns[(rows, p.chunks)](
                share, p.logits, p.logit_flags, p.logit_turns, width, p.logits.shape[1], p.broken, p.alarm.data_ptr(),
                p.patience, p.rows, p.chunks, p.of, CHUNK, **options,
            )  # fmt: skip
            return p.logits[:rows]
        _send_columns[(rows, p.chunks)](
            share, leader.logits.data_ptr(), leader.logit_flags.data_ptr(), width, leader.logits.shape[1],
            p.words[p.rank].start, p.rank, p.rows, CHUNK, **options,
        )  # fmt: skip
        return share


def connected(devices: Sequence[torch.device], rows: int, width: int, words: Sequence[range], dtype: torch.dtype
              ) -> list[Peers]:  # fmt: skip
    """Of the GPUs of one stage, for steps of up to `rows` tokens. Raises `ValueError` if one cannot reach another."""
    for a in devices:
        for b in devices:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                raise ValueError(f"pipeline.tensor_parallel: {a} cannot reach the memory of {b}: use stages instead")
    made = [Peers(rank, len(devices), rows, width, words, dtype, device) for rank, device in enumerate(devices)]
    for peers in made:
        peers.connect(made)
    return made


@triton.jit
def _values(bits, per_word: tl.constexpr, dtype: tl.constexpr):
    """int32 words -> float32 values, one or two of each."""
    if per_word == 1:
        values = bits.to(tl.float32, bitcast=True)
    else:
        low = (bits & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
        values = tl.interleave(low, high).to(tl.float32)
    return values


@triton.jit
def _finish(
    acc, total, weight, out, scales, eps, width, row, i, dtype: tl.constexpr,
    has_residual: tl.constexpr, quantize: tl.constexpr,
):  # fmt: skip
    """The sum, with what comes after it."""
    inside = i < width
    if has_residual:
        acc += tl.load(total + row * width + i, mask=inside, other=0.0).to(tl.float32)
    value = acc.to(dtype)
    tl.store(total + row * width + i, value, mask=inside)
    exact = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(exact * exact) / width + eps)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    _store_row(out, scales, row, i, exact * scale * w, width, dtype, quantize)


@triton.jit
def _give_up(broken, alarm):
    tl.store(broken, 1)
    tl.store(alarm.to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def _await(flag, value, broken, alarm, patience):
    """Until `flag` is `value` or more; what was written before it was set may be read then."""
    looks = tl.where(tl.load(broken) == 0, tl.load(patience), 0)
    tries = 0
    missing = value - tl.load(flag, volatile=True)  # threads may see it at different times: no barrier until all have
    while (missing > 0) & (tries < looks):
        missing = value - tl.load(flag, volatile=True)
        tries += 1
    if missing > 0:
        _give_up(broken, alarm)
    tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _sum_words(
    x, total, weight, out, scales, eps, width, turns, inbox, inboxes, broken, alarm, patience,
    most_rows: tl.constexpr, per_word: tl.constexpr, has_residual: tl.constexpr, quantize: tl.constexpr,
    block: tl.constexpr, rank: tl.constexpr, of: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    words = width // per_word
    i = tl.arange(0, block // per_word)
    inside = i < words
    turn = tl.load(turns + row) + 1
    mine = tl.load(x + row * words + i, mask=inside, other=0)
    sent = (turn.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    place = (turn & 1).to(tl.int64) * of
    for k in tl.static_range(1, of):
        to = tl.load(inboxes + (rank + k) % of).to(tl.pointer_type(tl.int64))
        tl.store(to + ((place + rank) * most_rows + row) * words + i, sent, mask=inside)
    looks = tl.where(tl.load(broken) == 0, tl.load(patience), 0)
    acc = tl.zeros([block], tl.float32)
    for source in tl.static_range(of):
        if source == rank:
            acc += _values(mine, per_word, total.dtype.element_ty)
        else:
            at = inbox + ((place + source) * most_rows + row) * words + i
            got = tl.load(at, mask=inside, other=0, volatile=True)
            missing = tl.max(tl.where(inside & ((got >> 32).to(tl.int32) != turn), 1, 0))
            tries = 0
            while (missing != 0) & (tries < looks):
                got = tl.load(at, mask=inside, other=0, volatile=True)
                missing = tl.max(tl.where(inside & ((got >> 32).to(tl.int32) != turn), 1, 0))
                tries += 1
            if missing != 0:
                _give_up(broken, alarm)
            acc += _values(got.to(tl.int32), per_word, total.dtype.element_ty)
    tl.store(turns + row, turn)
    e = tl.arange(0, block)
    _finish(acc, total, weight, out, scales, eps, width, row, e, total.dtype.element_ty, has_residual, quantize)


@triton.jit
def _sum_rows(
    x, total, weight, out, scales, eps, width, turns, inbox, inboxes, flags, all_flags, broken, alarm, patience,
    most_rows: tl.constexpr, has_residual: tl.constexpr, quantize: tl.constexpr,
    block: tl.constexpr, rank: tl.constexpr, of: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    inside = i < width
    turn = tl.load(turns + row) + 1
    mine = tl.load(x + row * width + i, mask=inside, other=0.0)
    place = (turn & 1).to(tl.int64) * of
    for k in tl.static_range(1, of):
        to = tl.load(inboxes + (rank + k) % of).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(to + ((place + rank) * most_rows + row) * width + i, mine, mask=inside)
    tl.debug_barrier()  # the flag follows what all threads have written
    for k in tl.static_range(1, of):
        flag = tl.load(all_flags + (rank + k) % of).to(tl.pointer_type(tl.int32)) + rank * most_rows + row
        tl.atomic_xchg(flag, turn, sem="release", scope="sys")
    acc = tl.zeros([block], tl.float32)
    for source in tl.static_range(of):
        if source == rank:
            acc += mine.to(tl.float32)
        else:
            _await(flags + source * most_rows + row, turn, broken, alarm, patience)
            at = inbox + ((place + source) * most_rows + row) * width + i
            acc += tl.load(at, mask=inside, other=0.0, volatile=True).to(tl.float32)
    tl.store(turns + row, turn)
    _finish(acc, total, weight, out, scales, eps, width, row, i, total.dtype.element_ty, has_residual, quantize)


@triton.jit
def _send_columns(
    share, logits, flags, width, all_width, start, rank, most_rows, chunk: tl.constexpr, early: tl.constexpr
):
    """Program (row, chunk) of a GPU that is not the first: its columns to the first one."""
    begin(early)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * chunk + tl.arange(0, chunk)
    values = tl.load(share + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    to = logits.to(tl.pointer_type(tl.float32)) + row * all_width + start + i
    tl.store(to, values, mask=i < width)
    tl.debug_barrier()
    tl.atomic_add(flags.to(tl.pointer_type(tl.int32)) + rank * most_rows + row, 1, sem="release", scope="sys")


@triton.jit
def _collect_columns(
    share, logits, flags, turns, width, all_width, broken, alarm, patience,
    most_rows: tl.constexpr, chunks: tl.constexpr, of: tl.constexpr, chunk: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk) of the first GPU: its own columns; the first of a row also waits for what others send."""
    begin(early)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * chunk + tl.arange(0, chunk)
    values = tl.load(share + row * width + i, mask=i < width, other=0.0)
    tl.store(logits + row * all_width + i, values, mask=i < width)
    if part == 0:
        turn = tl.load(turns + row) + 1
        for source in tl.static_range(1, of):
            _await(flags + source * most_rows + row, turn * chunks, broken, alarm, patience)
        tl.store(turns + row, turn)

"""How fast a device reads memory when nothing else is asked of it: the ceiling of every kernel that mostly reads."""

import torch
import triton
import triton.language as tl

TILE = 8192  # elements of 4 bytes per turn
PROGRAMS = 132 * 8


def read_through(x: torch.Tensor) -> torch.Tensor:
    """The largest int32 that each program finds in its share of x, whose size must be a multiple of 32 KiB."""
    words = x.view(torch.int32).flatten()
    assert words.numel() % TILE == 0
    out = torch.empty(PROGRAMS, dtype=torch.int32, device=x.device)
    _read_through[(PROGRAMS,)](words, out, words.numel() // TILE, TILE, num_warps=8)
    return out


@triton.jit
def _read_through(words, out, tiles, tile: tl.constexpr):
    i = tl.arange(0, tile)
    largest = tl.full([tile], -(2**31), tl.int32)
    for turn in range(tl.program_id(0), tiles, tl.num_programs(0)):
        largest = tl.maximum(largest, tl.load(words + tl.cast(turn, tl.int64) * tile + i))
    tl.store(out + tl.program_id(0), tl.max(largest, 0))

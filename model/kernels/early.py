"""Kernels that start while the one before them ends (programmatic dependent launch, from compute capability 9.0 on).

A decode step is some ten kernels per layer, each a few microseconds long: without this, memory idles at every border.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def early() -> dict[str, bool]:
    """Launch options of such a kernel: its own `early`, and Triton's switch where the device can do it."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"early": True, "launch_pdl": True} if able else {"early": False}


@triton.jit
def begin(early: tl.constexpr):
    """Let the next kernel start as soon as all of this one runs, then wait for what the one before has written.

    Comes first in a kernel: before it nothing that a kernel writes may be read, and nothing be written.
    """
    let_next_start(early)
    await_inputs(early)


@triton.jit
def let_next_start(early: tl.constexpr):
    """The first half of `begin`, which may also come later."""
    if early:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_inputs(early: tl.constexpr):
    """The second half of `begin`."""
    if early:
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_ahead(address, size: tl.constexpr):
    """Ask for `size` bytes from each of these addresses into the L2, both multiples of 16; waits for nothing.

    For what no kernel of this step writes: it may come before `await_inputs`, while memory would idle. Needs `early`.
    """
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
        [address.to(tl.int64), tl.zeros(address.shape, tl.int32) + size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip

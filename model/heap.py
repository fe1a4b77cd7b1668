"""How the C library treats large blocks while weights are loaded, and what Python's collector looks through later."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # malloc.h
WHILE_LOADING, OTHERWISE = 1 << 20, 32 << 20  # bytes; 32 MiB is where glibc's own adjustment ends


def freeze_heap() -> None:
    """Once a process has started: what it holds stays, and the garbage collector does not look through it again.

    The quarter of a million objects of the libraries take it a tenth of a second, in which nothing else runs: no step
    is chosen or launched, no token passed on. It does so rarely, and then all stages and streams wait. Serve does this
    for its replicas (RAY_SERVE_FREEZE_GC_ON_STARTUP).
    """
    gc.collect()
    gc.freeze()


def return_freed_memory() -> None:
    """Give the system back what was freed between other things. Takes milliseconds; nothing where the C library cannot.

    glibc keeps it otherwise, in a heap for each thread: gigabytes, after long texts.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """Blocks of a MiB and more are mappings of their own, gone as soon as they are freed.

    Left to itself, glibc raises the size from which this is so with every large block that is freed, and keeps holes in
    the heap: a tenth of a stage's weights. Activations are better off on the heap, so this is for loading only. Does
    nothing where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, WHILE_LOADING)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, OTHERWISE)

"""What kernels must know of the GPU they run on."""

from functools import cache

import torch

MAX_TICKETS = 1024


@cache
def has_warp_groups() -> bool:
    """Whether four warps together can multiply from shared memory (wgmma): neither older nor newer devices can."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@cache
def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def tickets(device: torch.device) -> torch.Tensor:
    """[MAX_TICKETS] int32 zeros, as every kernel leaves them; the kernels of a device that draw any come one by one."""
    return torch.zeros(MAX_TICKETS, dtype=torch.int32, device=device)

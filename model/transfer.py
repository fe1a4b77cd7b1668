"""From the host's memory to a device, without waiting for what the device does before.

A plain copy to a GPU waits: until everything launched earlier is done, which may be until another stage has sent
something. From pinned memory nothing does, and the allocator keeps it until the copy is made.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.integer]


def to_device(values: Sequence[Any] | Integers, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these values, [n] or as they are nested."""
    host = torch.tensor(values, dtype=dtype)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def all_to_device(arrays: Sequence[Integers], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Each as a tensor, all in one copy."""
    sizes = [array.size for array in arrays]
    host = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
    np.concatenate(arrays, out=host.numpy(), casting="same_kind")
    return list(torch.split(host.to(device, non_blocking=True), sizes))

"""Numbers of 4 bits in 32-bit words: as tensors of bytes, and in the order that our kernels read; see `Int4Weight`."""

import torch
from torch.nn.functional import pad

from model.config import INT4_BLOCK


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., n, 8], the lowest four bits first."""
    halves = words.contiguous().view(torch.uint8)
    return torch.stack((halves & 15, halves >> 4), -1).view(*words.shape, 8)


def packed(q: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in], each below 16, -> the words of an `Int4Weight`."""
    out, inputs = q.shape
    blocks = pad(q, (0, -inputs % INT4_BLOCK)).view(out, -1, 4, 16, 2)  # block, j, i, h
    eights = blocks.permute(0, 1, 3, 4, 2).reshape(out, -1, 8)
    return (eights[..., 0::2] | eights[..., 1::2] << 4).view(torch.int32).squeeze(-1)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """The opposite; what is past the last input are zeros."""
    blocks = nibbles(words).view(len(words), -1, 16, 2, 4)  # block, i, h, j
    return blocks.permute(0, 1, 4, 2, 3).reshape(len(words), -1)

"""The decoders of one stage, one for each of its devices, computing together.

All devices take the same steps. Only the first one knows what goes in: the others' share of it is nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from model.attention import AttentionMetadata
from model.kv_cache import KVCache
from model.llama import Decoder


class DecoderGroup:
    """One decoder, or several that hold a share each (see `Shard`), on devices of their own or on a CPU."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.decoders = tuple(decoders)
        self.leader = self.decoders[0]

    def forward(
        self, x: torch.Tensor, kv: Sequence[KVCache], metadata: Sequence[AttentionMetadata]
    ) -> list[torch.Tensor]:
        """x [T, C] on the first device through this stage's layers -> the same on every device.

        Devices are given a part of their work in turns, between two sums: none waits long for what others lack.
        """
        shares = [x, *(torch.zeros_like(x, device=decoder.device) for decoder in self.decoders[1:])]
        inputs = zip(self.decoders, shares, kv, metadata, strict=True)
        steps = [decoder.steps(share, cache, about) for decoder, share, cache, about in inputs]
        results: list[torch.Tensor] = []
        shares = [next(step) for step in steps]
        while not results:
            sums = self._sums(shares)
            shares = []
            for decoder, step, share in zip(self.decoders, steps, sums, strict=True):
                with on(decoder.device):
                    try:
                        shares.append(step.send(share))
                    except StopIteration as end:
                        results.append(end.value)
        return results

    def logits(self, x: Sequence[torch.Tensor]) -> torch.Tensor:
        """x [rows, C] on every device -> [rows, V] float32 on the first."""
        parts = []
        for decoder, inputs in zip(self.decoders, x, strict=True):
            with on(decoder.device):
                parts.append(decoder.head(inputs))
        return parts[0] if len(parts) == 1 else torch.cat([part.to(self.leader.device) for part in parts], dim=-1)

    def _sums(self, shares: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the kernels of each device take for the sum."""
        if len(shares) == 1 or self.leader.sums is not self.leader.kernels:
            return shares
        total = shares[0]
        for share in shares[1:]:
            total = total + share.to(total.device)
        return [total.to(share.device) for share in shares]


def on(device: torch.device) -> AbstractContextManager[object]:
    """What is launched meanwhile goes to this GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

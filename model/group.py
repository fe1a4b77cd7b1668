"""The decoders of one stage, one for each of its devices, computing together.

All devices take the same steps. Only the first one knows what goes in: the others' share of it is nothing.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from model.attention import AttentionMetadata
from model.kv_cache import KVCache
from model.llama import Decoder

if TYPE_CHECKING:
    from model.kernels.peers import Peers

log = logging.getLogger(__name__)


class DecoderGroup:
    """One decoder, or several that hold a share each (see `Shard`): on GPUs of their own, or all on one device."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.decoders = tuple(decoders)
        self.leader = self.decoders[0]
        self._peers: list[Peers] = []

    @property
    def devices(self) -> list[torch.device]:
        return [decoder.device for decoder in self.decoders]

    def connect(self, max_tokens: int, patience_s: float) -> None:
        """Let captured steps of up to `max_tokens` add up by themselves, waiting up to `patience_s` for each other.

        Raises `ValueError` if the GPUs cannot reach each other's memory.
        """
        from model.kernels.peers import POLLS_PER_S, PeerKernels, connected

        words = [decoder.shard.words for decoder in self.decoders]
        self._peers = connected(self.devices, max_tokens, self.leader.config.dim, words, self.leader.dtype)
        self._patience = int(patience_s * POLLS_PER_S)
        for decoder, peers in zip(self.decoders, self._peers, strict=True):
            decoder.sums = PeerKernels(peers)

    @contextmanager
    def each_for_itself(self) -> Iterator[None]:
        """Meanwhile steps are captured, on one device after another: nothing waits for the others."""
        self._be_patient(0)
        try:
            yield
        finally:
            for device in self.devices if self._peers else []:
                torch.cuda.synchronize(device)
            for peers in self._peers:
                peers.reset()
            for device in self.devices if self._peers else []:
                torch.cuda.synchronize(device)
            self._be_patient(self._patience if self._peers else 0)

    def _be_patient(self, polls: int) -> None:
        for peers in self._peers:
            peers.be_patient(polls)

    def check(self) -> None:
        """Raise `RuntimeError` if a device has waited in vain for another one: what was computed since is wrong."""
        for peers in self._peers:
            if int(peers.alarm):
                raise RuntimeError(f"GPU {peers.rank} of this stage has waited in vain for what another one computes")

    def forward(self, x: torch.Tensor, kv: Sequence[KVCache], metadata: Sequence[AttentionMetadata]) -> torch.Tensor:
        """x [T, C] on the first device through this stage's layers -> [T, C] there. For steps that are not captured.

        Nothing that is launched waits for anything that is not: whatever a launch makes the host wait for (a kernel
        that is loaded at its first use, memory), it ends. Kernels that wait for another GPU are for captured steps.
        """
        shares = [x, *(torch.zeros_like(x, device=decoder.device) for decoder in self.decoders[1:])]
        inputs = zip(self.decoders, shares, kv, metadata, strict=True)
        steps = [decoder.steps(share, cache, about, decoder.kernels) for decoder, share, cache, about in inputs]
        results: list[torch.Tensor] = []
        shares = [next(step) for step in steps]
        while not results:
            sums = self._sums(shares)
            shares = []
            for decoder, step, total in zip(self.decoders, steps, sums, strict=True):
                with on(decoder.device):
                    try:
                        shares.append(step.send(total))
                    except StopIteration as end:
                        results.append(end.value)
        return results[0]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, C] -> [rows, V] float32, both on the first device."""
        if len(self.decoders) == 1:
            return self.leader.logits(x)
        parts = []
        for decoder in self.decoders:
            with on(decoder.device):
                parts.append(decoder.head(x.to(decoder.device)))
        return torch.cat([part.to(x.device) for part in parts], dim=-1)

    def _sums(self, shares: list[torch.Tensor]) -> list[torch.Tensor]:
        """On each device, added up in the order of the devices: all get the same."""
        if len(shares) == 1:
            return shares
        sums: dict[torch.device, torch.Tensor] = {}
        for device in set(self.devices):
            with on(device):
                total = shares[0].to(device)
                for share in shares[1:]:
                    total = total + share.to(device)
                sums[device] = total
        return [sums[device] for device in self.devices]


def on(device: torch.device) -> AbstractContextManager[object]:
    """What is launched meanwhile goes to this GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

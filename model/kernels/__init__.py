"""The operations of a layer that are not plain matrix products, in two forms behind the same signatures.

`reference` is torch, runs anywhere and is what the other form is compared with; `fused` is Triton, for CUDA.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class PrefillMetadata:
    """The sequences of a step that compute several tokens, one after another; P of them."""

    query_lens: list[int]  # tokens each computes now
    context_lens: list[int]  # tokens each attends to, those included
    query_starts: torch.Tensor  # [P + 1] int32, cumulated query_lens
    context_starts: torch.Tensor  # [P + 1] int32, cumulated context_lens
    slots: torch.Tensor  # [sum of context_lens] where each context's keys are, in order


class Quantized(NamedTuple):
    """x ~ values * scales: each row in 8 bits, scaled to its own largest element."""

    values: torch.Tensor  # [T, C] float8 e4m3
    scales: torch.Tensor  # [T, 1] float32


Activations = torch.Tensor | Quantized


class Kernels(Protocol):
    """What a layer needs; `quantize` asks for the result in 8 bits.

    Legend: T tokens, C model dim, F feed-forward dim, H query heads, K KV heads, D head dim."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        """x [T, C], residual [T, C] or None -> (norm of their sum times weight [C], their sum).

        RMSNorm: arXiv 1910.07467, eq. 4. `residual` may be changed in place.
        """
        ...

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        n_heads: int,
        rotary: torch.Tensor,
        positions: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """qkv [T, (H + 2K) * D] -> rotated queries [T, H, D]; rotated keys and values go to `slot_mapping` [T].

        rotary [positions, D / 2, 2]: cosine and sine for each pair (x[2j], x[2j + 1]); caches [N, B, K, D].
        """
        ...

    def decode_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v of one token per sequence: q [S, H, D], caches [N, B, K, D] -> [S, H, D].

        block_tables [S, W], context_lens [S] with the token itself; a length of 0 gives 0.
        """
        ...

    def prefill_attention(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, prefill: PrefillMetadata
    ) -> torch.Tensor:
        """The same for sequences of several tokens, causally: q [sum of query_lens, H, D] -> its shape."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor, quantize: bool = False) -> Activations:
        """[T, 2F] -> silu(first half) * second half, [T, F]."""
        ...

    def quantize_rows(self, x: torch.Tensor) -> Quantized:
        """x [T, C] in 8 bits."""
        ...

    def float8_linear(self, x: Quantized, weight: Quantized) -> torch.Tensor:
        """x [T, in] times weight [out, in] transposed -> [T, out] bfloat16; sums in float32."""
        ...


def kernels_for(device: torch.device) -> Kernels:
    """The fastest form for `device`."""
    if device.type == "cuda":
        from model.kernels.fused import FusedKernels

        return FusedKernels()
    from model.kernels.reference import ReferenceKernels

    return ReferenceKernels()

"""The operations of a layer that are not plain matrix products, in two forms behind the same signatures.

`reference` is torch, runs anywhere and is what the other form is compared with; `fused` is Triton, for CUDA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a step knows of each of its tokens, padding included; int64 [T]."""

    ids: torch.Tensor
    positions: torch.Tensor  # in its sequence
    cells: torch.Tensor  # of the KV cache, where its key and value go: block * block size + offset
    context_lens: torch.Tensor  # tokens of its sequence up to itself; 0: padding
    slots: torch.Tensor  # its sequence's
    sampled_slots: torch.Tensor  # the same if a token is sampled after it, otherwise the slot for padding
    lone_lens: torch.Tensor  # context_lens of sequences that compute one token; 0: the others', and padding

    @staticmethod
    def empty(count: int, device: torch.device) -> "Tokens":
        even = count + count % 2  # each begins at a multiple of 16 bytes: kernels are compiled for that
        return Tokens(*torch.empty(7, even, dtype=torch.int64, device=device)[:, :count].unbind())

    def part(self, start: int, stop: int) -> "Tokens":
        return Tokens(*(getattr(self, field.name)[start:stop] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Pieces:
    """Of a step whose tokens attend one by one: which of them follow each other in a prompt and attend together."""

    starts: torch.Tensor  # [P] int32, where each begins
    counts: torch.Tensor  # [P] int32, how many tokens it has; 0: it is none
    lone_lens: torch.Tensor  # [T] int64, see Tokens: who attends alone


@dataclass(frozen=True, slots=True)
class PrefillMetadata:
    """The sequences of a step that compute several tokens, one after another; S of them."""

    query_lens: list[int]  # tokens each computes now
    context_lens: list[int]  # tokens each attends to, those included
    starts: torch.Tensor  # [S + 1] int32, cumulated query_lens
    tokens: Tokens  # theirs
    pieces: Pieces  # theirs, of PROMPT_QUERIES at most


class Quantized(NamedTuple):
    """x ~ values * scales: each row in 8 bits, scaled to its own largest element."""

    values: torch.Tensor  # [..., C] float8 e4m3
    scales: torch.Tensor  # [..., 1] float32


class Int4Weight(NamedTuple):
    """w = (q - zero) * scale, q in 4 bits; G groups of equally many neighbouring inputs each have a zero and a scale.

    Each 128 inputs of a row are 16 words: the 4 bits at 4 * (4h + j) of word i belong to input 32j + 2i + h. So one
    shift and one mask give two neighbours, which a kernel turns into two 16-bit floats at once. Past the last input are
    zeros.
    """

    words: torch.Tensor  # [out, 16 * ceil(in / 128)] int32
    scales: torch.Tensor  # [G, out] floating point
    zeros: torch.Tensor  # [G, out] int16


@dataclass(frozen=True, slots=True)
class Part:
    """Of a product that several stems make up, one; numbers are for rank 1, see model/adapters/layout.py."""

    name: str  # layers.3.attention.wq
    place: int  # among those of its product
    index: int  # among all parts of a stage: where its rank is
    a: int  # where A begins
    b: int  # where B begins
    inputs: int
    start: int  # of its outputs in those of the product
    outputs: int


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which tokens of a step have which adapter, in blocks of tokens that have the same one; N of them."""

    order: torch.Tensor  # [T] int32: the tokens, those of a block one after another
    blocks: (
        torch.Tensor
    )  # [3, N] int32: slot of the adapter, where in `order` it begins, how many tokens; 0: it is none
    most: int  # tokens of a block


@dataclass(frozen=True, slots=True)
class LowRank:
    """What all adapters on a device add to one product; see `model.adapters.layout`. Slot i is row i - 1 of each."""

    values: torch.Tensor  # [slots, elements]
    ranks: torch.Tensor  # [slots, parts of the stage] int32
    widths: torch.Tensor  # [slots] int32
    parts: Sequence[Part]
    max_rank: int


PIECE_QUERIES = 64  # of a piece in a captured step: small, for there are few
RANKS = 16  # of adapters, that kernels compute at once: the least that a matrix unit takes
PROMPT_QUERIES = 128  # of one in a step that is not

Activations = torch.Tensor | Quantized
# Keys or values of one layer, [N, B, K, D]; in 8 bits with one scale per token and head: scales [N, B, K, 1].
Cache = torch.Tensor | Quantized


def piece_tokens(groups: int, queries: int) -> int:
    """The most tokens that attend together, where so many query heads share a KV head: they have so many queries."""
    return max(1, queries // (1 << (groups - 1).bit_length()))


class Kernels(Protocol):
    """What a layer needs; `quantize` asks for the result in 8 bits.

    Legend: T tokens, C model dim, F feed-forward dim, H query heads, K KV heads, D head dim."""

    def unpack_tokens(self, packed: torch.Tensor, newest: torch.Tensor, tables: torch.Tensor, block_size: int,
                      tokens: Tokens) -> None:  # fmt: skip
        """What the host says of each token (see `model.attention.packed_tokens`), into `tokens`.

        newest [slots + 1] and tables [slots + 1, W]: see `model.slots`. An id SAMPLED stands for its slot's newest
        token. What is more in `tokens` becomes padding: of the last slot, at its position 0.
        """
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, quantize: bool = False
    ) -> tuple[Activations, torch.Tensor]:
        """x [T, C], residual [T, C] or None -> (norm of their sum times weight [C], their sum).

        RMSNorm: arXiv 1910.07467, eq. 4. `residual` may be changed in place.
        """
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Their sum, [T, C]."""
        ...

    def gather(self, share: torch.Tensor) -> torch.Tensor:
        """The columns of all devices [T, V], from this one's."""
        ...

    def rotate_and_write(
        self,
        qkv: torch.Tensor,
        n_heads: int,
        rotary: torch.Tensor,
        positions: torch.Tensor,
        k_cache: Cache,
        v_cache: Cache,
        cells: torch.Tensor,
    ) -> torch.Tensor:
        """qkv [T, (H + 2K) * D] -> rotated queries [T, H, D]; rotated keys and values go to `cells` [T].

        rotary [positions, D / 2, 2]: cosine and sine for each pair (x[2j], x[2j + 1]); caches [N, B, K, D].
        """
        ...

    def decode_attention(
        self,
        q: torch.Tensor,
        k_cache: Cache,
        v_cache: Cache,
        tables: torch.Tensor,
        slots: torch.Tensor,
        context_lens: torch.Tensor,
        pieces: Pieces | None = None,
    ) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v, token by token: q [T, H, D], caches [N, B, K, D] -> [T, H, D].

        Token i attends to the first context_lens[i] of the sequence whose blocks are in tables[slots[i]], itself the
        last of them; to none gives 0. With `pieces` the result is the same, and the tokens of a piece, PIECE_QUERIES
        at most, may read its keys together.
        """
        ...

    def prefill_attention(
        self, q: torch.Tensor, k_cache: Cache, v_cache: Cache, tables: torch.Tensor, prefill: PrefillMetadata
    ) -> torch.Tensor:
        """The same for sequences of several tokens, causally: q [sum of query_lens, H, D] -> its shape."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor, quantize: bool = False) -> Activations:
        """[T, 2F] -> silu(first half) * second half, [T, F]."""
        ...

    def quantize_rows(self, x: torch.Tensor) -> Quantized:
        """x [..., C] in 8 bits, one scale per row."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, in] times weight [out, in] transposed -> [T, out]; sums in float32."""
        ...

    def linear_after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, eps: float, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`add_rms_norm`, then `linear` -> (its result, the sum)."""
        ...

    def linear_after_gate(self, gate_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`silu_and_mul`, then `linear`."""
        ...

    def float8_linear(self, x: Quantized, weight: Quantized) -> torch.Tensor:
        """x [T, in] times weight [out, in] transposed -> [T, out] bfloat16; sums in float32."""
        ...

    def int4_linear(self, x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
        """x [T, in] times weight [out, in] transposed -> [T, out]; sums in float32."""
        ...

    def shrink(self, x: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
        """x [T, in] times A of each token's adapter, of all parts of the product, as `expand` takes it."""
        ...

    def expand(self, y: torch.Tensor, shrunk: torch.Tensor, product: LowRank, rows: AdapterRows) -> torch.Tensor:
        """y [T, out] plus B of each token's adapter times what `shrink` gave; y is changed in place."""
        ...


def kernels_for(device: torch.device) -> Kernels:
    """The fastest form for `device`."""
    if device.type == "cuda":
        from model.kernels.fused import FusedKernels

        return FusedKernels()
    from model.kernels.reference import ReferenceKernels

    return ReferenceKernels()

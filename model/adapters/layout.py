"""Where the matrices of an adapter lie in the room that one has on a device.

Legend: r rank, R the adapter's largest rank rounded up to RANKS, D elements of all matrices of rank 1.

An adapter is one piece of memory of R * D elements, so that one copy brings it: matrix after matrix, A as [R, in] and
B transposed as [R, out], each of R rows of which the first r are used. What stands at n for rank 1 stands at R * n.
Of a product that an adapter leaves alone r is 0, and nobody reads its rows.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from model.config import PRODUCTS, StageLayers
from model.kernels import RANKS, Part
from model.shards import SUMMED, Shard

if TYPE_CHECKING:
    import torch

    from model.adapters import Adapter


class Layout:
    """Of one device's share of a stage's layers."""

    def __init__(self, shard: Shard, layers: StageLayers) -> None:
        self._shard = shard
        self.products: list[dict[str, list[Part]]] = []  # by layer of the stage
        self.size, numbers = 0, count()
        for layer in range(layers.start, layers.stop):
            self.products.append({product: self._parts(layer, product, numbers) for product in PRODUCTS})
        self.parts = [part for products in self.products for parts in products.values() for part in parts]

    def _parts(self, layer: int, product: str, numbers: "count[int]") -> list[Part]:
        parts: list[Part] = []
        start = 0
        for place, stem in enumerate(PRODUCTS[product]):
            inputs, outputs = self._shard.inputs(stem), self._shard.rows(stem)
            a, b = self.size, self.size + inputs
            self.size = b + outputs
            parts.append(Part(f"layers.{layer}.{stem}", place, next(numbers), a, b, inputs, start, outputs))
            start += outputs
        return parts

    def pack(self, adapter: "Adapter", width: int, dtype: "torch.dtype", pin: bool) -> "Packed":
        """This share of an adapter of largest rank `width` or less, as it will lie on the device."""
        import torch

        values = torch.zeros(width * self.size, dtype=dtype, pin_memory=pin)
        ranks = torch.zeros(len(self.parts), dtype=torch.int32)
        for part in self.parts:
            if (rank := adapter.ranks.get(part.name, 0)) == 0:
                continue
            ranks[part.index] = rank
            whole = adapter.matrices(part.name)
            cut = partial(self._shard.part, f"{part.name}.weight", peek=_no_peek)
            # Of a product that is cut by its inputs A is cut like the weight, otherwise B; the other one is whole.
            summed = part.name.split(".", 2)[2] in SUMMED
            a, b = (cut(tensor=whole.a), whole.b) if summed else (whole.a, cut(tensor=whole.b))
            assert a is not None, "every device has a part of every product"
            assert b is not None, "every device has a part of every product"
            for start, length, matrix in ((part.a, part.inputs, a), (part.b, part.outputs, b.t())):
                room = values[width * start : width * (start + length)].view(width, length)
                room[:rank] = matrix
        return Packed(values, ranks, width)


@dataclass(frozen=True, slots=True)
class Packed:
    """One device's share of an adapter, in the host's memory."""

    values: "torch.Tensor"  # [R * D], pinned where there is a GPU
    ranks: "torch.Tensor"  # [parts of the stage] int32
    width: int  # R


def width_of(rank: int) -> int:
    """R."""
    return -(-rank // RANKS) * RANKS


def _no_peek(name: str) -> "torch.Tensor":
    raise AssertionError("weights in 4 bits are not cut for several devices beside adapters")

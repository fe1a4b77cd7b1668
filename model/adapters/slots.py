"""The adapters on a device, and how a step's tokens find theirs.

Legend: T tokens, N blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch

from model.adapters.layout import Layout, Packed
from model.batch import Batch, Int32Array
from model.config import PRODUCTS
from model.kernels import Activations, AdapterRows, Kernels, LowRank
from model.layers import Linear, StepByStep
from model.transfer import all_to_device

BLOCK, PROMPT_BLOCK = 16, 64  # tokens of one adapter that are computed together: in captured steps, in others


class AdapterSlots:
    """Room for `count` adapters of rank `max_rank`, in slots 1 to `count`; 0 stands for none."""

    def __init__(self, layout: Layout, count: int, max_rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.count, self.max_rank = count, max_rank
        self._values = torch.zeros(count, max_rank * layout.size, dtype=dtype, device=device)
        self._ranks = torch.zeros(count, len(layout.parts), dtype=torch.int32, device=device)
        self._widths = torch.zeros(count, dtype=torch.int32, device=device)
        self.products = [
            {
                product: LowRank(self._values, self._ranks, self._widths, products[product], max_rank)
                for product in PRODUCTS
            }
            for products in layout.products
        ]
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._used: dict[int, torch.cuda.Event] = {}  # by slot: the end of the last step that read it

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def num_bytes(self) -> int:
        return self._values.nbytes

    def place(self, slot: int, packed: Packed) -> None:
        """From here on this adapter is in this slot. On a GPU steps under way go on meanwhile."""
        if self._copying is None:
            self._copy(slot, packed)
            return
        if (used := self._used.get(slot)) is not None:
            self._copying.wait_event(used)
        with torch.cuda.stream(self._copying):
            self._copy(slot, packed)
        torch.cuda.current_stream(self.device).wait_stream(self._copying)

    def _copy(self, slot: int, packed: Packed) -> None:
        self._values[slot - 1, : len(packed.values)].copy_(packed.values, non_blocking=True)
        self._ranks[slot - 1].copy_(packed.ranks, non_blocking=True)
        self._widths[slot - 1].fill_(packed.width)

    def mark_used(self, batch: Batch) -> None:
        """A step has been launched that reads the slots of this batch."""
        if self._copying is None or not len(batch.adapters):
            return
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        for slot in np.unique(batch.adapters).tolist():
            self._used[slot] = done


def blocks_of(batch: Batch, most: int) -> tuple[Int32Array, Int32Array]:
    """See `AdapterRows`: of the tokens that have an adapter, [n] and [3, N] int32."""
    slots = np.repeat(batch.adapters, batch.query_lens)
    order = np.argsort(slots, kind="stable").astype(np.int32)
    order = order[np.count_nonzero(slots == 0) :]
    found, starts, counts = np.unique(slots[order], return_index=True, return_counts=True)
    each = -(-counts // most)  # blocks of each adapter
    within = (np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)) * most
    begins, lengths = np.repeat(starts, each) + within, np.minimum(np.repeat(counts, each) - within, most)
    return order, np.stack((np.repeat(found, each), begins, lengths)).astype(np.int32)


def most_blocks(tokens: int, count: int) -> int:
    """That so many tokens can make in a captured step."""
    return -(-tokens // BLOCK) + min(tokens, count)


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """Those of one step; see `Additions`."""

    slots: AdapterSlots
    rows: AdapterRows
    kernels: Kernels

    @classmethod
    def of(cls, slots: AdapterSlots | None, batch: Batch, kernels: Kernels) -> "StepAdapters | None":
        """Of a step that is launched kernel by kernel; None if no sequence has one."""
        if not len(batch.adapters):
            return None
        assert slots is not None, "there is no room for adapters on this stage"
        order, blocks = blocks_of(batch, PROMPT_BLOCK)
        parts = all_to_device([order, blocks.ravel()], torch.int32, slots.device)
        return cls(slots, AdapterRows(parts[0], parts[1].view(3, -1), PROMPT_BLOCK), kernels)

    def on(self, linear: Linear, layer: int, product: str) -> Linear:
        return AdaptedLinear(linear, self.slots.products[layer][product], self.rows, self.kernels)


class AdaptedLinear(StepByStep):
    """A product and what adapters add to it, which is never in 8 bits."""

    def __init__(self, base: Linear, product: LowRank, rows: AdapterRows, kernels: Kernels) -> None:
        self._base, self._product, self._rows, self._kernels = base, product, rows, kernels
        self.num_parameters = base.num_parameters

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        shrunk = self._kernels.shrink(x, self._product, self._rows)
        return self._kernels.expand(self._base(x), shrunk, self._product, self._rows)

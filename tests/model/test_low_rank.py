"""The pair of kernels that add adapters to a product, beside its twin in torch."""

import itertools

import numpy as np
import pytest
import torch

from model.adapters.slots import blocks_of
from model.batch import Batch
from model.kernels import AdapterRows, LowRank, Part, kernels_for
from model.kernels.reference import ReferenceKernels
from tests.conftest import DEVICES, ints

# Inputs, and outputs of each part.
SHAPES = {"small": (48, [48, 16, 16]), "one": (96, [40]), "two": (600, [130, 130]), "7B's w2": (11008, [4096])}
RANKS = [1, 16, 17, 64, 5, 0]
SLOTS = {
    "one each": [1, 2, 3, 4, 5, 6],
    "all alike": [4] * 40,
    "none among them": [0, 3, 0, 1, 1, 0, 0, 5, 4, 3, 3, 3, 3, 0] * 7,
    "many": [i % 6 for i in range(150)],
}


def product_of(inputs: int, outputs: list[int], dtype: torch.dtype, device: str) -> LowRank:
    parts, at, start = [], 32, 0
    for i, width in enumerate(outputs):
        parts.append(Part(str(i), i, i + 1, at, at + inputs, inputs, start, width))
        at, start = at + inputs + width, start + width
    torch.manual_seed(0)
    values = (torch.randn(len(RANKS), 64 * at) / inputs**0.5).to(device, dtype)
    ranks = torch.tensor([[99] + [max(0, rank - i) for i in range(len(outputs))] for rank in RANKS], dtype=torch.int32)
    widths = torch.tensor([-(-max(rank, 1) // 16) * 16 for rank in RANKS], dtype=torch.int32)
    return LowRank(values, ranks.to(device), widths.to(device), parts, 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "slots", "most"), itertools.product(SHAPES, SLOTS, [16, 64]))
def test_it_is_what_torch_gives_row_by_row(shape: str, slots: str, most: int, dtype: torch.dtype, device: str) -> None:
    inputs, outputs = SHAPES[shape]
    of_tokens = SLOTS[slots]
    product, count = product_of(inputs, outputs, dtype, device), len(of_tokens)
    x = torch.randn(count, inputs, device=device).to(dtype)
    y = torch.randn(count, sum(outputs), device=device).to(dtype)
    batch = Batch(0, 0, ints(*of_tokens), ints(*[1] * count), *[ints()] * 4, -1, ints(), adapters=ints(*of_tokens))
    order, blocks = blocks_of(batch, most)
    padded = np.concatenate((blocks, np.zeros((3, 3), np.int32)), 1)  # blocks that are none
    rows = AdapterRows(torch.from_numpy(order).to(device), torch.from_numpy(padded).to(device)[:, :-1], most)
    kernels = kernels_for(torch.device(device))
    found = kernels.expand(y.clone(), kernels.shrink(x, product, rows), product, rows).float()
    expected = y.float().clone()
    for i, slot in enumerate(of_tokens):
        for part in product.parts if slot else ():
            rank, width = int(product.ranks[slot - 1, part.index]), int(product.widths[slot - 1])
            a = product.values[slot - 1, width * part.a :][: rank * inputs].view(rank, inputs).float()
            b = product.values[slot - 1, width * part.b :][: rank * part.outputs].view(rank, part.outputs).float()
            expected[i, part.start : part.start + part.outputs] += (a @ x[i].float()) @ b
    scale = 1e-4 if dtype == torch.float32 else 4e-2
    assert (found - expected).abs().max() < scale * expected.abs().max()
    if device == "cuda":
        twin = ReferenceKernels()
        again = twin.expand(y.clone(), twin.shrink(x, product, rows), product, rows).float()
        assert (found - again).abs().max() < scale * expected.abs().max()

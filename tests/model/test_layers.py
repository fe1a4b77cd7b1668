"""Every form of the linear layer against the plain one; the rotary embedding against its definition."""

import math

import pytest
import torch

from model.kernels.reference import rotate
from model.layers import DenseLinear, PackedFloat16Linear, make_linear, rotary_table

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("out", "width"), [(960, 576), (33, 17), (1, 8)])
def test_packed_float16_equals_dense_up_to_rounding(rows: int, out: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    exact = DenseLinear(weight.half().float())(x)  # the same rounding of the weights
    assert torch.allclose(PackedFloat16Linear(weight)(x), exact, atol=1e-4 * math.sqrt(width))


def test_the_form_follows_dtype_and_device() -> None:
    weight = torch.randn(8, 8)
    assert isinstance(make_linear(weight, torch.float16, CPU), PackedFloat16Linear)
    assert isinstance(make_linear(weight, torch.float32, CPU), DenseLinear)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    torch.manual_seed(0)
    table = rotary_table(20, 8, 10000.0, CPU)
    x = torch.randn(1, 2, 8)
    turned = rotate(x, table[13:14])
    for j in range(4):
        angle = 13 * 10000.0 ** (-2 * j / 8)
        a, b = x[0, 1, 2 * j].item(), x[0, 1, 2 * j + 1].item()
        assert turned[0, 1, 2 * j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
        assert turned[0, 1, 2 * j + 1].item() == pytest.approx(a * math.sin(angle) + b * math.cos(angle), abs=1e-5)

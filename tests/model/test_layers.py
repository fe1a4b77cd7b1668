"""Every form of the linear layer against the plain one; the rotary embedding against its definition."""

import math
from dataclasses import replace

import pytest
import torch

from model.config import RopeScaling
from model.kernels.reference import rotate
from model.layers import (
    DenseLinear,
    PackedBfloat16Linear,
    PackedFloat16Linear,
    compute_dtype,
    make_linear,
    rotary_frequencies,
    rotary_table,
)
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize(("out", "width"), [(960, 576), (33, 17), (1, 8)])
def test_packed_float16_equals_dense_up_to_rounding(rows: int, out: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    exact = DenseLinear(weight.half().float())(x)  # the same rounding of the weights
    assert torch.allclose(PackedFloat16Linear(weight)(x), exact, atol=1e-4 * math.sqrt(width))
    bias = torch.randn(out)
    assert torch.allclose(PackedFloat16Linear(weight, bias)(x), exact + bias, atol=1e-4 * math.sqrt(width))


def test_the_form_follows_dtype_and_device() -> None:
    weight = torch.randn(8, 8)
    assert isinstance(make_linear(weight, torch.float16, CPU), PackedFloat16Linear)
    assert isinstance(make_linear(weight, torch.float32, CPU), DenseLinear)
    own = PackedBfloat16Linear.available()
    assert isinstance(make_linear(weight, torch.bfloat16, CPU), PackedBfloat16Linear if own else PackedFloat16Linear)
    assert compute_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if own else torch.float32)
    assert compute_dtype(torch.float16, CPU) == torch.float32
    assert compute_dtype(torch.float16, torch.device("cuda")) == torch.float16


@pytest.mark.skipif(not PackedBfloat16Linear.available(), reason="this processor does not multiply bfloat16 by itself")
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 500])
@pytest.mark.parametrize(("out", "width"), [(960, 576), (33, 17), (1, 8)])
def test_packed_bfloat16_equals_dense_up_to_rounding(rows: int, out: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, width).bfloat16(), torch.randn(out, width), torch.randn(out).bfloat16()
    exact = DenseLinear(weight.bfloat16().float(), bias.float())(x.float())
    found = PackedBfloat16Linear(weight, bias)(x)
    torch.testing.assert_close(found.float(), exact, atol=0.02 * math.sqrt(width), rtol=0.01)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    torch.manual_seed(0)
    table = rotary_table(20, TINY, CPU)
    x = torch.randn(1, 2, 8)
    turned = rotate(x, table[13:14])
    for j in range(4):
        angle = 13 * 10000.0 ** (-2 * j / 8)
        a, b = x[0, 1, 2 * j].item(), x[0, 1, 2 * j + 1].item()
        assert turned[0, 1, 2 * j].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
        assert turned[0, 1, 2 * j + 1].item() == pytest.approx(a * math.sin(angle) + b * math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("length", [64, 512, 4000])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="dynamic", factor=2.0, original_max_position_embeddings=512),
        RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=128),
    ],
)
def test_scaled_frequencies_equal_those_of_transformers(scaling: RopeScaling, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = replace(TINY, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    parameters = {
        "rope_type": scaling.kind,
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, max_position_embeddings=512, rope_parameters=parameters
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, torch.device("cpu"), seq_len=length)
    assert attention_factor == 1.0
    torch.testing.assert_close(rotary_frequencies(length, config, CPU), expected)

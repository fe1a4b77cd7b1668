"""Several devices of one stage hold a share each: together they compute what one does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.attention import prepare
from model.batch import Batch
from model.config import Int4Layout, ModelConfig, float8_products, split_layers
from model.group import DecoderGroup
from model.kv_cache import KVCache
from model.llama import Decoder
from model.shards import shards
from model.slots import Slots
from model.weights.dummy import DummyCheckpoint
from tests.conftest import ints, with_tables

CPU = torch.device("cpu")
TOKENS = [(5 * i + 3) % 250 for i in range(40)]


def shape(heads: int, kv_heads: int, head_dim: int = 16, **changes: object) -> ModelConfig:
    plain = ModelConfig(
        dim=128, n_layers=3, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, hidden_dim=384, vocab_size=250,
        norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


class Orders(DummyCheckpoint):
    """Inputs of 4-bit weights in an order of their own."""

    def _made(self, name: str, generator: torch.Generator) -> torch.Tensor:
        if not name.endswith(".order"):
            return super()._made(name, generator)
        return torch.randperm(self.config.tensor_shape(name)[0], generator=generator).int()


def logits(config: ModelConfig, devices: int, stages: int = 1, fp8: frozenset[str] = frozenset()) -> torch.Tensor:
    """[T, V] of a prompt in two chunks, the second of which attends to the first."""
    checkpoint = Orders(config)
    groups = []
    for part in split_layers(config, stages):
        tensors = checkpoint.tensors(part.tensor_names(config))
        groups.append(DecoderGroup(Decoder.sharded(config, part, tensors, torch.float32, [CPU] * devices, 64, fp8=fp8)))
    caches = [[KVCache(d.config, len(d.layers), 4, 16, d.dtype, CPU) for d in group.decoders] for group in groups]
    slots = Slots(1, 4, 16, 4, CPU)
    found = []
    with torch.inference_mode():
        for start, stop in ((0, 25), (25, 39), (39, 40)):
            ids = np.array(TOKENS[start:stop], np.int32)
            batch = Batch(0, 0, ids, ints(stop - start), ints(start), ints(0), ints(), ints(), -1, ints())
            batch = with_tables(batch, [[0, 1, 2]], 16)
            slots.extend(batch)
            metadata = prepare(batch, slots, groups[0].leader.kernels, config.groups)
            x = groups[0].leader.embed(metadata.tokens.ids)
            for group, kv in zip(groups, caches, strict=True):
                x = group.forward(x, kv, [metadata] * devices)
            found.append(groups[-1].logits(x))
    return torch.cat(found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


SHAPES = [
    shape(8, 8),
    shape(8, 4),
    shape(9, 3),  # two devices have one and two KV heads
    shape(8, 2),
    shape(8, 1),  # all share the keys
    shape(8, 4, attention_bias=True, mlp_bias=True),
    shape(8, 4, tie_word_embeddings=True),
    shape(6, 3, hidden_dim=370),  # which no unit divides
]


@pytest.mark.parametrize("devices", [2, 3, 6])
@pytest.mark.parametrize("config", SHAPES)
def test_logits_are_those_of_one_device(config: ModelConfig, devices: int) -> None:
    """On one stage, or on two."""
    assert error(logits(config, devices, stages=1 + devices % 2), logits(config, 1)) < 1e-5


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize(
    "config",
    [
        shape(8, 4, int4=Int4Layout(32)),
        shape(8, 4, int4=Int4Layout(128)),
        shape(8, 4, int4=Int4Layout(-1)),
        shape(8, 4, int4=Int4Layout(64, act_order=True)),  # w2 is cut in its order, wo is not
        shape(8, 8, 128, dim=1024, int4=Int4Layout(128)),  # wo is cut at groups
        shape(9, 3, 64, dim=576, hidden_dim=448, int4=Int4Layout(64)),  # the last block of w2 is half empty
    ],
)
def test_weights_in_4_bits_are_cut_at_their_groups(config: ModelConfig, devices: int) -> None:
    assert error(logits(config, devices), logits(config, 1)) < 5e-5


@pytest.mark.parametrize("devices", [2, 4])
def test_weights_in_8_bits_are_as_near_as_on_one_device(devices: int) -> None:
    """Where inputs are cut, rows are rounded to 8 bits with a scale of each device."""
    config = shape(8, 4)
    exact = logits(config, 1)
    one, many = (error(logits(config, n, fp8=float8_products(config)), exact) for n in (1, devices))
    assert many < 1.5 * one


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_shards_hold_everything_once(count: int) -> None:
    config = shape(8, 4, hidden_dim=352)
    made = shards(config, count)
    for part in ("heads", "hidden", "words"):
        held = [i for shard in made for i in getattr(shard, part)]
        assert held == list(range(len(held)))
    assert [len(made[-1].words) > 0, made[0].leads, sum(s.leads for s in made)] == [True, True, 1]
    assert {i for shard in made for i in shard.kv_heads} == set(range(4))
    for shard in made:
        group = config.n_heads // config.n_kv_heads
        assert {i // group for i in shard.heads} == set(shard.kv_heads)


@pytest.mark.parametrize(
    ("config", "count", "words"),
    [
        (shape(4, 2), 5, "cannot share 4 heads"),
        (shape(8, 8, hidden_dim=256, int4=Int4Layout(128)), 4, "256 hidden units"),
    ],
)
def test_what_cannot_be_cut_is_refused(config: ModelConfig, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shards(config, count)

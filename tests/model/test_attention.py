"""Paged attention against plain attention over each sequence, at odd sizes."""

import math

import numpy as np
import pytest
import torch

from model.attention import paged_attention, prepare
from model.batch import Batch
from model.config import ModelConfig
from model.kernels.reference import ReferenceKernels
from model.kv_cache import KVCache
from model.slots import Slots
from tests.conftest import ints, with_tables

BLOCK = 4


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last len(q) tokens, [Tq, H, D] over [L, K, D], in float64, one head at a time."""
    tq, heads, d = q.shape
    length, kv_heads, _ = k.shape
    out = torch.empty(tq, heads, d, dtype=torch.float64)
    for h in range(heads):
        kh, vh = k[:, h // (heads // kv_heads)].double(), v[:, h // (heads // kv_heads)].double()
        scores = q[:, h].double() @ kh.T / math.sqrt(d)
        visible = torch.arange(length) <= torch.arange(length - tq, length).unsqueeze(1)
        out[:, h] = scores.masked_fill(~visible, -math.inf).softmax(-1) @ vh
    return out


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 1, 32), (4, 4, 128)])
@pytest.mark.parametrize(
    "sequences",  # (tokens computed before, tokens to compute now)
    [[(0, 1)], [(0, 5)], [(3, 1), (4, 1), (7, 1)], [(0, 4), (4, 4), (8, 1)], [(5, 3), (0, 1), (17, 1), (0, 9), (2, 2)]],
    ids=str,
)
def test_paged_attention_equals_dense(
    heads: int, kv_heads: int, head_dim: int, sequences: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        dim=8, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, hidden_dim=8, vocab_size=8,
        norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    sequences = sorted(sequences, key=lambda s: s[1] > 1)  # single tokens first, as Batch promises
    cache = KVCache(config, 1, 64, BLOCK, torch.float32, torch.device("cpu"))
    free = np.random.default_rng(0).permutation(64).astype(np.int32)
    tables = free[: 8 * len(sequences)].reshape(-1, 8)
    queries, expected = [], []
    for i, (before, now) in enumerate(sequences):
        length = before + now
        k, v = torch.randn(length, kv_heads, head_dim), torch.randn(length, kv_heads, head_dim)
        cells = torch.tensor([tables[i, p // BLOCK] * BLOCK + p % BLOCK for p in range(length)]).long()
        for held, heads_ in ((cache.k[0], k), (cache.v[0], v)):
            assert isinstance(held, torch.Tensor)
            held.flatten(0, 1)[cells] = heads_
        queries.append(torch.randn(now, heads, head_dim))
        expected.append(dense(queries[-1], k, v))
    batch = Batch(
        0, 0, np.zeros(sum(n for _, n in sequences), np.int32), ints(*(n for _, n in sequences)),
        ints(*(b for b, _ in sequences)), ints(*range(len(sequences))), ints(), ints(), -1, ints(0),
    )  # fmt: skip
    slots = Slots(len(sequences), 8, BLOCK, 64, torch.device("cpu"))
    slots.extend(with_tables(batch, tables.tolist(), BLOCK))
    metadata = prepare(batch, slots, ReferenceKernels(), config.groups)
    out = paged_attention(torch.cat(queries), cache.k[0], cache.v[0], metadata, ReferenceKernels())
    assert torch.allclose(out.double(), torch.cat(expected), atol=1e-5)
    assert metadata.tokens.positions.tolist() == [b + j for b, n in sequences for j in range(n)]

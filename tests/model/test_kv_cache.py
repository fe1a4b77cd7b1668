"""Keys and values in 8 bits: the torch forms, on any device."""

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.kernels import Cache, Pieces, PrefillMetadata, Quantized, Tokens
from model.kernels.reference import ReferenceKernels, cached
from model.kv_cache import FLOAT8, KVCache
from model.layers import rotary_table
from model.llama import Decoder
from model.stage import Stage
from model.weights.dummy import DummyCheckpoint
from tests.conftest import TINY, make_stages

CPU = torch.device("cpu")
KERNELS = ReferenceKernels()
BLOCK, HEADS, KV_HEADS, D = 4, TINY.n_heads, TINY.n_kv_heads, TINY.head_dim


def filled(dtype: torch.dtype, tokens: int) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """A cache of one layer with `tokens` tokens in cells of their own, the cells, and the rotated queries."""
    torch.manual_seed(0)
    kv = KVCache(TINY, 1, 8, BLOCK, dtype, CPU)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * D) * torch.logspace(-3, 3, tokens).unsqueeze(1)
    cells = torch.randperm(8 * BLOCK)[:tokens]
    rotary = rotary_table(64, TINY, CPU)
    q = KERNELS.rotate_and_write(qkv, HEADS, rotary, torch.arange(tokens), kv.k[0], kv.v[0], cells)
    return kv, cells, q


def test_8_bits_keep_every_head_of_every_token_within_a_sixteenth() -> None:
    """4 bits of mantissa, and a scale of its own: a loud token takes nothing from a quiet one."""
    (exact, cells, _), (rounded, _, _) = filled(torch.float32, 20), filled(FLOAT8, 20)
    for a, b in ((exact.k[0], rounded.k[0]), (exact.v[0], rounded.v[0])):
        expected, found = (cached(x, cells, torch.float32) for x in (a, b))
        largest = expected.abs().amax(-1, keepdim=True)
        assert ((found - expected).abs() <= expected.abs() / 16 + largest / 448).all()
        assert not torch.equal(found, expected), "nothing was rounded"


def test_8_bit_caches_are_untouched_where_nothing_was_written() -> None:
    kv, cells, _ = filled(FLOAT8, 20)
    others = [i for i in range(8 * BLOCK) if i not in cells.tolist()]
    for cache in (kv.k[0], kv.v[0]):
        assert (cached(cache, torch.tensor(others), torch.float32) == 0).all()


def test_attention_over_8_bits_is_attention_over_what_was_rounded() -> None:
    kv, _, _ = filled(FLOAT8, 30)
    every = torch.arange(8 * BLOCK)
    plain: list[Cache] = [cached(x, every, torch.float32).view(8, BLOCK, KV_HEADS, D) for x in (kv.k[0], kv.v[0])]
    q = torch.randn(3, HEADS, D)
    tables, slots, lens = (
        torch.tensor([[3, 4, 5], [6, 7, 0], [0, 1, 2]]),
        torch.tensor([2, 0, 1]),
        torch.tensor([9, 12, 1]),
    )
    found, expected = (KERNELS.decode_attention(q, k, v, tables, slots, lens) for k, v in ((kv.k[0], kv.v[0]), plain))
    assert torch.allclose(found, expected)
    tokens = Tokens.empty(3, CPU)
    tokens.slots.fill_(1)
    pieces = Pieces(torch.tensor([0]).int(), torch.tensor([3]).int(), tokens.lone_lens)
    prefill = PrefillMetadata([3], [7], torch.tensor([0, 3]).int(), tokens, pieces)
    found, expected = (KERNELS.prefill_attention(q, k, v, tables, prefill) for k, v in ((kv.k[0], kv.v[0]), plain))
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8])
def test_a_block_takes_the_memory_that_it_is_said_to(dtype: torch.dtype) -> None:
    kv = KVCache(TINY, 3, 7, BLOCK, dtype, CPU)
    held = 0
    for cache in (*kv.k, *kv.v):
        held += sum(part.nbytes for part in (cache if isinstance(cache, Quantized) else (cache,)))
    assert held == 8 * KVCache.bytes_per_block(TINY, 3, BLOCK, dtype), "7 blocks and the one for padding"


def test_a_model_with_8_bit_keys_and_values_computes_nearly_the_same() -> None:
    (exact,) = make_stages()
    part = exact.layers
    tensors = DummyCheckpoint(TINY).tensors(part.tensor_names(TINY))
    rounded = Stage(Decoder(TINY, part, tensors, torch.float32, CPU, 512), 128, 4, 64, FLOAT8)
    ids = np.arange(3, 43, dtype=np.int32)
    one, none = np.ones(1, np.int32), np.zeros(1, np.int32)
    logits = []
    for stage in (exact, rounded):
        stage.run(Batch.of_one(ids[:39], 4), None)
        last = Batch(0, 1, ids[39:], one, 39 * one, none, none, none[:0], -1, none)
        logits.append(stage._eager(last, None))
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 0 < error < 0.15  # of random weights, which forgive nothing

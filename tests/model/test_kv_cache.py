"""Keys and values in 8 bits, and a step's way from the host to a captured graph: the torch forms, on any device."""

import numpy as np
import pytest
import torch

from model.attention import prepare
from model.batch import SAMPLED, Batch
from model.graphs import packed_decodes
from model.kernels import Cache, DecodeInputs, Pieces, PrefillMetadata, Quantized
from model.kernels.reference import ReferenceKernels, cached_rows
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
    """A cache of one layer with `tokens` tokens in slots of their own, the slots, and the rotated queries."""
    torch.manual_seed(0)
    kv = KVCache(TINY, 1, 8, BLOCK, dtype, CPU)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * D) * torch.logspace(-3, 3, tokens).unsqueeze(1)
    slots = torch.randperm(8 * BLOCK)[:tokens]
    rotary = rotary_table(64, TINY, CPU)
    q = KERNELS.rotate_and_write(qkv, HEADS, rotary, torch.arange(tokens), kv.k[0], kv.v[0], slots)
    return kv, slots, q


def test_8_bits_keep_every_head_of_every_token_within_a_sixteenth() -> None:
    """4 bits of mantissa, and a scale of its own: a loud token takes nothing from a quiet one."""
    (exact, slots, _), (rounded, _, _) = filled(torch.float32, 20), filled(FLOAT8, 20)
    for a, b in ((exact.k[0], rounded.k[0]), (exact.v[0], rounded.v[0])):
        expected, found = (cached_rows(x, slots, torch.float32) for x in (a, b))
        largest = expected.abs().amax(-1, keepdim=True)
        assert ((found - expected).abs() <= expected.abs() / 16 + largest / 448).all()
        assert not torch.equal(found, expected), "nothing was rounded"


def test_8_bit_caches_are_untouched_where_nothing_was_written() -> None:
    kv, slots, _ = filled(FLOAT8, 20)
    others = [i for i in range(8 * BLOCK) if i not in slots.tolist()]
    for cache in (kv.k[0], kv.v[0]):
        assert (cached_rows(cache, torch.tensor(others), torch.float32) == 0).all()


def test_attention_over_8_bits_is_attention_over_what_was_rounded() -> None:
    kv, _, _ = filled(FLOAT8, 30)
    every = torch.arange(8 * BLOCK)
    plain: list[Cache] = [cached_rows(x, every, torch.float32).view(8, BLOCK, KV_HEADS, D) for x in (kv.k[0], kv.v[0])]
    q = torch.randn(3, HEADS, D)
    tables, lens = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 0]]), torch.tensor([9, 12, 1])
    found, expected = (KERNELS.decode_attention(q, k, v, tables, lens) for k, v in ((kv.k[0], kv.v[0]), plain))
    assert torch.allclose(found, expected)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    prefill = PrefillMetadata([3], [7], starts, torch.tensor([0, 7], dtype=torch.int32), every[5:12])
    found, expected = (KERNELS.prefill_attention(q, k, v, prefill) for k, v in ((kv.k[0], kv.v[0]), plain))
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
    tables = np.arange(20, dtype=np.int32)
    logits = []
    for stage in (exact, rounded):
        stage.run(Batch(0, 0, ids[:39], 39 * one, none, tables, none, -1, none, []), None)
        last = Batch(0, 1, ids[39:], one, 39 * one, tables, none, -1, none, [])
        logits.append(stage._eager(stage._inputs(last), None, prepare(last, 4, CPU)))
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 0 < error < 0.15  # of random weights, which forgive nothing


@pytest.mark.parametrize("rows", [3, 5])
def test_an_unpacked_step_is_the_prepared_one(rows: int) -> None:
    """What a captured graph reads equals what an eager step computes from; what is left over becomes padding."""
    batch = Batch(
        0, 0, np.array([7, SAMPLED, 9], np.int32), np.ones(3, np.int32), np.array([0, 5, 7], np.int32),
        np.array([4, 1, 5, 3, 2, 6], np.int32), np.array([2, 0, 1], np.int32), -1, np.arange(3, dtype=np.int32), [],
    )  # fmt: skip
    newest = torch.tensor([11, 12, 13, 99])
    a, b, c, d, e, lone_lens = (torch.full((rows,), -5) for _ in range(6))
    inputs = DecodeInputs(a, b, c, d, e, torch.full((rows, 4), -5), Pieces(a[:0], a[:0], lone_lens))
    KERNELS.unpack_decodes(packed_decodes(batch, 3), newest, inputs, BLOCK, 77)
    expected = prepare(batch, BLOCK, CPU)
    assert inputs.token_ids.tolist() == [7, 11, 9] + [0] * (rows - 3)
    assert inputs.positions.tolist() == expected.positions.tolist() + [0] * (rows - 3)
    assert inputs.slot_mapping.tolist() == expected.slot_mapping.tolist() + [77] * (rows - 3)
    assert inputs.context_lens.tolist() == expected.context_lens.tolist() + [0] * (rows - 3)
    assert inputs.seq_slots.tolist() == [2, 0, 1] + [3] * (rows - 3)
    assert torch.equal(inputs.block_tables[:3, :2], expected.block_tables)
    assert torch.equal(lone_lens, inputs.context_lens)

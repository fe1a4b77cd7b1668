"""A whole stage on a GPU: captured steps against the same steps launched one kernel after another, and both against the
CPU in float32."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.batch import SAMPLED, Batch, Int32Array, PromptRow, Rules
from model.config import ModelConfig, float8_products, split_layers
from model.graphs import StepGraphs
from model.kv_cache import FLOAT8
from model.llama import Decoder
from model.sampling import Sampled
from model.stage import Stage
from model.transfer import to_device
from model.weights.dummy import DummyCheckpoint
from tests.conftest import ints, with_tables
from tests.model.test_graphs import Uncaptured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
BLOCK = 16
SLOTS = 20


def shape(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        dim=512, n_layers=3, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim,
        hidden_dim=1024, vocab_size=1000, norm_eps=1e-5, rope_theta=10000.0,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip


def make(
    config: ModelConfig,
    device: str,
    dtype: torch.dtype,
    graphs: type[StepGraphs] | None = None,
    kv_dtype: torch.dtype | None = None,
    fp8: frozenset[str] = frozenset(),
) -> Stage:
    (part,) = split_layers(config, 1)
    tensors = DummyCheckpoint(config).tensors(part.tensor_names(config))
    decoder = Decoder(config, part, tensors, dtype, torch.device(device), 512, fp8=fp8)
    stage = Stage(decoder, 64, BLOCK, SLOTS, kv_dtype)
    if graphs is not None:
        with torch.inference_mode():
            stage._graphs = graphs(stage.decoder, stage.kv, stage.slots, 512)
    return stage


def generate(stage: Stage, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Prefill all prompts at once; then decode one step ahead of what the host knows."""
    n = len(prompts)
    rows, none = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    tables = np.arange(n * 8).reshape(n, 8).tolist()

    def step_of(step_id: int, ids: Int32Array, query_lens: Int32Array, computed: Int32Array) -> Batch:
        batch = Batch(0, step_id, ids, query_lens, computed, rows, none, none[:0], step_id - 1, rows)
        return with_tables(batch, tables, BLOCK)

    lens = np.array([len(p) for p in prompts], np.int32)
    ids = np.concatenate([np.array(p, np.int32) for p in prompts])
    out = [stage.run(step_of(0, ids, lens, none), None)]
    for step in range(steps):
        one = np.ones(n, np.int32)
        out.append(stage.run(step_of(step + 1, one * SAMPLED, one, lens + step), None))
    return torch.stack([x.token_ids for x in out], 1).tolist()  # type: ignore[union-attr]


HEADS = [(9, 3, 64), (4, 4, 128), (8, 8, 128), (16, 2, 128), (8, 8, 64), (64, 8, 128), (32, 32, 128)]
PROMPTS = [[(7 * i + j * j) % 1000 for j in range(n)] for i, n in enumerate([2, 5, 16, 33, 100])]


@pytest.mark.parametrize("heads", HEADS)
def test_tokens_in_float32_equal_the_cpus(heads: tuple[int, int, int]) -> None:
    config = shape(*heads)
    expected = generate(make(config, "cpu", torch.float32), PROMPTS, 20)
    assert generate(make(config, "cuda", torch.float32), PROMPTS, 20) == expected
    assert generate(make(config, "cuda", torch.float32, StepGraphs), PROMPTS, 20) == expected


@pytest.mark.parametrize("kv_dtype", [None, FLOAT8])
@pytest.mark.parametrize("heads", HEADS)
def test_graphs_give_the_tokens_of_the_same_steps_uncaptured(
    heads: tuple[int, int, int], kv_dtype: torch.dtype | None
) -> None:
    """In bfloat16, where each way of taking a step apart rounds in its own way."""
    captured, not_ = (make(shape(*heads), "cuda", torch.bfloat16, g, kv_dtype) for g in (StepGraphs, Uncaptured))
    for prompts in (PROMPTS[:1], PROMPTS):
        assert generate(captured, prompts, 20) == generate(not_, prompts, 20)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device() -> None:
    """Neither eager steps nor captured ones, however their tokens are drawn: torch says so itself."""
    stage = make(shape(8, 8, 64), "cuda", torch.bfloat16, StepGraphs)
    rules = [
        Rules(
            0, 5, 1.0, logprobs=2, logit_bias={7: 1.0}, banned=(4,), banned_until=99, counts=True, repetition=1.2,
            presence=0.1, frequency=0.1, prompt_ids=ints(3, 5), output_ids=ints(3, 3, 7),
        ),
        Rules(1, 5, 1.0, 5, 0.9, 0.1),
    ]  # fmt: skip
    drawn, masks = ints(0, 1), {1: b"\x55" * 125}
    n, rows = 3, np.arange(3, dtype=np.int32)
    lens, none = np.full(n, 7, np.int32), np.zeros(n, np.int32)
    prompts = [PromptRow(2, 5, 1)]
    ids = np.arange(n * 7, dtype=np.int32)
    prefill = Batch(0, 0, ids, lens, none, rows, none + 1, rows, -1, rows, drawn, rules, masks, [], prompts)
    one = np.ones(n, np.int32)
    decode = Batch(0, 1, one * SAMPLED, one, lens, rows, none, none[:0], 0, rows, drawn, [], masks)
    for mode in ("default", "error"):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            results = [stage.run(batch, None) for batch in (prefill, decode)]
            assert all(isinstance(result, Sampled) and not result.errors for result in results)
            stage.feed(decode, to_device([1, 2, 3], torch.int64, torch.device("cuda")))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("kv_dtype", "bound"), [(None, 2e-2), (FLOAT8, 6e-2)])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_in_bfloat16_are_near_the_float32_reference(
    heads: tuple[int, int, int], kv_dtype: torch.dtype | None, bound: float
) -> None:
    config = shape(*heads)
    expected, found = make(config, "cpu", torch.float32), make(config, "cuda", torch.bfloat16, kv_dtype=kv_dtype)
    assert difference(found, expected) < bound


def difference(found: Stage, expected: Stage) -> float:
    """Of the logits after all prompts."""
    both = []
    for stage in (expected, found):
        seen: list[torch.Tensor] = []
        logits = stage.decoder.logits
        stage.decoder.logits = lambda x, f=logits, s=seen: s.append(f(x)) or s[-1]  # type: ignore
        generate(stage, PROMPTS, 0)
        stage.decoder.logits = logits  # type: ignore[method-assign]
        both.append(seen[0].double().cpu())
    return float((both[0] - both[1]).norm() / both[0].norm())


def after_chunks(stage: Stage, prompts: list[list[int]], chunk: int) -> torch.Tensor:
    """Logits after all prompts, of which `chunk` tokens at most are computed at once."""
    n, seen = len(prompts), list[torch.Tensor]()
    tables = np.arange(n * 8).reshape(n, 8).tolist()
    logits = stage.decoder.logits
    stage.decoder.logits = lambda x: seen.append(logits(x)) or seen[-1]  # type: ignore
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [(i, prompt[start : start + chunk]) for i, prompt in enumerate(prompts) if len(prompt) > start]
        parts.sort(key=lambda part: len(part[1]) > 1)
        ids, lens = ints(*(t for _, part in parts for t in part)), ints(*(len(part) for _, part in parts))
        seqs, none = ints(*(i for i, _ in parts)), ints(*[0] * len(parts))
        ends = ints(*(row for row, (i, part) in enumerate(parts) if start + len(part) == len(prompts[i])))
        batch = Batch(0, 0, ids, lens, none + start, seqs, none, none[:0], -1, ends)
        stage.run(with_tables(batch, [tables[i] for i, _ in parts], BLOCK), None)
    stage.decoder.logits = logits  # type: ignore[method-assign]
    return torch.cat([x for x in seen if len(x)]).double().cpu()


@pytest.mark.parametrize(("kv_dtype", "bound"), [(None, 2e-2), (FLOAT8, 6e-2)])
@pytest.mark.parametrize("chunk", [7, 33, 64])
@pytest.mark.parametrize("heads", HEADS)
def test_prompts_in_chunks_in_bfloat16_are_near_the_float32_reference(
    heads: tuple[int, int, int], chunk: int, kv_dtype: torch.dtype | None, bound: float
) -> None:
    """Contexts are read where they lie."""
    config = shape(*heads)
    expected = after_chunks(make(config, "cpu", torch.float32), PROMPTS, chunk)
    found = after_chunks(make(config, "cuda", torch.bfloat16, kv_dtype=kv_dtype), PROMPTS, chunk)
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("kv_dtype", [None, FLOAT8])
def test_a_step_needs_no_more_memory_for_longer_contexts(kv_dtype: torch.dtype | None) -> None:
    """60 questions about one cached document of 12,000 tokens."""
    config = replace(shape(64, 8, 128), max_position_embeddings=16_384)
    (part,) = split_layers(config, 1)
    tensors = DummyCheckpoint(config).tensors(part.tensor_names(config))
    decoder = Decoder(config, part, tensors, torch.bfloat16, torch.device("cuda"), 16_384)
    stage = Stage(decoder, 1200, BLOCK, 60, kv_dtype)
    n, now = 60, 32
    document = list(range(750))
    needed = []
    for before in (0, 0, 12_000):  # the first time kernels are compiled
        ids, lens, seqs = np.zeros(n * now, np.int32), np.full(n, now, np.int32), np.arange(n, dtype=np.int32)
        batch = Batch(0, 0, ids, lens, lens * 0 + before, seqs, seqs, seqs[:0], -1, seqs)
        own = [[750 + 2 * i, 751 + 2 * i] for i in range(n)]
        tables = [[*document, *blocks] if before else blocks for blocks in own]
        batch = with_tables(batch, tables, BLOCK)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        stage.run(batch, None)
        torch.cuda.synchronize()
        needed.append(torch.cuda.max_memory_allocated() - held)
    assert needed[2] <= needed[1] + 2**20, needed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignore", [[], ["wqkv"], ["wo"], ["w13"], ["w2"], ["wqkv", "layers.2.*"], ["wo", "w2"]])
def test_products_in_8_bits_beside_others(ignore: list[str], dtype: torch.dtype) -> None:
    """As far from the same mixture in float32 as a CPU in this dtype: now and then rounding to 8 bits falls otherwise.

    Captured steps of one row and of several give the tokens of uncaptured ones.
    """
    config = shape(16, 2, 128)
    fp8 = float8_products(config, ignore)
    expected = make(config, "cpu", torch.float32, fp8=fp8)
    of_cpu = difference(make(config, "cpu", dtype, fp8=fp8), expected)
    assert difference(make(config, "cuda", dtype, fp8=fp8), expected) < 1.25 * of_cpu
    captured, not_ = (make(config, "cuda", dtype, graphs, fp8=fp8) for graphs in (StepGraphs, Uncaptured))
    for prompts in (PROMPTS[:1], PROMPTS):
        assert generate(captured, prompts, 20) == generate(not_, prompts, 20)


@pytest.mark.parametrize("kv_dtype", [None, FLOAT8])
def test_reused_slots_do_not_leak(kv_dtype: torch.dtype | None) -> None:
    """Another user's sequence takes slot and blocks: what it gets is what it gets alone."""
    stage = make(shape(9, 3, 64), "cuda", torch.float32, StepGraphs, kv_dtype)
    alone = [generate(make(shape(9, 3, 64), "cuda", torch.float32, None, kv_dtype), [p], 10)[0] for p in PROMPTS]
    for _ in range(3):
        for prompt, expected in zip(PROMPTS, alone, strict=True):
            assert generate(stage, [prompt], 10) == [expected]

"""Tokens and logits of the default model against transformers, which read the same file (see tests/golden.py)."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from cluster.engine import Engine
from cluster.local_pipeline import LocalPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from model.batch import Batch, TokenLogprobs
from model.config import split_layers
from model.group import DecoderGroup
from model.llama import Decoder
from model.stage import Stage
from model.weights import open_checkpoint, resolve_path
from tests import golden
from tests.conftest import Collector, request

SHORT = range(16)  # prompts of up to 200 tokens; the others take minutes
BLOCK = 16


@cache
def decoders(stages: int, device: str = "cpu", shards: int = 1) -> tuple[DecoderGroup, ...]:
    checkpoint = open_checkpoint(resolve_path(golden.MODEL))
    config, there = checkpoint.config, [torch.device(device)] * shards
    return tuple(
        DecoderGroup(
            Decoder.sharded(config, part, checkpoint.tensors(part.tensor_names(config)), torch.float32, there, 2048)
        )
        for part in split_layers(config, stages)
    )


def start(
    stages: int,
    num_blocks: int = 600,
    max_num_batched_tokens: int = 512,
    prefix_caching: bool = True,
    device: str = "cpu",
    shards: int = 1,
) -> tuple[Engine, Collector]:
    made = [Stage(group, num_blocks, BLOCK, 32) for group in decoders(stages, device, shards)]
    if device == "cuda":
        for stage in made:
            stage.capture(512, lambda done, total: None)
    pipeline = LocalPipeline(made)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK, prefix_caching),
        depth=stages,
        max_num_seqs=32,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=2048,
    )
    collector = Collector()
    engine = Engine(scheduler, pipeline, collector)
    engine.start()
    return engine, collector


def check(indices: range | list[int], **options: Any) -> Engine:
    """All prompts of `indices` at once; their tokens must be those of transformers."""
    engine, collector = start(**options)
    expected = golden.load()
    try:
        for i in indices:
            prompt, tokens = expected[i]
            engine.add(request(str(i), prompt, max_tokens=len(tokens)))
        found = collector.wait([str(i) for i in indices], timeout=1500)
        assert found == {str(i): expected[i][1] for i in indices}
    finally:
        engine.close()
    engine.scheduler.check()
    assert engine.scheduler.stats().kv_blocks_used == 0
    return engine


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    decoders.cache_clear()  # gigabytes


def test_there_are_twenty_prompts_of_1_to_1500_tokens() -> None:
    entries = golden.load()
    lengths = [len(prompt) for prompt, _ in entries]
    assert len(entries) == 20
    assert (min(lengths), max(lengths)) == (1, 1500)
    assert all(len(tokens) == golden.NEW_TOKENS for _, tokens in entries)


def test_sixteen_short_prompts_at_once() -> None:
    check(SHORT, stages=1)


@pytest.mark.golden
@pytest.mark.parametrize("stages", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_more_stages(stages: int) -> None:
    check([0, 2, 8, 13], stages=stages)


@pytest.mark.golden
@pytest.mark.parametrize(("stages", "shards"), [(1, 2), (2, 3), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_stages_of_several_devices(stages: int, shards: int) -> None:
    """9 heads and 3 KV heads: two devices do not hold equally many."""
    check([0, 2, 8, 13], stages=stages, shards=shards)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_all_prompts(stages: int) -> None:
    check(range(20), stages=stages)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("stages", [1, 2])
def test_a_gpu_in_float32_gives_the_same_tokens(stages: int) -> None:
    """With captured decode steps and fused kernels; all stages on one GPU."""
    check(range(20), stages=stages, device="cuda")


@pytest.mark.golden
def test_prompts_in_chunks_of_seven_tokens() -> None:
    check([1, 4, 9], stages=2, max_num_batched_tokens=7)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_prompts_in_chunks_of_seven_tokens() -> None:
    check(range(20), stages=2, max_num_batched_tokens=7)


@pytest.mark.golden
def test_preemption() -> None:
    engine = check([2, 3, 4, 5], stages=2, num_blocks=14)
    assert engine.scheduler.stats().preemptions > 0, "a cache of 14 blocks should have been too small"


def test_prefix_hit() -> None:
    engine, collector = start(stages=2)
    prompt, tokens = golden.load()[15]
    try:
        for name in ("first", "second"):
            engine.add(request(name, prompt, max_tokens=len(tokens)))
            assert collector.wait([name])[name] == tokens
    finally:
        engine.close()
    assert collector.events["second"][0].num_cached_tokens >= 190
    assert collector.events["first"][0].num_cached_tokens == 0


def naive_logits(tokens: list[int]) -> torch.Tensor:
    """[1, V]: the last position of one forward pass over the whole sequence with an empty cache."""
    (group,) = decoders(1)
    decoder = group.leader
    n = len(tokens)
    stage = Stage(decoder, -(-n // BLOCK), BLOCK, 1)
    seen: list[torch.Tensor] = []
    logits = decoder.logits

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen.append(logits(x))
        return seen[-1].clone()  # the sampler changes what it is given

    decoder.logits = keep  # type: ignore[method-assign]
    try:
        stage.run(Batch.of_one(np.array(tokens, np.int32), BLOCK), None)
    finally:
        del decoder.logits  # type: ignore[method-assign]
    return seen[0]


@pytest.mark.golden
def test_naive_forward_gives_the_golden_tokens() -> None:
    """Every token from a pass over everything before it: no cache, no chunks, no company."""
    for i in (0, 2, 9):
        prompt, tokens = golden.load()[i]
        for n in range(0, len(tokens), 7):
            assert int(naive_logits(prompt + tokens[:n])[0].argmax()) == tokens[n]


@cache
def transformers_logits(i: int) -> torch.Tensor:
    """[n, V] of golden prompt `i`."""
    with torch.inference_mode():
        return transformers_llama()(torch.tensor([golden.load()[i][0]])).logits[0]


@cache
def transformers_llama() -> Any:
    from transformers import AutoModelForCausalLM

    path = resolve_path(golden.MODEL)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def test_logits_equal_those_of_transformers() -> None:
    for i in (0, 2, 15):
        prompt, _ = golden.load()[i]
        torch.testing.assert_close(naive_logits(prompt)[0], transformers_logits(i)[-1], atol=1e-3, rtol=0)


def test_logprobs_equal_those_of_transformers() -> None:
    """Of a prompt of 200 tokens, computed in chunks on two stages, and of the token that follows."""
    prompt, _ = golden.load()[15]
    expected = transformers_logits(15).log_softmax(-1)
    engine, collector = start(stages=2, max_num_batched_tokens=64)
    try:
        engine.add(request("r", prompt, max_tokens=1, prompt_logprobs=5, logprobs=5))
        collector.wait(["r"])
    finally:
        engine.close()
    *_, event = events = collector.events["r"]  # those of the prompt come with its chunks
    assert event.logprob is not None
    found = [
        *(one for e in events for one in e.prompt_logprobs or []),
        TokenLogprobs(event.logprob, event.top_logprobs or []),
    ]
    for i, (logprobs, token) in enumerate(zip(found, [*prompt[1:], event.token_id], strict=True)):
        assert logprobs.chosen == pytest.approx(float(expected[i, token]), abs=1e-3)
        for alternative, value in logprobs.top:
            assert value == pytest.approx(float(expected[i, alternative]), abs=1e-3)
        assert [value for _, value in logprobs.top] == pytest.approx(expected[i].topk(5).values.tolist(), abs=1e-3)


@pytest.mark.golden
def test_seeded_sampling_is_the_same_however_it_is_computed() -> None:
    """Alone, in a batch, after preemption, and with another number of stages."""
    prompts = {str(i): golden.load()[i][0] for i in (2, 6, 9)}

    def sampled(names: list[str], **options: int) -> dict[str, list[int]]:
        engine, collector = start(**options)
        try:
            for name in names:
                sampling = {"temperature": 0.9, "top_p": 0.95, "seed": int(name)}
                engine.add(request(name, prompts[name], max_tokens=24, **sampling))
            found = collector.wait(names)
        finally:
            engine.close()
        assert (engine.scheduler.stats().preemptions > 0) == (options.get("num_blocks") == 5)
        return found

    alone = {name: sampled([name], stages=1)[name] for name in prompts}
    assert sampled(list(prompts), stages=1) == alone
    assert sampled(list(prompts), stages=3) == alone
    assert sampled(list(prompts), stages=2, num_blocks=5) == alone

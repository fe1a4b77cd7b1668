"""Perplexity against transformers, and what 8 bits cost the default model by it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deployments.config import AppConfig, parse_app_config
from model.perplexity import perplexity
from model.text.tokenizer import load_tokenizer
from model.weights import resolve_path
from ops.bench.engine.perplexity import bench_perplexity, default_text, rounded, whole_model
from tests import golden
from tests.cluster.test_golden import decoders, transformers_llama


def token_ids(count: int) -> list[int]:
    return load_tokenizer(resolve_path(golden.MODEL)).encode(default_text(), add_bos=False)[:count]


def configured(device: str, ignore: Sequence[str] = ()) -> AppConfig:
    model = {"path": golden.MODEL, "name": "smollm2", "quantization": "fp8", "quantization_ignore": list(ignore)}
    return parse_app_config({"model": model, "pipeline": {"device": device}, "cache": {"memory_gb": 0.1}})


def measured(device: str, tokens: int, window: int, ignore: Sequence[str] = ()) -> Any:
    wanted = ["none", "fp8", "fp8-cache"]
    return bench_perplexity(configured(device, ignore), default_text(), tokens, window, wanted)


def test_it_is_that_of_transformers() -> None:
    ids = token_ids(150)
    with torch.inference_mode():
        losses = [float(transformers_llama()(x, labels=x).loss) for x in torch.tensor([ids]).split(100, dim=1)]
    found = perplexity(decoders(1)[0].leader, ids, window=100)
    assert found.tokens == 99 + 49
    assert found.mean_nll == pytest.approx((99 * losses[0] + 49 * losses[1]) / 148, abs=1e-4)


def test_a_text_of_one_token_predicts_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(decoders(1)[0].leader, [1], window=100)


@pytest.mark.slow
def test_eight_bits_cost_what_three_bits_of_mantissa_cost() -> None:
    """The reference kernels, on few tokens. A wrong scale or a lost row would cost a multiple.

    e4m3 rounds every weight by up to 1/16 of itself: of a model as small as this one that costs 0.6% of perplexity, and
    the same in activations another 0.9% (it costs an 8B model about 1%, and less the larger it is).
    """
    result = measured("cpu", tokens=1024, window=512)
    assert result["perplexity"]["none"] != result["perplexity"]["fp8"], "the weights are not in 8 bits"
    assert 0.99 < result["ratio"]["fp8"] < 1.05
    assert result["perplexity"]["none"] != result["perplexity"]["fp8-cache"], "keys and values are not in 8 bits"
    assert 0.99 < result["ratio"]["fp8-cache"] < 1.02


def test_the_matrices_that_are_asked_for_are_rounded_and_no_others() -> None:
    torch.manual_seed(0)
    stems = "attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2", "attention_norm"
    tensors = [(f"layers.0.{stem}.weight", torch.randn(8, 64)) for stem in stems]
    for name, wanted in (("wqkv,wo,w13,w2", 4), ("wqkv", 1), ("w13", 1), ("w2", 1), ("", 0)):
        changed, products = 0, frozenset(f"layers.0.{kind}" for kind in name.split(","))
        for (_, before), (_, after) in zip(tensors, rounded(iter(tensors), products), strict=True):
            error = float((after - before).norm() / before.norm())
            assert error == 0 or 0.01 < error < 0.04, "three bits of mantissa round by 2.6% in the mean square"
            changed += error > 0
        assert changed == wanted, name


@pytest.mark.slow
def test_what_the_configuration_ignores_stays_as_it_is() -> None:
    """In 8 bits as a whole, and in weights alone."""
    path, config = resolve_path(golden.MODEL), configured("cpu", ["wqkv", "layers.29.*"])
    plain, whole, weights = (whole_model(config, path, name, 64) for name in ("none", "fp8", "fp8-w13"))
    x = torch.randn(3, 576, generator=torch.Generator().manual_seed(0)).to(plain.dtype)
    for i, layers in enumerate(zip(plain.layers, whole.layers, weights.layers, strict=True)):
        wqkv, w13 = ([getattr(layer, kind)(x) for layer in layers] for kind in ("wqkv", "w13"))
        assert torch.equal(wqkv[0], wqkv[1])
        assert torch.equal(wqkv[0], wqkv[2])
        assert torch.equal(w13[0], w13[1]) == torch.equal(w13[0], w13[2]) == (i == 29), f"layer {i}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_loses_no_more_than_the_reference() -> None:
    """The same 8 bits in the GPU's own products and fused kernels, and over twenty thousand tokens.

    Of 2,048 tokens in 8 bits the perplexity is known to 1 % or so: a CPU in float32 and in bfloat16 are 0.8 % apart.
    """
    here, there = measured("cpu", tokens=2048, window=512), measured("cuda", tokens=2048, window=512)
    for weights, within in (("none", 0.005), ("fp8", 0.015), ("fp8-cache", 0.015)):
        assert there["perplexity"][weights] == pytest.approx(here["perplexity"][weights], rel=within)
    long = measured("cuda", tokens=20_480, window=1024, ignore=["wqkv", "layers.29.*"])
    assert long["tokens"] >= 20_000
    assert 0.99 < long["ratio"]["fp8"] < 1.01

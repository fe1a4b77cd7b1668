"""Layers of which some products are in 8 bits and others are not; the names by which these are chosen; their bytes."""

from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from cluster.config import ModelArgs, in_8_bits, read_model
from model import float8
from model.attention import prepare
from model.batch import Batch
from model.config import PRODUCTS, ModelConfig, StageLayers, float8_products, product_of, split_layers
from model.float8 import CANDIDATES, quantize_weight
from model.kernels import Activations, Quantized
from model.kernels.reference import ReferenceKernels
from model.kv_cache import KVCache
from model.layers import CudaLinear, DenseLinear, Float8Linear, StepByStep
from model.llama import Decoder
from model.roofline import Rates, StageWork
from model.slots import Slots
from model.weights.dummy import DummyCheckpoint
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = replace(TINY, n_layers=2, attention_bias=True, mlp_bias=True)
OTHERS = [*chain.from_iterable(combinations(("wo", "w13", "w2"), n) for n in range(4))]


class Rounded(StepByStep):
    """What a product in 8 bits is meant to be: both factors rounded, multiplied in float32, given in bfloat16."""

    def __init__(self, dense: DenseLinear) -> None:
        assert dense.bias is not None
        values, scales = quantize_weight(dense.weight)
        self._weight, self._bias = values.float() * scales, dense.bias
        self.num_parameters = dense.num_parameters

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return linear(rounded(x), self._weight).bfloat16().float() + self._bias


def rounded(x: torch.Tensor) -> torch.Tensor:
    values, scales = ReferenceKernels().quantize_rows(x)
    return values.float() * scales


def made(dtype: torch.dtype, fp8: frozenset[str] = frozenset(), config: ModelConfig = CONFIG) -> Decoder:
    (part,) = split_layers(config, 1)
    return Decoder(config, part, DummyCheckpoint(config).tensors(part.tensor_names(config)), dtype, CPU, 64, fp8=fp8)


def logits(decoder: Decoder) -> torch.Tensor:
    """Of a sequence of 40 tokens."""
    ids = (np.arange(40, dtype=np.int32) * 7) % decoder.config.vocab_size
    batch, slots = Batch.of_one(ids, 4), Slots(1, 10, 4, 10, CPU)
    slots.extend(batch)
    kv = KVCache(decoder.config, len(decoder.layers), 10, 4, decoder.dtype, CPU)
    x = decoder.forward(
        decoder.embed(torch.from_numpy(ids).long()), kv, prepare(batch, slots, decoder.kernels, decoder.config.groups)
    )
    return decoder.logits(x)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("others", OTHERS, ids=lambda kinds: "+".join(("wqkv", *kinds)))
def test_any_products_of_a_layer_may_be_in_8_bits(others: tuple[str, ...]) -> None:
    """These of the second layer, and of the first one all that are not these: so each of the 16 ways is seen."""
    fp8 = frozenset(f"layers.{1 if kind in ('wqkv', *others) else 0}.{kind}" for kind in PRODUCTS)
    plain, expected = made(torch.float32), made(torch.float32)
    for name in fp8:
        _, layer, kind = name.split(".")
        setattr(expected.layers[int(layer)], kind, Rounded(getattr(expected.layers[int(layer)], kind)))
    mixed = made(torch.float32, fp8)
    held = {f"layers.{i}.{kind}": getattr(mixed.layers[i], kind) for i in (0, 1) for kind in PRODUCTS}
    assert {name for name, product in held.items() if isinstance(product, Float8Linear)} == fp8
    found, wanted = logits(mixed), logits(expected)
    assert error(found, wanted) < 0.1 * error(wanted, logits(plain))
    for layer in mixed.layers:  # the form that the others have on a GPU
        for kind in PRODUCTS:
            if isinstance(product := getattr(layer, kind), DenseLinear):
                setattr(layer, kind, CudaLinear(product.weight, product.bias))
    assert error(logits(mixed), found) < 1e-5


def test_a_rows_scale_is_the_one_with_the_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, 64) * torch.rand(300, 1)
    weight[7] = 0.0
    found, plain = quantize_weight(weight.bfloat16()), ReferenceKernels().quantize_rows(weight.bfloat16())
    exact = weight.bfloat16().float()

    def errors(x: Quantized) -> torch.Tensor:
        return (x.values.float() * x.scales - exact).square().sum(1)

    scales = [plain.scales * 2 ** (i / CANDIDATES) for i in range(CANDIDATES)]
    tried = [Quantized((exact / scale).to(torch.float8_e4m3fn), scale) for scale in scales]
    assert torch.equal(errors(found), torch.stack([errors(x) for x in tried]).amin(0))
    assert errors(found).sum() < 0.9 * errors(plain).sum()
    assert not found.values[7].float().any()
    monkeypatch.setattr(float8, "PART", 1000)  # fifteen rows at a time
    again = quantize_weight(weight.bfloat16())
    assert torch.equal(again.scales, found.scales)
    assert torch.equal(again.values.float(), found.values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", [("wqkv", "w2"), ("wo", "w13"), tuple(PRODUCTS)])
def test_in_every_type_of_the_others(dtype: torch.dtype, kinds: tuple[str, ...]) -> None:
    """Products in 8 bits give the type in which the layer goes on, which not every processor multiplies."""
    fp8 = frozenset(f"layers.{i}.{kind}" for i in (0, 1) for kind in kinds)
    assert error(logits(made(dtype, fp8)), logits(made(torch.float32, fp8))) < 3e-2


def test_patterns_name_products() -> None:
    everything = float8_products(TINY)
    assert len(everything) == 4 * TINY.n_layers
    assert everything - float8_products(TINY, ["w2"]) == {f"layers.{i}.w2" for i in range(TINY.n_layers)}
    kept = everything - float8_products(TINY, ["layers.5.*", "wo", "layers.[01].w1?"])
    assert kept == {
        *(f"layers.5.{kind}" for kind in PRODUCTS),
        *(f"layers.{i}.wo" for i in range(TINY.n_layers)),
        *("layers.0.w13", "layers.1.w13"),
    }
    assert float8_products(TINY, ["*"]) == frozenset()


@pytest.mark.parametrize("pattern", ["w3", "layers.6.w2", "layer.0.w2", "lm_head", "W2", ""])
def test_a_pattern_that_names_nothing_is_an_error_that_says_what_there_is(pattern: str) -> None:
    words = f"model.quantization_ignore: '{pattern}' names nothing: there are wqkv, wo, w13, w2 in each of 6 layers, "
    with pytest.raises(ValueError, match="names nothing") as failed:
        float8_products(TINY, ["w2", pattern])
    assert str(failed.value) == words + "layers.0.wqkv to layers.5.w2"


def test_configuration() -> None:
    args = ModelArgs(path="shape:llama-2-7b", name="x", quantization="fp8", quantization_ignore=["layers.31.w2"])
    config = read_model(args)
    assert len(in_8_bits(args, config)) == 127
    with pytest.raises(ValueError, match=r"model\.quantization_ignore: 'layers\.32\.w2' names nothing"):
        read_model(args.model_copy(update={"quantization_ignore": ["layers.32.w2"]}))
    for other in ("none", "int4"):
        with pytest.raises(ValueError, match=f"model.quantization is {other}: set it to fp8, or remove the list"):
            in_8_bits(args.model_copy(update={"quantization": other}), config)


def test_every_weight_of_a_layer_belongs_to_a_product() -> None:
    (part,) = split_layers(CONFIG, 1)
    names = part.tensor_names(CONFIG)
    weights = [n for n in names if n.startswith("layers.") and n.endswith(".weight") and "norm" not in n]
    assert {product_of(name) for name in weights} == float8_products(CONFIG)
    assert all(product_of(name) == "" for name in set(names) - set(weights))


@pytest.mark.parametrize("ignore", [[], ["w2"], ["layers.0.*"], ["*"]])
def test_bytes_are_those_held(ignore: list[str]) -> None:
    fp8 = float8_products(CONFIG, ignore)
    held = 0
    for layer in made(torch.float32, fp8).layers:
        held += layer.attention_norm.nbytes + layer.ffn_norm.nbytes
        for kind in PRODUCTS:
            product = getattr(layer, kind)
            weight = product._weight if isinstance(product, Float8Linear) else product.weight
            held += sum(part.nbytes for part in (weight if isinstance(weight, Quantized) else (weight,)))
            held += (product._bias if isinstance(product, Float8Linear) else product.bias).nbytes
    middle = StageLayers(0, 2, 3)  # without a head
    assert StageWork.of(replace(CONFIG, n_layers=3), middle, torch.float32, fp8).weight_bytes == held


def test_stages_are_balanced_by_what_is_read() -> None:
    """7B over 8: a head in 16 bits weighs as much as 1.3 layers in 8 bits."""
    config = read_model(ModelArgs(path="shape:llama-2-7b", name="x"))

    def slowest(fp8: frozenset[str], split_for: frozenset[str]) -> int:
        parts = split_layers(config, 8, fp8=split_for)
        return max(StageWork.of(config, part, torch.bfloat16, fp8).weight_bytes for part in parts)

    for ignore in ([], ["w2"], ["*"]):
        fp8 = float8_products(config, ignore)
        assert slowest(fp8, fp8) <= slowest(fp8, frozenset())
    fp8 = float8_products(config)
    assert slowest(fp8, fp8) < 0.95 * slowest(fp8, frozenset())


def test_the_floor_multiplies_each_product_at_its_own_rate() -> None:
    config, rates = read_model(ModelArgs(path="shape:llama-2-7b", name="x")), Rates(1e30, 1e12, 2e12)
    part = StageLayers(0, 1, config.n_layers)
    w2 = config.dim * config.hidden_dim
    whole = StageWork.of(config, part, torch.bfloat16, float8_products(config)).floor_s(rates, 1000, 0)
    mixed = StageWork.of(config, part, torch.bfloat16, float8_products(config, ["w2"])).floor_s(rates, 1000, 0)
    assert mixed - whole == pytest.approx(1000 * 2 * w2 * (1 / 1e12 - 1 / 2e12))
    plain = StageWork.of(config, part, torch.bfloat16).floor_s(Rates(1e30, 1e12), 1000, 0)
    assert whole == pytest.approx(plain / 2, rel=1e-3)  # norms are in 16 bits

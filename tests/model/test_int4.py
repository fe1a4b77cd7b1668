"""GPTQ and AWQ checkpoints: packed here by the formats' definitions, served with the logits of the unpacked weights.

transformers itself reads neither without a package for GPUs (gptqmodel), so it gets the weights in full.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.config import ModelArgs, read_model
from model.config import float8_products, split_layers
from model.errors import CheckpointError
from model.kernels import Int4Weight
from model.kernels.reference import ReferenceKernels
from model.layers import Int4Linear, PackedBfloat16Linear, int4_product
from model.llama import Decoder
from model.packing import packed, unpacked
from model.roofline import StageWork
from model.weights import open_checkpoint, read_config
from model.weights.dummy import DummyCheckpoint
from model.weights.sharded import write_shards
from ops.inspection import inspect
from tests.model.test_formats import CPU, PLAIN, our_logits, their_logits
from tests.model.test_weights import all_names, change_config

SHAPE = {
    **PLAIN,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 120,
}
WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8}  # multiples of 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each four bits of a word, lowest bits first
Q_PROJ = "model.layers.1.self_attn.q_proj"


def pack(q: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight numbers along `axis` to a word: number order[i] of each eight in bits 4i to 4i + 3."""
    q = np.moveaxis(q.astype(np.uint32), axis, 0)
    words = np.zeros((len(q) // 8, *q.shape[1:]), np.uint32)
    for i, which in enumerate(order):
        words |= q[which::8] << np.uint32(4 * i)
    return np.moveaxis(words, 0, axis)


def quantised(method: str, shape: tuple[int, int], options: dict[str, Any], seed: int) -> tuple[dict[str, Any], Any]:
    """A random layer [out, in]: its tensors as stored, and the weight that they stand for."""
    random = np.random.default_rng(seed)
    out, inputs = shape
    size = inputs if options["group_size"] == -1 else options["group_size"]
    groups = inputs // size
    q = random.integers(0, 16, (inputs, out))
    scales = (random.uniform(0.5, 1.5, (groups, out)) * inputs**-0.5 / 4).astype(np.float16)
    zeros = np.full((groups, out), 8) if options.get("sym") else random.integers(0, 16, (groups, out))
    g_idx = np.arange(inputs) // size
    if options.get("desc_act"):
        random.shuffle(g_idx)
    weight = (q - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)
    if method == "awq":
        stored = {"qweight": pack(q, 1, AWQ_ORDER), "qzeros": pack(zeros, 1, AWQ_ORDER), "scales": scales}
    else:
        qzeros = pack(zeros, 1)
        if options.get("checkpoint_format", "gptq") == "gptq":
            qzeros = qzeros - np.uint32(0x11111111)  # each less one
        stored = {"qweight": pack(q, 0), "qzeros": qzeros, "scales": scales, "g_idx": g_idx.astype(np.int32)}
    words = {name: value.view(np.int32) if value.dtype == np.uint32 else value for name, value in stored.items()}
    tensors = {name: torch.from_numpy(value).contiguous() for name, value in words.items()}
    return tensors, torch.from_numpy(weight.T.copy())


def write(
    path: Path, method: str, same_orders: bool = False, shape: dict[str, Any] = SHAPE, **options: Any
) -> LlamaForCausalLM:
    """A checkpoint, and the model it stands for in float32."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    for name, parameter in llama.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    state, tensors = {k: v.half().float() for k, v in llama.state_dict().items()}, {}
    for i, (name, value) in enumerate(state.items()):
        stem, _, _ = name.rpartition(".")
        if "proj" not in stem or name.endswith("bias"):
            tensors[name] = value.half()
            continue
        parts, state[name] = quantised(method, tuple(value.shape), options, 0 if same_orders else i)  # type: ignore[arg-type]
        tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    llama.load_state_dict(state)
    llama.config.architectures = ["LlamaForCausalLM"]
    llama.config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors")
    change_config(path, quantization_config={"quant_method": method, "bits": 4, **options})
    return llama


GPTQ: list[dict[str, Any]] = [
    {"group_size": 32, "sym": True, "desc_act": False},
    {"group_size": 64, "sym": False, "desc_act": False, "checkpoint_format": "gptq"},
    {"group_size": -1, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"},
    {"group_size": 32, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"},
    {"group_size": 64, "sym": True, "desc_act": True},
    {"group_size": -1, "sym": True, "desc_act": True},
    {"group_size": 128, "sym": False, "desc_act": True, "shape": WIDE},
    {"group_size": 64, "sym": True, "desc_act": True, "same_orders": True},
]


def assert_same(path: Path, llama: LlamaForCausalLM, *stages: int) -> None:
    expected = their_logits(llama)
    for count in stages:
        error = (our_logits(path, count) - expected).abs().max().item()
        assert error < 1e-4, f"{count} stages: {error}"


@pytest.mark.parametrize("options", GPTQ, ids=range(len(GPTQ)))
def test_gptq(options: dict[str, Any], tmp_path: Path) -> None:
    assert_same(tmp_path, write(tmp_path, "gptq", **options), *((1, 2, 3, 4) if options["group_size"] == 32 else (3,)))


@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_awq(size: int, tmp_path: Path) -> None:
    shape = WIDE if size == 128 else SHAPE
    llama = write(tmp_path, "awq", shape=shape, group_size=size, version="gemm", zero_point=True)
    assert_same(tmp_path, llama, *((1, 2, 3, 4) if size == 128 else (2,)))


def test_biases_and_other_places_for_the_same(tmp_path: Path) -> None:
    """Options in a file of their own, and weights under the name that GPTQ's first tools gave them, or pickled."""
    options = {"group_size": 64, "sym": False, "desc_act": True}
    biased = {**SHAPE, "attention_bias": True, "mlp_bias": True}
    llama = write(tmp_path, "gptq", shape=biased, **options)
    file = tmp_path / "model.safetensors"
    change_config(tmp_path, quantization_config=None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, **options}))
    file.rename(tmp_path / "gptq_model-4bit-64g.safetensors")
    assert_same(tmp_path, llama, 2)
    torch.save(load_file(tmp_path / "gptq_model-4bit-64g.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "gptq_model-4bit-64g.safetensors").unlink()
    assert_same(tmp_path, llama, 2)


def test_a_stage_reads_its_own_share_and_shards_hold_it_packed(tmp_path: Path) -> None:
    llama = write(tmp_path / "hf", "gptq", group_size=64, sym=True, desc_act=True)
    checkpoint = open_checkpoint(tmp_path / "hf")
    stages = split_layers(checkpoint.config, 2)
    write_shards(tmp_path / "hf", checkpoint, stages, tmp_path / "shards", torch.float32)
    assert_same(tmp_path / "shards", llama, 2)
    sharded = open_checkpoint(tmp_path / "shards")
    assert sharded.config == checkpoint.config
    for i, stage in enumerate(stages):
        names = stage.tensor_names(checkpoint.config)
        assert sorted(load_file(tmp_path / "shards" / f"stage-{i}-of-2.safetensors")) == sorted(names)
        assert sharded.nbytes(names) == sum(checkpoint.config.tensor_bytes(name, 4) for name in names)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    own = {name for name in tensors if not name.startswith(("model.layers.2", "model.layers.3"))}
    (tmp_path / "hf" / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in own}, tmp_path / "hf" / "own.safetensors")
    (tmp_path / "hf" / "others.safetensors").write_bytes(b"damaged")
    files = {name: f"{'own' if name in own else 'others'}.safetensors" for name in tensors}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    names = split_layers(checkpoint.config, 2, [2, 2])[0].tensor_names(checkpoint.config)
    assert [name for name, _ in open_checkpoint(tmp_path / "hf").tensors(names)] == names
    with pytest.raises(CheckpointError, match="others"):
        list(open_checkpoint(tmp_path / "hf").tensors(all_names(checkpoint.config)))


@pytest.mark.parametrize("inputs", [128, 192, 40])
def test_packing_is_undone_and_as_documented(inputs: int) -> None:
    q = torch.randint(0, 16, (3, inputs), dtype=torch.uint8)
    words = packed(q)
    whole = unpacked(words)
    assert torch.equal(whole[:, :inputs], q)
    assert not whole[:, inputs:].any()
    for i, j, h in ((0, 0, 0), (3, 0, 1), (1, 1, 1)):
        if 32 * j + 2 * i + h < inputs:
            assert torch.equal((words[:, i] >> 4 * (4 * h + j)) & 15, q[:, 32 * j + 2 * i + h].int())


@pytest.mark.skipif(not PackedBfloat16Linear.available(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize(("rows", "out", "inputs", "groups"), [(1, 96, 256, 2), (5, 48, 192, 6), (40, 64, 192, 1)])
def test_products_of_processors_equal_the_reference(rows: int, out: int, inputs: int, groups: int) -> None:
    """Scales and weights are rounded to bfloat16 here and there. The last has groups that torch does not know."""
    torch.manual_seed(0)
    words = packed(torch.randint(0, 16, (out, inputs), dtype=torch.uint8))
    weight = Int4Weight(words, torch.rand(groups, out).half() + 0.5, torch.randint(0, 16, (groups, out)).short())
    x = torch.randn(rows, inputs)
    expected = ReferenceKernels().int4_linear(x, weight)
    error = (int4_product(weight, inputs, torch.bfloat16)(x.bfloat16()) - expected).norm() / expected.norm()
    assert error < 1e-2


def test_memory_is_that_of_four_bits() -> None:
    """What a stage holds, what its floor reads, and how layers are shared out all count packed bytes."""
    config = read_model(
        ModelArgs(path="shape:llama-2-7b", name="x", dtype="float16", load_format="dummy", quantization="int4")
    )
    bits = 8 * config.layer_bytes(2) / config.layer_parameters
    assert 4.24 < bits < 4.26
    assert config.num_parameters == read_config(Path("shape:llama-2-7b")).num_parameters
    (part,) = split_layers(config, 1)
    work = StageWork.of(config, part, torch.float16)
    assert work.weight_bytes == 32 * config.layer_bytes(2) + 2 * config.embedding_parameters
    dense = [stage.stop - stage.start for stage in split_layers(read_config(Path("shape:llama-2-7b")), 4)]
    assert [stage.stop - stage.start for stage in split_layers(config, 4)][-1] < dense[-1]  # its head counts for more


def test_made_up_weights_are_held_packed(tmp_path: Path) -> None:
    write(tmp_path, "awq", group_size=64, version="GEMM", zero_point=True)
    config = read_config(tmp_path)
    (part,) = split_layers(config, 1)
    tensors = DummyCheckpoint(config).tensors(part.tensor_names(config))
    decoder = Decoder(config, part, tensors, torch.float32, CPU, 64)
    w2 = decoder.layers[0].w2
    assert isinstance(w2, Int4Linear)
    (product,) = w2._products
    assert isinstance(product, partial)
    held = product.keywords["weight"]
    assert sum(t.nbytes for t in held) == sum(
        config.tensor_bytes(f"layers.0.feed_forward.w2.{part}", 4) for part in config.weight_parts
    )
    weight = ReferenceKernels().dequantize(held, config.hidden_dim, torch.float32)
    assert 0.5 < float(weight.std()) * config.dim**0.5 < 2.0  # so that sums stay as large as what they are of
    with pytest.raises(ValueError, match=r"model\.quantization: fp8: the checkpoint's layers are in 4 bits already"):
        Decoder(config, part, tensors, torch.float32, CPU, 64, fp8=float8_products(config))


def test_inspect_and_check_say_what_it_is(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    console = Console(file=StringIO(), width=150)
    console.print(inspect(tmp_path, 2, "float16", "auto"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 bits (GPTQ), groups of 64 inputs, by their own order (desc_act)" in shown
    assert "I32 (84 tensors)" in shown
    for quantization, words in (("fp8", "in 4 bits already"), ("none", None), ("int4", None)):
        args = ModelArgs(path=str(tmp_path), name="x", quantization=quantization)  # type: ignore[arg-type]
        if words is None:
            assert read_model(args).int4 is not None
            continue
        with pytest.raises(ValueError, match=words):
            read_model(args)
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(ValueError, match="give a checkpoint made by GPTQ or AWQ"):
        read_model(ModelArgs(path=str(tmp_path), name="x", quantization="int4"))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "gptq",
            {"bits": 3},
            r"gptq with bits = 3 is not supported: use a checkpoint quantised by GPTQ or AWQ in 4 bits",
        ),
        ("gptq", {"bits": None}, "bits, group_size = 64"),
        ("gptq", {"group_size": "64"}, "group_size = 64 .* of a wrong type"),
        ("gptq", {"group_size": 128}, r"group_size 128 must be -1 or a multiple of 32 that divides .*192, 320"),
        ("gptq", {"group_size": 16}, "group_size 16 must be"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format = marlin"),
        ("gptq", {"format": "bitblas"}, "checkpoint_format = bitblas"),
        ("gptq", {"dynamic": {"-:.*down.*": {}}}, "dynamic = "),
        ("gptq", {"lm_head": True}, "lm_head = True"),
        ("gptq", {"quant_method": "bitsandbytes"}, "quant_method = bitsandbytes is not supported: .*, or a GGUF"),
        ("awq", {"version": "gemv"}, "awq with version = gemv"),
        ("awq", {"zero_point": False}, "awq with zero_point = False"),
        ("awq", {"bits": 8}, "awq with bits = 8"),
    ],
)
def test_unsupported_options_are_named(method: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {"quant_method": method, "bits": 4, "group_size": 64}
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=options)
    assert read_config(tmp_path).int4 is not None
    change_config(tmp_path, quantization_config={**options, **change})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert "config.json" in str(caught.value)


Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    write(path, "gptq", group_size=64, sym=True, desc_act=True)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{Q_PROJ}.scales"),
            f"lacks the tensor {Q_PROJ}.scales: .*only some of its layers are in 4 bits",
        ),
        (lambda t: t.pop(f"{Q_PROJ}.g_idx"), f"lacks the tensor {Q_PROJ}.g_idx"),
        (
            lambda t: t.update({f"{Q_PROJ}.qweight": t[f"{Q_PROJ}.qweight"][1:]}),
            r"q_proj.qweight has the shape \(23, 192\)",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"][:2]}),
            r"q_proj.scales has the shape \(2, 192\)",
        ),
        (lambda t: t.update({f"{Q_PROJ}.qzeros": t[f"{Q_PROJ}.qzeros"].float()}), "q_proj.qzeros is stored as F32"),
        (lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].int()}), "q_proj.scales is stored as I32"),
        (
            lambda t: t[f"{Q_PROJ}.qzeros"].add_(0x11111111),
            "q_proj.qzeros has zeros that are not 8, .* should be gptq_v2",
        ),
        (lambda t: t[f"{Q_PROJ}.g_idx"].fill_(1), f"{Q_PROJ}.*: g_idx does not make groups of 64: it is damaged"),
        (lambda t: t[f"{Q_PROJ}.g_idx"].fill_(-7), "g_idx does not make groups"),
    ],
)
def test_a_damaged_part_is_named(
    change: Callable[[Tensors], object], message: str, whole: Path, tmp_path: Path
) -> None:
    tensors = load_file(whole / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    shutil.copy(whole / "config.json", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        list(checkpoint.tensors([f"layers.1.attention.wq.{part}" for part in checkpoint.config.weight_parts]))
    assert "model.safetensors" in str(caught.value)


def test_an_order_that_the_options_deny(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"g_idx has an order of its own: .*config\.json should say desc_act = true"
    ):
        list(checkpoint.tensors(all_names(checkpoint.config)))

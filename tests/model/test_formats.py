"""Every kind of model in every format it can be stored in: logits of transformers from the same weights.

The writers are not ours: transformers' own `save_pretrained`, `torch.save`, `gguf`'s writer; and for Meta's format a
re-statement of its layout row by row. Models are small copies of the real shapes: what matters is the ratio of heads.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention import prepare
from model.batch import Batch
from model.config import split_layers
from model.kernels import kernels_for
from model.kv_cache import KVCache
from model.llama import Decoder
from model.slots import Slots
from model.weights import open_checkpoint
from model.weights.sharded import write_shards
from tests.model.test_weights import GGUF_NAMES, HF_NAMES, meta_rows

CPU = torch.device("cpu")
TOKENS = [(7 * i * i + 3 * i + 1) % 120 for i in range(48)]
CONTEXT = len(TOKENS)

PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 120,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def rope(kind: str, **more: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


CODE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 16_384}
ROWS: dict[str, dict[str, Any]] = {
    "Llama 2 7B, 13B": {},
    "Llama 2 70B": {"hidden_size": 256, "num_attention_heads": 64, "num_key_value_heads": 8},
    "Code Llama 7B, 13B": CODE,
    "Code Llama 34B, 70B": {**CODE, "hidden_size": 256, "num_attention_heads": 64, "num_key_value_heads": 8},
    "linear": rope("linear", factor=4.0),
    "dynamic": {**rope("dynamic", factor=2.0), "max_position_embeddings": 32},
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "attention and mlp bias": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "head_dim": {"head_dim": 24, "num_key_value_heads": 2},
}
META_PARTS = {
    "Llama 2 7B, 13B": (1, 2, 8),
    "Llama 2 70B": (1, 8),
    "Code Llama 7B, 13B": (2,),
    "Code Llama 34B, 70B": (4,),
}
GGUF_ROWS = [row for row in ROWS if row != "dynamic"]


def make_llama(row: str, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{**PLAIN, **ROWS[row], **changes})).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:  # ones and zeros would hide a mix-up
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return llama


# -- writers ----------------------------------------------------------------------------------------------------------


def tensors_in_our_layout(llama: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, tensor): the rows of wq and wk, and of their biases, as Meta has them."""
    head_dim = llama.model.layers[0].self_attn.head_dim
    by_stem = {theirs: ours for ours, theirs in HF_NAMES.items()}
    for name, tensor in llama.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head" and llama.config.tie_word_embeddings:
            continue
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            ours = f"layers.{layer}.{by_stem[part]}"
        else:
            ours = by_stem[stem]
        rotary = ours.endswith(("wq", "wk"))
        yield f"{ours}.{kind}", meta_rows(tensor, head_dim) if rotary else tensor


def write_safetensors(llama: LlamaForCausalLM, path: Path) -> None:
    llama.save_pretrained(path)


def write_sharded_safetensors(llama: LlamaForCausalLM, path: Path) -> None:
    llama.save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1


def write_torch(llama: LlamaForCausalLM, path: Path) -> None:
    llama.config.architectures = ["LlamaForCausalLM"]
    llama.config.save_pretrained(path)
    torch.save(llama.state_dict(), path / "pytorch_model.bin")


def write_sharded_torch(llama: LlamaForCausalLM, path: Path) -> None:
    llama.config.architectures = ["LlamaForCausalLM"]
    llama.config.save_pretrained(path)
    names = list(llama.state_dict())
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: t.clone() for n, t in llama.state_dict().items() if files[n] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_meta(llama: LlamaForCausalLM, path: Path, parts: int) -> None:
    config = llama.config
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "multiple_of": config.intermediate_size,
        "ffn_dim_multiplier": 0.1,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if config.rope_parameters["rope_theta"] != 10000.0:
        params["rope_theta"] = config.rope_parameters["rope_theta"]
    (path / "params.json").write_text(json.dumps(params))
    content: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.zeros(4)} for _ in range(parts)]
    for name, tensor in tensors_in_our_layout(llama):
        if "norm" in name:
            pieces = [tensor.clone() for _ in range(parts)]
        else:
            by_column = name.endswith(("wo.weight", "w2.weight")) or name == "tok_embeddings.weight"
            pieces = [piece.clone() for piece in tensor.chunk(parts, 1 if by_column else 0)]
        for part, piece in zip(content, pieces, strict=True):
            part[name] = piece
    for i, part in enumerate(content):
        torch.save(part, path / f"consolidated.{i:02d}.pth")


def write_gguf(
    llama: LlamaForCausalLM,
    file: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    split: int = 0,
) -> None:
    """`kind` is for matrices of layers; `split`: tensors per file, 0 for one file."""
    config = llama.config
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=split)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = llama.model.layers[0].self_attn.head_dim
    if head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "llama3":  # as the converter does it: what transformers divides each frequency by
        plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        divisors = (plain / llama.model.rotary_emb.inv_freq).numpy()
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for name, tensor in tensors_in_our_layout(llama):
        stem, _, what = name.rpartition(".")
        layer = f"blk.{stem.split('.')[1]}." if stem.startswith("layers.") else ""
        stored = f"{layer}{GGUF_NAMES[stem.split('.', 2)[-1]]}.{what}"
        matrix = tensor.dim() == 2 and bool(layer)
        quantised = gguf.quants.quantize(tensor.numpy(), kind) if matrix else tensor.numpy()
        writer.add_tensor(stored, quantised, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- readers ----------------------------------------------------------------------------------------------------------


def our_logits(path: Path, stages: int) -> torch.Tensor:
    """[T, V] from a chain of stages, each of which reads only its own share."""
    checkpoint = open_checkpoint(path)
    config, n = checkpoint.config, len(TOKENS)
    batch = Batch.of_one(np.array(TOKENS, np.int32), n)
    metadata = prepare(batch, Slots(1, 1, n, 1, CPU), kernels_for(CPU), config.groups)
    x = torch.tensor(TOKENS)
    with torch.inference_mode():
        for part in split_layers(config, stages):
            tensors = iter(checkpoint.tensors(part.tensor_names(config)))
            decoder = Decoder(config, part, tensors, torch.float32, CPU, CONTEXT)
            assert decoder.num_parameters == part.num_parameters(config)
            x = decoder.embed(x) if part.is_first else x
            x = decoder.forward(x, KVCache(config, part.stop - part.start, 1, n, torch.float32, CPU), metadata)
    return decoder.logits(x)


def their_logits(llama: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = llama(torch.tensor([TOKENS])).logits[0]
    return logits


def assert_same_logits(path: Path, expected: torch.Tensor) -> None:
    for stages in (1, 2, 3, 4):
        error = (our_logits(path, stages) - expected).abs().max().item()
        assert error < 1e-4, f"{stages} stages: {error}"


WRITERS: dict[str, Callable[[LlamaForCausalLM, Path], None]] = {
    "safetensors": write_safetensors,
    "sharded safetensors": write_sharded_safetensors,
    "bin": write_torch,
    "sharded bin": write_sharded_torch,
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("writer", WRITERS)
def test_hugging_face(row: str, writer: str, tmp_path: Path) -> None:
    llama = make_llama(row)
    WRITERS[writer](llama, tmp_path)
    assert_same_logits(tmp_path, their_logits(llama))


@pytest.mark.parametrize(("row", "parts"), [(row, n) for row, counts in META_PARTS.items() for n in counts])
def test_meta(row: str, parts: int, tmp_path: Path) -> None:
    llama = make_llama(row)
    write_meta(llama, tmp_path, parts)
    assert_same_logits(tmp_path, their_logits(llama))


@pytest.mark.parametrize("row", GGUF_ROWS)
def test_gguf(row: str, tmp_path: Path) -> None:
    llama = make_llama(row)
    write_gguf(llama, tmp_path / "model.gguf")
    assert_same_logits(tmp_path / "model.gguf", their_logits(llama))


@pytest.mark.parametrize("by", ["first file", "directory"])
def test_split_gguf(by: str, tmp_path: Path) -> None:
    llama = make_llama("Llama 2 7B, 13B")
    write_gguf(llama, tmp_path / "model.gguf", split=10)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    assert_same_logits(files[0] if by == "first file" else tmp_path, their_logits(llama))


@pytest.mark.parametrize("row", ROWS)
def test_sharded_per_stage(row: str, tmp_path: Path) -> None:
    llama = make_llama(row)
    llama.save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    write_shards(tmp_path / "hf", checkpoint, split_layers(checkpoint.config, 3), tmp_path / "shards", None)
    assert open_checkpoint(tmp_path / "shards").config == checkpoint.config
    assert_same_logits(tmp_path / "shards", their_logits(llama))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_quantised_gguf_gives_the_logits_that_transformers_reads_from_it(kind: str, tmp_path: Path) -> None:
    llama = make_llama("Llama 2 70B")
    write_gguf(llama, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    assert_same_logits(tmp_path / "model.gguf", their_logits(theirs))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_give_the_logits_that_transformers_reads_from_them(kind: str, tmp_path: Path) -> None:
    """Nothing in Python writes K quants, so the blocks are random bytes with sane scales."""
    llama = make_llama("Llama 2 70B")
    file = tmp_path / "model.gguf"
    quantisation = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantisation]
    write_gguf(llama, file)
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for key, found in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, found.contents(), found.types[0])
    random = np.random.default_rng(0)
    halves = {"Q2_K": (40, 41), "Q3_K": (54,), "Q4_K": (0, 1), "Q5_K": (0, 1), "Q6_K": (104,)}[kind]  # of float16
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if len(shape) == 2 and shape[1] % block == 0 and tensor.name.startswith("blk."):
            data = random.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
            for half in halves:
                scale = np.float16((1e-4 if kind == "Q6_K" else 2e-3) / (1 if half == halves[0] else 2))
                data[..., 2 * half : 2 * half + 2] = np.frombuffer(scale.tobytes(), np.uint8)
            writer.add_tensor(tensor.name, data.reshape(shape[0], -1), raw_dtype=quantisation)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(tmp_path / "k.gguf").stored_type("layers.0.attention.wq.weight") == kind
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="k.gguf", dtype=torch.float32).eval()
    assert_same_logits(tmp_path / "k.gguf", their_logits(theirs))

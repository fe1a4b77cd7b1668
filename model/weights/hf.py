"""Hugging Face checkpoints: config.json beside one safetensors file or several with an index."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.weights import CheckpointError, check_shape, tensor_shape

if TYPE_CHECKING:
    import torch

OUTER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
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
UNSUPPORTED = ("attention_bias", "mlp_bias", "quantization_config")
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes, by safetensors' names
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint. Raises `CheckpointError` naming the file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_config(path: Path) -> ModelConfig:
    """The model's shape from config.json. Raises `CheckpointError` for what is not a plain Llama."""
    raw = read_json(path / "config.json")
    if "LlamaForCausalLM" not in (raw.get("architectures") or []):
        raise CheckpointError(f"{path}/config.json: architectures is {raw.get('architectures')}, not LlamaForCausalLM")
    for key in UNSUPPORTED:
        if raw.get(key):
            raise CheckpointError(f"{path}/config.json: {key} = {raw[key]} is not supported yet")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}/config.json: hidden_act = {raw['hidden_act']} is not supported, only silu is")
    rope = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):  # before transformers 5, and since
        given = raw.get(key) or {}
        if not isinstance(given, dict) or given.get("rope_type", given.get("type", "default")) != "default":
            raise CheckpointError(f"{path}/config.json: {key} = {given} is not supported yet")
        rope |= given
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            dim=raw["hidden_size"],
            n_layers=raw["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            hidden_dim=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope["rope_theta"] or 10000.0,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}/config.json lacks {error}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}/config.json: {error}") from error


class HFCheckpoint:
    """See `model.weights.Checkpoint`. Tensors keep the type they are stored as."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path = path
        self.config = config
        self._files = self._index()

    def _index(self) -> dict[str, Path]:
        """File of each stored tensor."""
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{self.path / INDEX} has no weight_map: it is damaged")
            files = {name: self.path / file for name, file in weight_map.items()}
            missing = sorted({str(f) for f in files.values() if not f.is_file()})
            if missing:
                raise CheckpointError(f"{self.path / INDEX} names files that are not there: {', '.join(missing)}")
            return files
        file = self.path / SINGLE
        if not file.is_file():
            raise CheckpointError(f"{self.path} holds neither {SINGLE} nor {INDEX}")
        with _opened(file, "np") as stored:
            return dict.fromkeys(stored.keys(), file)

    def nbytes(self, names: Sequence[str]) -> int:
        total = 0
        for name in names:
            stored_name, file = self._find(name)
            with _opened(file, "np") as stored:
                total += self._checked_size(name, stored_name, file, stored)
        return total

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        for name in names:
            stored_name, file = self._find(name)
            with _opened(file, "pt") as stored:
                self._checked_size(name, stored_name, file, stored)
                tensor = stored.get_tensor(stored_name)
            if name.endswith(("attention.wq.weight", "attention.wk.weight")):
                tensor = interleave_rotary(tensor, self.config.head_dim)
            yield name, tensor

    def _checked_size(self, name: str, stored_name: str, file: Path, stored: Any) -> int:
        """Bytes of one tensor of an opened file, after a look at its type and shape."""
        if stored_name not in stored.keys():  # noqa: SIM118 - not a dict
            raise CheckpointError(f"{file} lacks the tensor {stored_name}, though {INDEX} says that it is there")
        part = stored.get_slice(stored_name)
        check_shape(file, stored_name, tuple(part.get_shape()), tensor_shape(self.config, name))
        if part.get_dtype() not in ITEM_SIZES:
            raise CheckpointError(f"{file}: tensor {stored_name} is stored as {part.get_dtype()}: not supported yet")
        return ITEM_SIZES[part.get_dtype()] * math.prod(tensor_shape(self.config, name))

    def _find(self, name: str) -> tuple[str, Path]:
        if name.startswith("layers."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            stored_name = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
        else:
            stored_name = OUTER_NAMES[name]
        if stored_name not in self._files:
            raise CheckpointError(f"{self.path} lacks the tensor {stored_name}: it is damaged or not a whole model")
        return stored_name, self._files[stored_name]


@contextmanager
def _opened(file: Path, framework: str) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one. Raises `CheckpointError` if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework=framework) as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it is damaged or truncated") from error


def interleave_rotary(weight: "torch.Tensor", head_dim: int) -> "torch.Tensor":
    """Rows of wq or wk from Hugging Face's order (first halves of all rotary pairs, then second halves) to Meta's.

    weight: [heads * D, C]. transformers' converter does the opposite when it reads Meta's files.
    """
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)

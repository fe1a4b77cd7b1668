"""Checkpoints cut into one file per stage, as `caravan shard` writes them.

    manifest.json              the model's shape; for each stage its file, layers, and its tensors with type and sha256
    stage-0-of-2.safetensors   tensors under our names, in our layout
    tokenizer.* ...            whatever the gateway needs

A node needs the manifest and the files of its own stages. Every tensor is checked against its sha256 when it is read.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import PART_BYTES, Int4Layout, ModelConfig, RopeScaling, StageLayers
from model.errors import CheckpointError
from model.weights import MANIFEST, Checkpoint, check_shape, find_gguf, member
from model.weights.hf import read_text

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "caravan-shards", 1
COMPANIONS = (  # what a gateway or `read_config` may want of a checkpoint beside its weights
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
STORED_SIZES = {**ITEM_SIZES, "int32": 4, "int16": 2}  # with what weights in 4 bits are made of


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What the manifest says of one tensor."""

    dtype: str
    sha256: str


@dataclass(frozen=True, slots=True)
class StageFile:
    """What the manifest says of one stage's file."""

    file: str
    layers: tuple[int, int]  # [start, stop)
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of it."""

    config: ModelConfig
    stages: tuple[StageFile, ...]


def read_manifest(path: Path) -> Manifest:
    """Raises `CheckpointError` if it is damaged or newer than this code."""
    file = path / MANIFEST
    try:
        raw = json.loads(read_text(file))
        if (raw["format"], raw["version"]) != (FORMAT, VERSION):
            raise CheckpointError(f"{file} is not of {FORMAT} version {VERSION}: shard the checkpoint again")
        scaling = raw["config"].pop("rope_scaling")
        if scaling is not None:
            scaling = RopeScaling(**{**scaling, "divisors": tuple(scaling["divisors"])})
        int4 = raw["config"].pop("int4", None)
        stages = tuple(
            StageFile(
                str(member(path, stage["file"], file).relative_to(path)),
                (int(stage["layers"][0]), int(stage["layers"][1])),
                {name: _stored_tensor(**entry) for name, entry in stage["tensors"].items()},
            )
            for stage in raw["stages"]
        )
        layout = Int4Layout(**int4) if int4 is not None else None
        return Manifest(ModelConfig(**raw["config"], rope_scaling=scaling, int4=layout), stages)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}: {error}): shard again, or copy it"
        ) from error


def _stored_tensor(dtype: Any, sha256: Any) -> StoredTensor:
    if dtype not in STORED_SIZES or not isinstance(sha256, str):
        raise TypeError(f"a tensor of type {dtype!r} with the sum {sha256!r}")
    return StoredTensor(dtype, sha256)


class ShardedCheckpoint:
    """See `model.weights.Checkpoint`. Files of other stages need not be there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self.config = self._manifest.config

    def nbytes(self, names: Sequence[str]) -> int:
        return sum(
            math.prod(self.config.tensor_shape(name)) * STORED_SIZES[self._find(name)[1].dtype] for name in names
        )

    def stored_type(self, name: str) -> str:
        return self._find(name)[1].dtype

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        for name in names:
            yield name, self._read(name)

    def _read(self, name: str) -> "torch.Tensor":
        from model.weights.hf import opened_safetensors

        file, entry = self._find(name)
        with opened_safetensors(file) as stored:
            if name not in stored:
                raise CheckpointError(f"{file} lacks the tensor {name}: it is damaged; copy it again")
            check_shape(file, name, stored.shape(name), self.config.tensor_shape(name))
            tensor = stored.get(name)
        if sha256(tensor) != entry.sha256:
            raise CheckpointError(f"{file}: tensor {name} does not match its sha256: it is damaged; copy it again")
        return tensor

    def _find(self, name: str) -> tuple[Path, StoredTensor]:
        """A tied embedding may be in two files."""
        holders = [stage for stage in self._manifest.stages if name in stage.tensors]
        if not holders:
            raise CheckpointError(f"{self.path}/{MANIFEST} lacks the tensor {name}: it is damaged; shard again")
        for stage in holders:
            if (self.path / stage.file).is_file():
                return self.path / stage.file, stage.tensors[name]
        start, stop = holders[0].layers
        raise CheckpointError(
            f"{self.path} on this node lacks {holders[0].file} with layers {start}-{stop - 1}: copy it there, or set "
            f"pipeline.stages: {len(self._manifest.stages)} and the split that the checkpoint was made for"
        )


def sha256(tensor: "torch.Tensor") -> str:
    """Of the tensor's bytes."""
    import torch

    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def write_shards(
    source: Path,
    checkpoint: Checkpoint,
    stages: Sequence[StageLayers],
    out: Path,
    dtype: "torch.dtype | None",
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one file per stage, the manifest and what the gateway needs to the directory `out`.

    `dtype` None keeps the stored types; weights in 4 bits stay as they are. `on_bytes` gets the bytes of each tensor
    written. Holds one stage in memory. Raises `CheckpointError` if there is no room, or `out` is in use already.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty: give a new directory")
    out.mkdir(parents=True, exist_ok=True)
    _check_room(checkpoint, stages, out, dtype)
    entries = [
        _write_stage(checkpoint, stage, out, f"stage-{i}-of-{len(stages)}.safetensors", dtype, on_bytes)
        for i, stage in enumerate(stages)
    ]
    _copy_companions(source, out)
    content = {"format": FORMAT, "version": VERSION, "config": asdict(checkpoint.config), "stages": entries}
    (out / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", "utf-8")  # last: without it nothing is there


def stage_bytes(checkpoint: Checkpoint, names: Sequence[str], dtype: "torch.dtype | None") -> int:
    """Bytes of these tensors once written."""
    total = 0
    for name in names:
        stored = checkpoint.stored_type(name).lower()
        size = ITEM_SIZES.get({"bf16": "bfloat16", "f16": "float16"}.get(stored, stored), 4)  # else read as float32
        total += checkpoint.config.tensor_bytes(name, dtype.itemsize if dtype is not None else size)
    return total


def _check_room(checkpoint: Checkpoint, stages: Sequence[StageLayers], out: Path, dtype: "torch.dtype | None") -> None:
    names = [name for stage in stages for name in stage.tensor_names(checkpoint.config)]
    needed = stage_bytes(checkpoint, names, dtype)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CheckpointError(
            f"{out} has {free / 1e9:.1f} GB free, the shards need {needed / 1e9:.1f} GB: give another place"
        )


def _write_stage(
    checkpoint: Checkpoint,
    stage: StageLayers,
    out: Path,
    file: str,
    dtype: "torch.dtype | None",
    on_bytes: Callable[[int], None],
) -> dict[str, Any]:
    """One stage's file; returns its entry in the manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.tensors(stage.tensor_names(checkpoint.config)):
        keeps = dtype is None or name.rpartition(".")[2] in PART_BYTES
        tensors[name] = tensor.to(tensor.dtype if keeps else dtype, copy=True).contiguous()
        on_bytes(tensors[name].nbytes)
    partial = out / f"{file}.partial"
    try:
        save_file(tensors, partial)
        partial.chmod(0o644)  # the library makes it private
        os.replace(partial, out / file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{out / file} cannot be written ({error}): is the disk full?") from error
    entries = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "sha256": sha256(tensor)}
        for name, tensor in tensors.items()
    }
    return {"file": file, "layers": [stage.start, stage.stop], "tensors": entries}


def _copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, template and the like: the files, or what is inside a GGUF."""
    gguf_file = find_gguf(source)
    if gguf_file is not None:
        from model.weights.gguf import write_tokenizer

        return write_tokenizer(gguf_file, out / "tokenizer.gguf")
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)

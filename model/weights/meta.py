"""Meta's own checkpoints: params.json beside consolidated.00.pth, .01.pth ..., one for each model-parallel part.

The parts are cut as Meta's layers are: columns (wq wk wv w1 w3 output) by rows of the weight, rows (wo w2) by columns,
the embedding by columns (Llama 2, Code Llama) or rows, norms whole in each. Names and layout are ours already.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import CODE_LLAMA_THETA, ModelConfig
from model.errors import CheckpointError
from model.weights import check_shape
from model.weights.hf import read_text

if TYPE_CHECKING:
    import torch

MOST_PARTS = 1024
LLAMA_2_CONTEXT, CODE_LLAMA_TRAINED_CONTEXT = 4096, 16_384  # params.json does not say


def read_config(path: Path) -> ModelConfig:
    """The model's shape from params.json, as Meta's code derives it. Raises `CheckpointError`."""
    file = path / "params.json"
    try:
        raw = json.loads(read_text(file))
        dim, heads = raw["dim"], raw["n_heads"]
        theta = float(raw.get("rope_theta", 10000.0))
        return ModelConfig(
            dim=dim,
            n_layers=raw["n_layers"],
            n_heads=heads,
            n_kv_heads=raw.get("n_kv_heads") or heads,
            head_dim=dim // heads,
            hidden_dim=hidden_dim(dim, raw.get("multiple_of", 256), raw.get("ffn_dim_multiplier")),
            vocab_size=_vocab_size(path, raw),
            norm_eps=raw.get("norm_eps", 1e-5),
            rope_theta=theta,
            max_position_embeddings=CODE_LLAMA_TRAINED_CONTEXT if theta >= CODE_LLAMA_THETA else LLAMA_2_CONTEXT,
            tie_word_embeddings=False,
        )
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}") from error
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} cannot be used: {error}") from error


def hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer (llama/model.py of Meta's release): 8/3 dim, scaled, rounded up."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _vocab_size(path: Path, raw: dict[str, Any]) -> int:
    """Llama 2's files say -1: the tokenizer beside them decides."""
    size = raw.get("vocab_size", -1)
    if size > 0:
        return int(size)
    tokenizer = path / "tokenizer.model"
    if not tokenizer.is_file():
        raise CheckpointError(f"{path}/params.json gives no vocab_size: put the model's tokenizer.model beside it")
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(tokenizer)).vocab_size())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{tokenizer} cannot be read as a sentencepiece model: {error}") from error


class MetaCheckpoint:
    """See `model.weights.Checkpoint`. The parts are mapped into memory; what is joined is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        found = {int(m[1]): f for f in path.iterdir() if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", f.name))}
        if not found:
            raise CheckpointError(f"{path} holds params.json but no consolidated.00.pth: copy the weights there")
        if max(found) >= MOST_PARTS:
            raise CheckpointError(f"{path} holds {found[max(found)].name}: no checkpoint has so many parts")
        missing = [i for i in range(max(found) + 1) if i not in found]
        if missing:
            names = ", ".join(f"consolidated.{i:02d}.pth" for i in missing)
            raise CheckpointError(f"{path} lacks {names}: copy all parts of the checkpoint there")
        self.files = [found[i] for i in range(len(found))]

    def nbytes(self, names: Sequence[str]) -> int:
        from model.weights.torch_file import item_size

        parts = self._open()
        sizes = [item_size(self.files[0], name, self._find(name, parts)[0]) for name in names]
        return sum(size * math.prod(self.config.tensor_shape(name)) for size, name in zip(sizes, names, strict=True))

    def stored_type(self, name: str) -> str:
        return str(self._find(name, self._open())[0].dtype).removeprefix("torch.")

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        for _, group in groupby(names, key=lambda name: name.split(".")[:2]):
            parts = self._open()  # anew for each layer, so that the pages read for the last one are let go of
            for name in group:
                yield name, self._joined(name, parts)

    def _open(self) -> "list[dict[str, torch.Tensor]]":
        from model.weights.torch_file import open_torch_file

        return [open_torch_file(file) for file in self.files]

    def _joined(self, name: str, parts: "list[dict[str, torch.Tensor]]") -> "torch.Tensor":
        import torch

        tensors = self._find(name, parts)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, self._axis(name, tensors[0]))

    def _find(self, name: str, parts: "list[dict[str, torch.Tensor]]") -> "list[torch.Tensor]":
        """What the parts hold of a tensor: one tensor if each holds the whole."""
        from model.weights.torch_file import item_size

        for file, part in zip(self.files, parts, strict=True):
            if name not in part:
                raise CheckpointError(f"{file} lacks the tensor {name}: it is damaged or not a whole model")
            item_size(file, name, part[name])
        tensors = [part[name] for part in parts]
        expected = self.config.tensor_shape(name)
        if len(expected) == 1:
            check_shape(self.files[0], name, tuple(tensors[0].shape), expected)
            return tensors[:1]
        axis, n = self._axis(name, tensors[0]), len(parts)
        share = tuple(size // n if i == axis else size for i, size in enumerate(expected))
        for file, tensor in zip(self.files, tensors, strict=True):
            if tuple(tensor.shape) != share:
                raise CheckpointError(
                    f"{file}: tensor {name} has the shape {tuple(tensor.shape)}, but {n} of {n} parts of {expected} "
                    f"need {share}: a part is missing, or belongs to another model"
                )
        return tensors

    def _axis(self, name: str, part: "torch.Tensor") -> int:
        """Along which the parts of a matrix are joined."""
        if name == "tok_embeddings.weight":  # columns in Llama 2, rows of the vocabulary in later releases
            return 0 if part.shape[1] == self.config.dim and len(self.files) > 1 else 1
        return 1 if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0

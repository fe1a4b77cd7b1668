"""A checkpoint with an adapter in its weights, for whoever wants no adapter at run time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from model.adapters import Adapter, AdapterError
from model.weights import Checkpoint

if TYPE_CHECKING:
    import torch


class MergedCheckpoint:
    """See `Checkpoint`: W + B A where the adapter has both. Raises `AdapterError` for a base in 4 bits."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        if base.config.int4 is not None:
            raise AdapterError("the base is in 4 bits, where nothing can be added: merge into the model it was made of")
        self.config, self._base, self._adapter = base.config, base, adapter

    def nbytes(self, names: Sequence[str]) -> int:
        return self._base.nbytes(names)

    def stored_type(self, name: str) -> str:
        return self._base.stored_type(name)

    def tensors(self, names: Sequence[str]) -> "Iterator[tuple[str, torch.Tensor]]":
        """In the type that the base has them in: added in float32, rounded once."""
        for name, tensor in self._base.tensors(names):
            stem = name.removesuffix(".weight")
            if self._adapter.ranks.get(stem):
                added = self._adapter.matrices(stem)
                tensor = (tensor.float() + (added.b @ added.a).to(tensor.device)).to(tensor.dtype)
            yield name, tensor

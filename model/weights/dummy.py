"""Random weights of any shape: for capacity tests, and for tests that need no trained model."""

import zlib
from collections.abc import Iterator, Sequence

import torch

from model.config import ModelConfig

CPU = torch.device("cpu")


class DummyCheckpoint:
    """A checkpoint whose every tensor is a function of its name and `seed`, so that stages agree without a file."""

    def __init__(self, config: ModelConfig, seed: int = 0, device: torch.device = CPU) -> None:
        self.config = config
        self.seed = seed
        self.device = device

    def nbytes(self, names: Sequence[str]) -> int:
        """Nothing is read from disk."""
        return 0

    def stored_type(self, name: str) -> str:
        return "none"

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, float32 tensor) in the order of `names`."""
        for name in names:
            generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
            shape = self.config.tensor_shape(name)
            values = torch.randn(shape, generator=generator, device=self.device)
            yield name, values.abs() if len(shape) == 1 else values * shape[-1] ** -0.5

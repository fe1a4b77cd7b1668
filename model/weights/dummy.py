"""Random weights of any shape: for capacity tests, and for tests that need no trained model."""

import math
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
        """Yield (name, tensor) in the order of `names`, float32 but for weights in 4 bits."""
        for name in names:
            generator = torch.Generator(self.device).manual_seed(self.seed + zlib.crc32(name.encode()))
            yield name, self._made(name, generator)

    def _made(self, name: str, generator: torch.Generator) -> torch.Tensor:
        shape, part = self.config.tensor_shape(name), name.rpartition(".")[2]
        if part == "qweight":
            return torch.randint(-(2**31), 2**31, shape, generator=generator, device=self.device, dtype=torch.int32)
        if part == "zeros":
            return torch.full(shape, 8, dtype=torch.int16, device=self.device)
        values: torch.Tensor = torch.randn(shape, generator=generator, device=self.device)
        if part == "scales":  # q - 8 is spread over 4.6
            return (values.abs().clamp(0.5, 2.0) / (4.6 * math.sqrt(self.config.dim))).half()
        return values.abs() if len(shape) == 1 else values.mul_(math.sqrt(1 / shape[-1]))

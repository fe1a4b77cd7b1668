"""Random weights of any shape: for capacity tests, and for tests that need no trained model."""

import zlib
from collections.abc import Iterator, Sequence

import torch

from model.config import ModelConfig


class DummyCheckpoint:
    """A checkpoint whose every tensor is a function of its name and `seed`, so that stages agree without a file."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    def nbytes(self, names: Sequence[str]) -> int:
        """Nothing is read from disk."""
        return 0

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, float32 tensor) in the order of `names`."""
        for name in names:
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            shape = self._shape(name)
            values = torch.randn(shape, generator=generator)
            yield name, values.abs() if len(shape) == 1 else values * shape[-1] ** -0.5

    def _shape(self, name: str) -> tuple[int, ...]:
        c = self.config
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        if name in ("tok_embeddings.weight", "output.weight"):
            return c.vocab_size, c.dim
        return {
            "attention.wq": (q, c.dim),
            "attention.wk": (kv, c.dim),
            "attention.wv": (kv, c.dim),
            "attention.wo": (c.dim, q),
            "feed_forward.w1": (c.hidden_dim, c.dim),
            "feed_forward.w2": (c.dim, c.hidden_dim),
            "feed_forward.w3": (c.hidden_dim, c.dim),
        }.get(name.split(".", 2)[-1].removesuffix(".weight"), (c.dim,))

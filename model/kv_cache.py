"""The paged KV cache of one stage.

Legend: N blocks, B tokens per block, K KV heads, D head dim, T tokens.
"""

import torch

from model.config import ModelConfig


class KVCache:
    """Keys and values of this stage's layers, [N, B, K, D] each; which block belongs to whom is decided elsewhere."""

    def __init__(
        self,
        config: ModelConfig,
        n_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_layers, num_blocks, block_size, config.n_kv_heads, config.head_dim)
        self.block_size = block_size
        # Zeros, not garbage: a masked position still multiplies its value by 0, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device).unbind(0)
        self.v = torch.zeros(shape, dtype=dtype, device=device).unbind(0)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store k and v, [T, K, D], at slots [T] (block * B + offset) of this stage's layer number `layer`."""
        self.k[layer].flatten(0, 1).index_copy_(0, slot_mapping, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slot_mapping, v)

    @staticmethod
    def bytes_per_block(config: ModelConfig, n_layers: int, block_size: int, dtype: torch.dtype) -> int:
        """Memory of one block over all layers of a stage, in bytes."""
        return 2 * n_layers * block_size * config.n_kv_heads * config.head_dim * dtype.itemsize

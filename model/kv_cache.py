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
        # One block more than anybody owns: rows that pad a captured batch write there.
        shape = (n_layers, num_blocks + 1, block_size, config.n_kv_heads, config.head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Zeros, not garbage: a masked position still multiplies its value by 0, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device).unbind(0)
        self.v = torch.zeros(shape, dtype=dtype, device=device).unbind(0)

    @staticmethod
    def bytes_per_block(config: ModelConfig, n_layers: int, block_size: int, dtype: torch.dtype) -> int:
        """Memory of one block over all layers of a stage, in bytes."""
        return 2 * n_layers * block_size * config.n_kv_heads * config.head_dim * dtype.itemsize

"""The paged KV cache of one stage.

Legend: N blocks, B tokens per block, K KV heads, D head dim, T tokens.
"""

import torch

from model.config import ModelConfig
from model.kernels import Cache, Quantized

FLOAT8 = torch.float8_e4m3fn
SCALE_BYTES = 4


class KVCache:
    """Keys and values of this stage's layers, [N, B, K, D] each; which block belongs to whom is decided elsewhere.

    With `dtype` FLOAT8 every token's head has a scale of its own, computed when it is written.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # One block more than anybody owns: tokens that pad a captured batch write there.
        shape = (n_layers, num_blocks + 1, block_size, config.n_kv_heads, config.head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.token_bytes = KVCache.bytes_per_block(config, 1, 1, dtype)  # of one layer
        self.block_bytes = KVCache.bytes_per_block(config, n_layers, block_size, dtype)
        self.num_bytes = (num_blocks + 1) * KVCache.bytes_per_block(config, n_layers, block_size, dtype)
        self.storages: list[torch.Tensor] = []  # all there is, each [layers, N, ...]
        self.k = _layers(shape, dtype, device, self.storages)
        self.v = _layers(shape, dtype, device, self.storages)

    @staticmethod
    def bytes_per_block(config: ModelConfig, n_layers: int, block_size: int, dtype: torch.dtype) -> int:
        """Memory of one block over all layers of a stage, in bytes."""
        per_head = config.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == FLOAT8 else 0)
        return 2 * n_layers * block_size * config.n_kv_heads * per_head


def _layers(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, storages: list[torch.Tensor]
) -> list[Cache]:
    """One per layer. Zeros, not garbage: a masked position still multiplies its value by 0, and 0 * NaN is NaN."""
    values = torch.zeros(shape, dtype=dtype, device=device)
    storages.append(values)
    if dtype != FLOAT8:
        return list(values.unbind(0))
    layers, blocks, block_size, kv_heads, _ = shape
    # A head's scales of one block lie side by side, as a kernel that reads one head wants them.
    scales = torch.zeros(layers, blocks, kv_heads, block_size, 1, device=device)
    storages.append(scales)
    pairs = zip(values.unbind(0), scales.transpose(2, 3).unbind(0), strict=True)
    return [Quantized(*pair) for pair in pairs]

"""Decode steps as CUDA graphs: one launch instead of several hundred.

Legend: S sequences, W blocks per table, C model dim, V vocabulary.

A graph is captured per bucket of batch sizes, over buffers that stay where they are. A smaller batch is padded with
rows that attend to nothing and write to a block nobody owns. Nothing that waits for another process is ever captured.
"""

from collections.abc import Callable
from typing import Any

import torch

from model.attention import AttentionMetadata
from model.kv_cache import KVCache
from model.llama import Decoder


def buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8 up to 256, then every 32."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 32, 32)]
    return [n for n in sizes if n < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """All decode steps of one stage. The output of a step is overwritten by the next."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        max_num_seqs: int,
        max_blocks: int,
        on_capture: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._decoder, self._kv = decoder, kv

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=decoder.device)

        n, width = max_num_seqs, decoder.config.dim
        self._token_ids, self._positions, self._slots, self._lens = zeros(n), zeros(n), zeros(n), zeros(n)
        self._tables = zeros(n, max_blocks)
        self._hidden = torch.zeros(n, width, dtype=decoder.dtype, device=decoder.device)
        self._padding_slot = kv.num_blocks * kv.block_size
        self._slots.fill_(self._padding_slot)
        self._sizes = buckets(max_num_seqs)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool = torch.cuda.graph_pool_handle()
        for done, size in enumerate(reversed(self._sizes)):  # the largest first: the others share its memory
            self._graphs[size] = self._capture(size, pool)
            on_capture(done + 1, len(self._sizes))

    def run(self, token_ids: torch.Tensor | None, hidden: torch.Tensor | None, m: AttentionMetadata) -> torch.Tensor:
        """token_ids [S] on the first stage, hidden [S, C] on the others -> hidden [S, C], on the last logits [S, V]."""
        n = m.num_decodes
        size = next(bucket for bucket in self._sizes if bucket >= n)
        if token_ids is not None:
            self._token_ids[:n].copy_(token_ids)
        elif hidden is not None:
            self._hidden[:n].copy_(hidden)
        self._positions[:n].copy_(m.positions)
        self._slots[:n].copy_(m.slot_mapping)
        self._lens[:n].copy_(m.context_lens)
        self._tables[:n, : m.block_tables.shape[1]].copy_(m.block_tables)
        if n < size:
            self._slots[n:size].fill_(self._padding_slot)
            self._lens[n:size].zero_()
            self._positions[n:size].zero_()
        graph, out = self._graphs[size]
        graph.replay()
        return out[:n]

    def _capture(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._step(size)  # compiles kernels and fills library caches outside the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = self._step(size)
        return graph, out

    def _step(self, size: int) -> torch.Tensor:
        decoder = self._decoder
        metadata = AttentionMetadata(
            positions=self._positions[:size],
            slot_mapping=self._slots[:size],
            sample_tokens=self._positions[:0],
            block_tables=self._tables[:size],
            context_lens=self._lens[:size],
            prefill=None,
        )
        x = decoder.embed(self._token_ids[:size]) if decoder.stage.is_first else self._hidden[:size].clone()
        x = decoder.forward(x, self._kv, metadata)
        return decoder.logits(x) if decoder.stage.is_last else x

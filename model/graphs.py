"""Steps as CUDA graphs: one launch instead of several hundred, which take the host longer than a small step the GPU.

Legend: S sequences, W blocks per table, C model dim, V vocabulary.

A graph is captured per bucket of batch sizes, over buffers that stay where they are. A smaller batch is padded with
rows that attend to nothing and write to a block nobody owns. Nothing that waits for another process is ever captured.

All that a graph knows is sequences that compute one token each. Pieces of prompts are taken apart into such: their
tokens read the same keys again and again, but from the GPU's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.attention import AttentionMetadata
from model.batch import Batch
from model.kernels import DecodeInputs, packed_size
from model.kv_cache import KVCache
from model.llama import Decoder

MIXED_TOKENS = 512  # of a step with pieces of prompts: a larger one takes the GPU longer than the host
READ_AGAIN_BYTES = 2**30  # keys and values of a layer that tokens of prompts read at most, one by one


def buckets(max_num_seqs: int, max_num_batched_tokens: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8 up to 256, then every 32. More than can decode: fewer."""
    most = max(max_num_seqs, min(max_num_batched_tokens, MIXED_TOKENS))
    decode = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs, 32)]
    mixed = [16, 32, 48, *range(64, most, 64)]
    few, many = (n for n in decode if n < max_num_seqs), (n for n in mixed if max_num_seqs < n < most)
    return sorted({*few, max_num_seqs, *many, most})


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step computed; overwritten by the next."""

    out: torch.Tensor  # hidden [S, C], on the last stage logits [S, V]
    likeliest: torch.Tensor | None  # [S] on the last stage


class StepGraphs:
    """The steps of one stage that are small enough.

    `newest` [slots + 1] is where the newest token of each sequence is kept, read by the first stage and, where it is
    the last one too, written with the likeliest token; its last entry is for padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        newest: torch.Tensor,
        max_num_batched_tokens: int,
        on_capture: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._decoder, self._kv, self._newest = decoder, kv, newest
        self._sizes = buckets(len(newest) - 1, max_num_batched_tokens)
        n, max_blocks = self._sizes[-1], -(-len(decoder.rotary) // kv.block_size)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=decoder.device)

        self._inputs = DecodeInputs(zeros(n), zeros(n), zeros(n), zeros(n), zeros(n), zeros(n, max_blocks))
        self._packed = torch.zeros(packed_size(n, max_blocks), dtype=torch.int32, device=decoder.device)
        self._hidden = torch.zeros(n, decoder.config.dim, dtype=decoder.dtype, device=decoder.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Decoded]] = {}
        pool = torch.cuda.graph_pool_handle()
        for done, size in enumerate(reversed(self._sizes)):  # the largest first: the others share its memory
            self._graphs[size] = self._capture(size, pool)
            on_capture(done + 1, len(self._sizes))

    def take(self, batch: Batch) -> bool:
        """Whether this step is one of them."""
        if batch.prompt_rows or batch.num_tokens > self._sizes[-1]:
            return False
        return tokens_read_again(batch) * self._kv.token_bytes <= READ_AGAIN_BYTES

    def one_by_one(self, batch: Batch) -> Batch:
        """The form of `batch` that `run` takes."""
        return batch.one_by_one(len(self._newest) - 1)

    def run(self, batch: Batch, hidden: torch.Tensor | None) -> Decoded:
        """One step of sequences that compute one token each; hidden [S, C] on all stages but the first."""
        n = batch.num_seqs
        packed = packed_decodes(batch)
        self._packed[: len(packed)].copy_(packed, non_blocking=True)
        if hidden is not None:
            self._hidden[:n].copy_(hidden)
        graph, done = self._graphs[next(size for size in self._sizes if size >= n)]
        graph.replay()
        return Decoded(done.out[:n], done.likeliest[:n] if done.likeliest is not None else None)

    def _capture(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Decoded]:
        self._step(size)  # compiles kernels and fills library caches outside the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            done = self._step(size)
        return graph, done

    def _step(self, size: int) -> Decoded:
        decoder, all_ = self._decoder, self._inputs
        inputs = DecodeInputs(
            all_.token_ids[:size], all_.positions[:size], all_.slot_mapping[:size], all_.context_lens[:size],
            all_.seq_slots[:size], all_.block_tables[:size],
        )  # fmt: skip
        padding_slot = self._kv.num_blocks * self._kv.block_size
        decoder.kernels.unpack_decodes(self._packed, self._newest, inputs, self._kv.block_size, padding_slot)
        metadata = AttentionMetadata(
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            sample_tokens=inputs.positions[:0],
            block_tables=inputs.block_tables,
            context_lens=inputs.context_lens,
            prefill=None,
        )
        x = decoder.embed(inputs.token_ids) if decoder.stage.is_first else self._hidden[:size].clone()
        x = decoder.forward(x, self._kv, metadata)
        if not decoder.stage.is_last:
            return Decoded(x, None)
        logits = decoder.logits(x)
        likeliest = logits.argmax(dim=-1)
        if decoder.stage.is_first:
            self._newest[inputs.seq_slots] = likeliest
        return Decoded(logits, likeliest)


def tokens_read_again(batch: Batch) -> int:
    """How many keys the tokens of prompts attend to, each for itself."""
    many = batch.query_lens > 1
    before, now = batch.num_computed_tokens[many].astype(np.int64), batch.query_lens[many].astype(np.int64)
    return int((now * before + now * (now + 1) // 2).sum())


def packed_decodes(batch: Batch) -> torch.Tensor:
    """The batch as `Kernels.unpack_decodes` takes it, in pinned memory where there is a GPU."""
    width = len(batch.block_tables) // batch.num_seqs
    size = packed_size(batch.num_seqs, width)
    packed = torch.empty(size, dtype=torch.int32, pin_memory=torch.cuda.is_available())
    head = np.array([batch.num_seqs, width], np.int32)
    parts = head, batch.token_ids, batch.num_computed_tokens, batch.slots, batch.block_tables
    np.concatenate(parts, out=packed.numpy())
    return packed

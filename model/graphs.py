"""Steps as CUDA graphs: one launch instead of several hundred, which take the host longer than a small step the GPU.

Legend: T tokens, P pieces, C model dim, V vocabulary.

A graph is captured per bucket of token counts, over buffers that stay where they are. A smaller step is padded with
tokens that attend to nothing and write to a block nobody owns. Nothing that waits for another process is ever captured.

All that a graph knows is tokens, each with its slot and position; those of a prompt share a slot. Graphs of a second
kind know which of them follow each other, in pieces that read their keys once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.adapters.slots import BLOCK, AdapterSlots, StepAdapters, blocks_of, most_blocks
from model.attention import AttentionMetadata, packed_tokens, pieces_of
from model.batch import Batch
from model.kernels import PIECE_QUERIES, AdapterRows, Pieces, Tokens, piece_tokens
from model.kv_cache import KVCache
from model.llama import Decoder
from model.slots import Slots
from model.transfer import all_to_device

MIXED_TOKENS = 512  # of a step with tokens of prompts: a larger one takes the GPU longer than the host
MIXED_PROMPTS = 64  # in such a step: each ends in a piece of its own
PIECES_BYTES = 2**30  # keys and values of a layer that pieces read at most


def decode_buckets(most: int) -> list[int]:
    """Numbers of tokens to capture where all decode: 1, 2, 4, 8, then every 8 up to 256, then every 32."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, most, 32)]
    return [*(n for n in sizes if n < most), most]


def mixed_buckets(max_num_batched_tokens: int) -> list[int]:
    """The same where prompts are among them: every 16 up to 64, then every 32."""
    most = min(max_num_batched_tokens, MIXED_TOKENS)
    return [*(n for n in [16, 32, 48, *range(64, most, 32)] if n < most), most]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step computed; overwritten by the next."""

    out: torch.Tensor  # hidden [T, C], on the last stage logits [T, V]
    likeliest: torch.Tensor | None  # [T] on the last stage


class StepGraphs:
    """The steps of one stage that are small enough.

    A stage that is the first and the last one writes the likeliest token of each sequence to `slots` itself.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        slots: Slots,
        max_num_batched_tokens: int,
        on_capture: Callable[[int, int], None] = lambda done, total: None,
        adapters: AdapterSlots | None = None,
        max_decodes: int = 0,
    ) -> None:
        self._adapters = adapters
        self._decoder, self._kv, self._slots = decoder, kv, slots
        self._piece_tokens = piece_tokens(decoder.config.groups, PIECE_QUERIES)
        sizes = {
            False: decode_buckets(max(max_decodes, slots.padding_slot)),
            True: mixed_buckets(max_num_batched_tokens),
        }
        n = max(sizes[False][-1], sizes[True][-1])
        # Where pieces begin and how many tokens each has, as the host says it: [2, P].
        self._pieces = torch.zeros(2, self._most_pieces(sizes[True][-1]), dtype=torch.int32, device=decoder.device)
        self._packed = torch.zeros(1 + 4 * n, dtype=torch.int32, device=decoder.device)
        self._tokens = Tokens.empty(n, decoder.device)
        self._hidden = torch.zeros(n, decoder.config.dim, dtype=decoder.dtype, device=decoder.device)
        self._sizes = sizes
        # Of the tokens with adapters: in which order they are taken, and blocks of them; see `AdapterRows`.
        self._order = torch.zeros(n, dtype=torch.int32, device=decoder.device)
        self._blocks = torch.zeros(
            3, most_blocks(n, adapters.count if adapters else 0), dtype=torch.int32, device=decoder.device
        )
        self._graphs: dict[tuple[int, bool, bool], tuple[Any, Decoded]] = {}
        pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        # torch captures on the first GPU unless told otherwise
        self._capturing = _stream(decoder.device)
        # Steps without adapters have graphs of their own, which know nothing of any.
        kinds = [(mixed, adapted) for mixed in sizes for adapted in ([False, True] if adapters else [False])]
        todo = sorted(((size, *kind) for kind in kinds for size in sizes[kind[0]]), reverse=True)
        for done, step in enumerate(todo):  # the largest first: the others share its memory
            self._graphs[step] = self._capture(*step, pool)
            on_capture(done + 1, len(todo))

    def take(self, batch: Batch) -> bool:
        """Whether this step is one of them."""
        mixed = batch.num_tokens > batch.num_seqs
        if batch.prompt_rows or batch.num_tokens > self._sizes[mixed][-1]:
            return False
        return not mixed or self._is_light(batch)

    def _is_light(self, batch: Batch) -> bool:
        """Whether prompts are few and short enough: an eager step reads the keys of each once."""
        read = keys_read_by_pieces(batch, self._piece_tokens) * self._kv.token_bytes
        return int(np.count_nonzero(batch.query_lens > 1)) <= MIXED_PROMPTS and read <= PIECES_BYTES

    def _most_pieces(self, size: int) -> int:
        """Of so many tokens: what is left of each prompt is one more."""
        return size // self._piece_tokens + MIXED_PROMPTS

    def fill(self, batch: Batch, hidden: torch.Tensor | None) -> None:
        """What a step needs, where graphs find it; slots know of it. hidden [T, C] on all stages but the first."""
        n, mixed = batch.num_tokens, batch.num_tokens > batch.num_seqs
        packed = torch.empty(1 + 4 * n, dtype=torch.int32, pin_memory=self._packed.is_cuda)
        np.concatenate(packed_tokens(batch), out=packed.numpy())
        self._packed[: len(packed)].copy_(packed, non_blocking=True)
        if mixed:
            starts, counts = pieces_of(batch.query_lens, self._piece_tokens)
            pieces = torch.zeros(self._pieces.shape, dtype=torch.int32, pin_memory=self._pieces.is_cuda)
            pieces.numpy()[:, : len(starts)] = starts, counts
            self._pieces.copy_(pieces, non_blocking=True)
        if len(batch.adapters):
            order, blocks = blocks_of(batch, BLOCK)
            padded = np.zeros(self._blocks.shape, np.int32)
            padded[:, : blocks.shape[1]] = blocks
            order_there, blocks_there = all_to_device([order, padded.ravel()], torch.int32, self._order.device)
            self._order[: len(order)].copy_(order_there)
            self._blocks.copy_(blocks_there.view(3, -1))
        if hidden is not None:
            self._hidden[:n].copy_(hidden)

    def replay(self, batch: Batch) -> Decoded:
        """The step that was filled in. Launches one graph, and does nothing else that the host could wait in."""
        n, mixed = batch.num_tokens, batch.num_tokens > batch.num_seqs
        size = next(size for size in self._sizes[mixed] if size >= n)
        graph, done = self._graphs[size, mixed, len(batch.adapters) > 0]
        graph.replay()
        return Decoded(done.out[:n], done.likeliest[:n] if done.likeliest is not None else None)

    def _capture(self, size: int, mixed: bool, adapted: bool, pool: Any) -> tuple[Any, Decoded]:
        self._step(size, mixed, adapted)  # compiles kernels and fills library caches outside the graph
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._capturing):
            done = self._step(size, mixed, adapted)
        return graph, done

    def _step(self, size: int, mixed: bool, adapted: bool) -> Decoded:
        decoder, slots, tokens = self._decoder, self._slots, self._tokens.part(0, size)
        decoder.kernels.unpack_tokens(self._packed, slots.newest, slots.tables, slots.block_size, tokens)
        starts, counts = self._pieces[:, : self._most_pieces(size)].unbind()
        pieces = Pieces(starts, counts, tokens.lone_lens) if mixed else None
        metadata = AttentionMetadata(
            tokens, slots.tables, size, None, pieces, self._step_adapters(size) if adapted else None
        )
        x = decoder.embed(tokens.ids) if decoder.embeds else self._hidden[:size].clone()
        x = decoder.forward(x, self._kv, metadata)
        if not decoder.stage.is_last:
            return Decoded(x, None)
        logits = decoder.logits(x)
        likeliest = logits.argmax(dim=-1)
        if decoder.stage.is_first:
            slots.newest[tokens.sampled_slots] = likeliest
        return Decoded(logits, likeliest)

    def _step_adapters(self, size: int) -> StepAdapters:
        """As the host has filled them in; of all blocks that there can be the others are none."""
        assert self._adapters is not None
        blocks = self._blocks[:, : most_blocks(size, self._adapters.count)]
        return StepAdapters(self._adapters, AdapterRows(self._order[:size], blocks, BLOCK), self._decoder.kernels)


def _stream(device: torch.device) -> Any:
    """Where to capture; None: where torch does by itself."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def keys_read_by_pieces(batch: Batch, most: int) -> int:
    """Each piece reads what its last token attends to: about so many keys in all."""
    many = batch.query_lens > 1
    before, now = batch.num_computed_tokens[many].astype(np.int64), batch.query_lens[many].astype(np.int64)
    return int((-(-now // most) * (before + (now + most) // 2)).sum())

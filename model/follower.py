"""A device of a stage that does not lead: it computes its share of every step, and knows nothing else of it."""

from collections.abc import Callable

import torch

from model.adapters.slots import AdapterSlots, StepAdapters
from model.attention import AttentionMetadata, prepare
from model.batch import Batch
from model.graphs import StepGraphs
from model.group import on
from model.kv_cache import KVCache
from model.llama import Decoder
from model.slots import Slots


class Follower:
    """Its share of the decoder and of the KV cache, and the tables; newest tokens are the first device's affair."""

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        kv_dtype: torch.dtype,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.decoder, self._adapters = decoder, adapters
        self.kv = KVCache(decoder.config, len(decoder.layers), num_blocks, block_size, kv_dtype, decoder.device)
        max_blocks = -(-len(decoder.rotary) // block_size)
        self._slots = Slots(num_slots, max_blocks, block_size, num_blocks, decoder.device)
        self._graphs: StepGraphs | None = None

    def capture(self, max_num_batched_tokens: int, on_capture: Callable[[int, int], None], max_decodes: int) -> None:
        """As `Stage.capture`."""
        with on(self.decoder.device):
            self._graphs = StepGraphs(
                self.decoder, self.kv, self._slots, max_num_batched_tokens, on_capture, self._adapters, max_decodes
            )

    def extend(self, batch: Batch) -> None:
        """As `Slots.extend`."""
        with on(self.decoder.device):
            self._slots.extend(batch)

    def prepare(self, batch: Batch) -> AttentionMetadata:
        """For a step that is launched part by part."""
        with on(self.decoder.device):
            kernels = self.decoder.kernels
            adapters = StepAdapters.of(self._adapters, batch, kernels)
            return prepare(batch, self._slots, kernels, self.decoder.config.groups, adapters)

    def fill(self, batch: Batch) -> None:
        """As `StepGraphs.fill`."""
        assert self._graphs is not None
        with on(self.decoder.device):
            self._graphs.fill(batch, None)

    def replay(self, batch: Batch) -> None:
        """As `StepGraphs.replay`."""
        assert self._graphs is not None
        with on(self.decoder.device):
            self._graphs.replay(batch)

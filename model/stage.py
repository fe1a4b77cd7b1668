"""One stage: its share of the decoder and its KV cache on one device."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model.adapters.slots import AdapterSlots, StepAdapters
from model.adapters.store import StageAdapters
from model.attention import prepare
from model.batch import SAMPLED, Batch, Int32Array, LateMasks, Rules, StepOutput
from model.config import StageLayers
from model.follower import Follower
from model.graphs import StepGraphs
from model.group import DecoderGroup
from model.host_copies.arena import SHARED, HostArena, near
from model.host_copies.copier import BlockCopier, window_of
from model.kv_cache import KVCache
from model.llama import Decoder
from model.sampler import Sampler
from model.sampling import Logprobs, Sampled, prompt_logprobs
from model.slots import Slots
from model.transfer import to_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Unsampled:
    """What the last stage computed in one step, before any token is drawn from it."""

    batch: Batch
    logits: torch.Tensor  # [number of samples, V]
    prompt_logprobs: list[Logprobs | None]


class Stage:
    """Layers [start, stop) with their KV. Executes batches in the order given; of each sequence it knows its slot."""

    def __init__(
        self,
        decoder: Decoder | DecoderGroup,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        kv_dtype: torch.dtype | None = None,  # of keys and values; default: the decoder's
        adapters: StageAdapters | None = None,  # None: no sequence has one
    ) -> None:
        self.group = decoder if isinstance(decoder, DecoderGroup) else DecoderGroup([decoder])
        self.decoder = decoder = self.group.leader
        kv_dtype = kv_dtype or decoder.dtype
        self.adapters = adapters
        slots: list[AdapterSlots | None] = (
            [*adapters.slots] if adapters is not None else [None] * len(self.group.decoders)
        )
        self._adapter_slots = slots[0]
        self._followers = [
            Follower(d, num_blocks, block_size, num_slots, kv_dtype, own)
            for d, own in zip(self.group.decoders[1:], slots[1:], strict=True)
        ]
        self.layers: StageLayers = decoder.stage
        self.kv = KVCache(decoder.config, len(decoder.layers), num_blocks, block_size, kv_dtype, decoder.device)
        max_blocks = -(-len(decoder.rotary) // block_size)
        self.slots = Slots(num_slots, max_blocks, block_size, num_blocks, decoder.device)
        self._sampler: Sampler | None = None
        if self.layers.is_last:
            self._sampler = Sampler(num_slots + 1, decoder.config.vocab_size, len(decoder.rotary), decoder.device)
        self._graphs: StepGraphs | None = None
        self._copier: BlockCopier | None = None

    @property
    def caches(self) -> list[KVCache]:
        """Of each device."""
        return [self.kv, *(follower.kv for follower in self._followers)]

    @property
    def copier(self) -> BlockCopier:
        """Of blocks to host memory and back, which it must have been given."""
        assert self._copier is not None, "this stage keeps no copies"
        return self._copier

    def keep_copies(self, family: str, member: str, num_places: int, directory: Path = SHARED) -> None:
        """From now on blocks can be copied to host memory: an arena for each device. See `HostArena`."""
        arenas = []
        for i, cache in enumerate(self.caches):
            with near(cache.storages[0].device):
                arenas.append(HostArena(family, f"{member}, device {i}", num_places, cache.block_bytes, directory))
        self._copier = BlockCopier(self.caches, arenas, window_of(self.caches[0].block_bytes))

    def drop_copies(self) -> None:
        """Give the host memory back."""
        if self._copier is not None:
            self._copier.close()
            self._copier = None

    def hidden_shape(self, batch: Batch) -> tuple[int, int]:
        """Shape of the hidden state between stages, residual added: (T, C)."""
        return batch.num_tokens, self.decoder.config.dim

    def feed(self, batch: Batch, token_ids: torch.Tensor) -> None:
        """First stage: these tokens [R], on its device, were sampled in `batch`; before the batches that need them."""
        self.slots.feed(batch, token_ids)

    @torch.inference_mode()
    def capture(
        self, max_num_batched_tokens: int, on_capture: Callable[[int, int], None], max_decodes: int = 0
    ) -> None:
        """Capture small steps as CUDA graphs, which `run` then uses. `on_capture`: (graphs done, of how many).

        Those that only decode have `max_decodes` tokens at most, or one of each slot.
        """
        self._run_eagerly_once()
        with self.group.each_for_itself():
            self._graphs = StepGraphs(
                self.decoder, self.kv, self.slots, max_num_batched_tokens, on_capture, self._adapter_slots, max_decodes
            )
            for follower in self._followers:
                follower.capture(max_num_batched_tokens, on_capture, max_decodes)

    def _run_eagerly_once(self) -> None:
        """What only large steps use is loaded at its first use, which takes seconds: not in the middle of traffic.

        A prompt from its beginning and one that goes on are computed by different kernels.
        """
        slots, lens = np.full(2, self.slots.padding_slot, np.int32), np.array([1, 2], np.int32)
        both = np.arange(2, dtype=np.int32)
        rules = Rules(self.slots.padding_slot, 0, 1.0, top_p=0.9, logprobs=1, logit_bias={0: 1.0}, counts=True)
        for computed in (both * 0, both * 2):
            ids = np.zeros(3, np.int32)
            batch = Batch(0, 0, ids, lens, computed, slots, both * 0, both[:0], -1, both, both, [rules])
            hidden = torch.zeros(self.hidden_shape(batch), dtype=self.decoder.dtype, device=self.decoder.device)
            self.run(batch, None if self.layers.is_first else hidden)

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor | Sampled:
        """Compute one step. `hidden` [T, C] comes from the stage before (None on the first).

        Returns the hidden state for the next stage, or on the last stage the sampled tokens.
        """
        result = self.compute(batch, hidden)
        return self.sample(result) if isinstance(result, Unsampled) else result

    @torch.inference_mode()
    def compute(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor | Sampled | Unsampled:
        """The same, except that on the last stage `sample` is still to come, unless all tokens are the likeliest."""
        self.slots.extend(batch)
        for follower in self._followers:
            follower.extend(batch)
        if self.adapters is None:
            return self._compute(batch, hidden)
        self.adapters.place(batch.placed)
        result = self._compute(batch, hidden)
        self.adapters.mark_used(batch)
        return result

    def _compute(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor | Sampled | Unsampled:
        if self._graphs is not None and self._graphs.take(batch):
            return self._run_graphs(self._graphs, batch, hidden)
        x = self._eager(batch, hidden)
        if not self.layers.is_last:
            return x
        prompts = self._prompt_logprobs(batch, x)
        return Unsampled(batch, self.group.logits(x[_on(self.decoder.device, batch.sample_tokens)]), prompts)

    def _run_graphs(
        self, graphs: StepGraphs, batch: Batch, hidden: torch.Tensor | None
    ) -> torch.Tensor | Sampled | Unsampled:
        """What is returned are copies: the next step overwrites what the graph gives."""
        for follower in self._followers:
            follower.fill(batch)
        graphs.fill(batch, hidden)
        for follower in self._followers:  # it waits for the others: nothing else comes between the launches
            follower.replay(batch)
        done = graphs.replay(batch)
        if done.likeliest is None:
            return done.out.clone()
        if not len(batch.draws) and len(batch.sample_rows) == batch.num_tokens:
            return Sampled(done.likeliest.clone())
        rows = _on(self.decoder.device, batch.sample_tokens)
        return Unsampled(batch, done.out[rows], []) if len(batch.draws) else Sampled(done.likeliest[rows])

    def _eager(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor:
        """Hidden state [T, C]."""
        kernels = self.decoder.kernels
        adapters = StepAdapters.of(self._adapter_slots, batch, kernels)
        metadata = prepare(batch, self.slots, kernels, self.decoder.config.groups, adapters)
        x = self.decoder.embed(metadata.tokens.ids) if self.layers.is_first else hidden
        assert x is not None, "only the first stage makes its own input"
        others = [follower.prepare(batch) for follower in self._followers]
        return self.group.forward(x, self.caches, [metadata, *others])

    @torch.inference_mode()
    def sample(self, computed: Unsampled, masks: LateMasks | None = None) -> Sampled:
        """Draw the tokens of a step; `masks` are those that its batch was sent without."""
        batch, prompts = computed.batch, computed.prompt_logprobs
        if not len(batch.sample_rows):
            return Sampled(torch.empty(0, dtype=torch.int64, device=self.decoder.device), [], prompts)
        assert self._sampler is not None, "only the last stage samples"
        known = batch.masks if masks is None else batch.masks | masks.masks
        sampled = replace(self._sampler.sample(batch, computed.logits, known), prompt_logprobs=prompts)
        if self.layers.is_first:
            self.feed(batch, sampled.token_ids)
        return sampled

    def _prompt_logprobs(self, batch: Batch, x: torch.Tensor) -> list[Logprobs | None]:
        """Of what follows each token of the chunks that ask for it, in x [T, C]."""
        ends = batch.query_lens.cumsum()
        found: list[Logprobs | None] = []
        for row in batch.prompt_rows:
            stop = int(ends[row.row])
            start = stop - int(batch.query_lens[row.row])
            following = np.append(batch.token_ids[start + 1 : stop], np.int32(row.next_token))
            known = following if row.next_token != SAMPLED else following[:-1]
            found.append(self._of_chunk(x[start : start + len(known)], known, row.logprobs))
        return found

    def _of_chunk(self, x: torch.Tensor, following: Int32Array, count: int) -> Logprobs | None:
        """None if it fails: that is this sequence's affair alone, unless the device has failed."""
        try:
            return prompt_logprobs(self.group.logits, x, _on(self.decoder.device, following), count)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("the logprobs of a prompt failed")
            return None


def to_output(batch: Batch, sampled: Sampled) -> StepOutput:
    """As it travels back to the scheduler. Waits for the device."""
    return StepOutput(
        batch.epoch,
        batch.step_id,
        sampled.token_ids.tolist(),
        sampled.row_logprobs(),
        [None if values is None else values.tokens() for values in sampled.prompt_logprobs],
        sampled.errors,
    )


def _on(device: torch.device, values: Int32Array) -> torch.Tensor:
    """[n] int64 on `device`."""
    return to_device(values, torch.int64, device)

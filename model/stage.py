"""One stage: its share of the decoder and its KV cache on one device."""

import torch

from model.attention import prepare
from model.batch import SAMPLED, Batch, Int32Array, StepOutput
from model.config import StageLayers
from model.kv_cache import KVCache
from model.llama import Decoder
from model.sampling import Sampled, sample


class Stage:
    """Layers [start, stop) with their KV. Executes batches in the order given.

    Of requests it keeps nothing but, on the first stage, the newest sampled token of each slot.
    """

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int, num_slots: int) -> None:
        self.decoder = decoder
        self.layers: StageLayers = decoder.stage
        self.kv = KVCache(decoder.config, len(decoder.layers), num_blocks, block_size, decoder.dtype, decoder.device)
        self._newest = torch.zeros(num_slots, dtype=torch.int64, device=decoder.device)

    def hidden_shape(self, batch: Batch) -> tuple[int, int]:
        """Shape of the hidden state between stages, residual added: (T, C)."""
        return batch.num_tokens, self.decoder.config.dim

    def feed(self, batch: Batch, token_ids: torch.Tensor) -> None:
        """First stage: these tokens [R] were sampled in `batch`. Must come before the batches that need them."""
        self._newest[_on(self.decoder.device, sample_slots(batch))] = token_ids

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor | Sampled:
        """Compute one step. `hidden` [T, C] comes from the stage before (None on the first).

        Returns the hidden state for the next stage, or on the last stage the sampled tokens.
        """
        decoder = self.decoder
        metadata = prepare(batch, self.kv.block_size, decoder.device)
        if self.layers.is_first:
            hidden = decoder.embed(self._inputs(batch))
        assert hidden is not None, "only the first stage makes its own input"
        hidden = decoder.forward(hidden, self.kv, metadata)
        if not self.layers.is_last:
            return hidden
        if not batch.samples:
            return Sampled(torch.empty(0, dtype=torch.int64, device=decoder.device), {})
        sampled = sample(decoder.logits(hidden[metadata.sample_tokens]), batch.samples)
        if self.layers.is_first:
            self.feed(batch, sampled.token_ids)
        return sampled

    def _inputs(self, batch: Batch) -> torch.Tensor:
        """Token ids [T], with what was sampled on the way filled in."""
        ids = _on(self.decoder.device, batch.token_ids)
        unknown = batch.token_ids == SAMPLED
        if not unknown.any():
            return ids
        # Only sequences of one token continue a sampled one, and they come first: token i belongs to sequence i.
        n = int(unknown.nonzero()[0][-1]) + 1
        slots = _on(self.decoder.device, batch.slots[:n])
        ids[:n] = torch.where(ids[:n] == SAMPLED, self._newest[slots], ids[:n])
        return ids


def sample_slots(batch: Batch) -> Int32Array:
    """Slots of the sequences that sample in `batch`, in the order of its samples."""
    return batch.slots[[row.row for row in batch.samples]]


def to_output(batch: Batch, sampled: Sampled) -> StepOutput:
    """As it travels back to the scheduler. Waits for the device."""
    return StepOutput(batch.epoch, batch.step_id, sampled.token_ids.tolist(), sampled.host_logprobs())


def _on(device: torch.device, values: Int32Array) -> torch.Tensor:
    """[n] int64 on `device`."""
    return torch.from_numpy(values.astype("int64")).to(device, non_blocking=True)

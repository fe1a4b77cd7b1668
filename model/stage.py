"""One stage: its share of the decoder and its KV cache on one device."""

import torch

from model.attention import prepare
from model.batch import Batch, StepOutput
from model.config import StageLayers
from model.kv_cache import KVCache
from model.llama import Decoder
from model.sampling import sample


class Stage:
    """Layers [start, stop) with their KV. Executes batches in the order given; keeps no state per request."""

    def __init__(self, decoder: Decoder, num_blocks: int, block_size: int) -> None:
        self.decoder = decoder
        self.layers: StageLayers = decoder.stage
        self.kv = KVCache(decoder.config, len(decoder.layers), num_blocks, block_size, decoder.dtype, decoder.device)

    def hidden_shape(self, batch: Batch) -> tuple[int, int]:
        """Shape of the hidden state between stages, residual added: (T, C)."""
        return batch.num_tokens, self.decoder.config.dim

    @torch.inference_mode()
    def run(self, batch: Batch, hidden: torch.Tensor | None) -> torch.Tensor | StepOutput:
        """Compute one step. `hidden` [T, C] comes from the stage before (None on the first).

        Returns the hidden state for the next stage, or on the last stage the sampled tokens.
        """
        metadata = prepare(batch, self.kv.block_size, self.decoder.device)
        if self.layers.is_first:
            token_ids = torch.from_numpy(batch.token_ids.copy()).to(self.decoder.device)
            hidden = self.decoder.embed(token_ids)
        assert hidden is not None, "only the first stage makes its own input"
        hidden = self.decoder.forward(hidden, self.kv, metadata)
        if not self.layers.is_last:
            return hidden
        if not batch.samples:
            return StepOutput(batch.epoch, batch.step_id, [], [])
        logits = self.decoder.logits(hidden[metadata.sample_tokens])
        token_ids_out, logprobs = sample(logits, batch.samples)
        return StepOutput(batch.epoch, batch.step_id, token_ids_out, logprobs)

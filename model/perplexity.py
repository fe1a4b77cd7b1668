"""How well a model predicts a text: what a number format costs shows here first.

Legend: T tokens of a window, C model dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.attention import prepare
from model.batch import Batch
from model.kv_cache import KVCache
from model.llama import Decoder
from model.sampling import prompt_logprobs
from model.slots import Slots

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the tokens that were predicted."""

    tokens: int
    mean_nll: float  # nats

    @property
    def value(self) -> float:
        return math.exp(self.mean_nll)


def perplexity(
    decoder: Decoder,
    token_ids: Sequence[int],
    window: int,
    on_window: Callable[[int], None] = lambda tokens: None,
    kv_dtype: torch.dtype | None = None,
) -> Perplexity:
    """Of a whole model (one stage). The text is cut into windows, of which every token but the first is predicted from
    those before it; a rest of one token is left out. `on_window`: tokens of the window just done.
    `kv_dtype`: of keys and values; default: the decoder's.

    Raises `ValueError` if there is nothing to predict.
    """
    assert decoder.stage.start == 0, "a part of a model predicts nothing"
    assert decoder.stage.is_last, "a part of a model predicts nothing"
    if len(token_ids) < 2 or window < 2:
        raise ValueError(f"perplexity needs a text and windows of at least 2 tokens, got {len(token_ids)} and {window}")
    blocks = -(-window // BLOCK_SIZE)
    kv = KVCache(decoder.config, len(decoder.layers), blocks, BLOCK_SIZE, kv_dtype or decoder.dtype, decoder.device)
    slots = Slots(1, blocks, BLOCK_SIZE, blocks, decoder.device)
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, window):
        ids = token_ids[start : start + window]
        total -= _window_logprob(decoder, kv, slots, ids)
        count += len(ids) - 1
        on_window(len(ids))
    return Perplexity(count, total / count)


@torch.inference_mode()
def _window_logprob(decoder: Decoder, kv: KVCache, slots: Slots, token_ids: Sequence[int]) -> float:
    """Sum of the logprobs of all tokens but the first."""
    batch = Batch.of_one(np.array(token_ids, np.int32), BLOCK_SIZE)
    slots.extend(batch)
    metadata = prepare(batch, slots, decoder.kernels, decoder.config.groups)
    ids = metadata.tokens.ids
    x = decoder.forward(decoder.embed(ids), kv, metadata)  # [T, C]
    return float(prompt_logprobs(decoder.logits, x[:-1], ids[1:], 0).chosen.double().sum())

"""From logits to tokens: what is drawn, in few operations for all rows at once.

Legend: N rows of logits, V vocabulary.

A row's token depends on that row alone: its logits, its parameters and its draw. Nothing here waits for the device:
results stay there as a `Sampled`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from model.batch import TokenLogprobs
from model.transfer import to_device

PROMPT_ROWS = 64  # prompt positions whose logits are computed at a time: [64, V] float32 is what memory is kept for


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Raw logprobs of some positions, still on the device."""

    chosen: torch.Tensor  # [n]
    values: torch.Tensor  # [n, k], best first
    token_ids: torch.Tensor  # [n, k]

    def on_host(self) -> "Logprobs":
        """On their way to the host, without waiting for them."""
        return Logprobs(*(_on_host(x) for x in (self.chosen, self.values, self.token_ids)))

    def tokens(self) -> list[TokenLogprobs]:
        """One per position. Waits for the device."""
        best = zip(self.token_ids.tolist(), self.values.tolist(), strict=True)
        tops = [list(zip(ids, values, strict=True)) for ids, values in best]
        return [TokenLogprobs(chosen, top) for chosen, top in zip(self.chosen.tolist(), tops, strict=True)]


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Of those rows of a step that ask for them."""

    rows: list[int]
    counts: list[int]  # how many of the best each wants
    logprobs: Logprobs  # as many as who wants most

    def of_rows(self) -> dict[int, TokenLogprobs]:
        """By row. Waits for the device."""
        found = zip(self.rows, self.counts, self.logprobs.tokens(), strict=True)
        return {row: TokenLogprobs(one.chosen, one.top[:count]) for row, count, one in found}


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step sampled: a token per row, and logprobs where they were asked for."""

    token_ids: torch.Tensor  # [R] int64
    logprobs: list[RowLogprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)  # per Batch.prompt_rows; None: it failed
    errors: dict[int, str] = field(default_factory=dict)  # by row: why it has no token

    def on_host(self) -> "Sampled":
        """On its way to the host, without waiting for it; what is of prompts stays where it is."""
        logprobs = [replace(part, logprobs=part.logprobs.on_host()) for part in self.logprobs]
        return replace(self, token_ids=_on_host(self.token_ids), logprobs=logprobs)

    def row_logprobs(self) -> dict[int, TokenLogprobs]:
        """By row. Waits for the device."""
        return {row: one for part in self.logprobs for row, one in part.of_rows().items()}


def _on_host(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Draws:
    """How N tokens are drawn; columns [N, 1] on the device, of the logits' type but for `uniform`, which is float64."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # V: all
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor  # in [0, 1), see `uniforms`


def uniform(seed: int, position: int) -> float:
    """A draw in [0, 1) that depends on (seed, position) alone."""
    return float(uniforms(np.array([seed % 2**64], np.uint64), np.array([position]))[0])


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[N] of these: SplitMix64 (Steele et al., OOPSLA 2014), whose state a seed is hashed to and a position steps."""
    state = _mixed(seeds.astype(np.uint64)) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    drawn: np.ndarray = (_mixed(state) >> np.uint64(11)) * 2.0**-53
    return drawn


def _mixed(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ z >> np.uint64(31)
    return mixed


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] -> [N]; of equals the first. On a CPU numpy finds them ten times as fast as torch."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(dim=-1)


def penalised(
    values: torch.Tensor, seen: torch.Tensor, repetition: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor
) -> torch.Tensor:
    """Repetition (arXiv 1909.05858), presence and frequency penalties (OpenAI's definition) on logits [N, k].

    seen [N, k]: 0: the token did not come; otherwise 1 + how often in the output. Penalties are columns [N, 1].
    """
    times = (seen - 1).clamp(min=0)
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    return torch.where(seen > 0, repeated - frequency * times - presence * (times > 0), values)


def mask(logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> None:
    """Put what is not allowed out of reach, in these rows of logits [N, V]."""
    device, vocab = logits.device, logits.shape[-1]
    allowed = to_device(np.frombuffer(b"".join(masks), np.uint8), torch.uint8, device)
    added = _of_bytes(device).index_select(0, allowed.int()).view(len(masks), -1)[:, :vocab]
    added = F.pad(added, (0, vocab - added.shape[1]), value=-torch.inf)
    logits.index_add_(0, to_device(rows, torch.int64, device), added)


@cache
def _of_bytes(device: torch.device) -> torch.Tensor:
    """[256, 8] What the bits of each byte of a mask add to logits: 0 or -inf. Adding does not branch."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return torch.where(bits == 1, 0.0, -torch.inf)


def draw_plain(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Inverse-CDF sampling of [N, V] -> [N]."""
    return _invert(torch.softmax(logits / draws.temperature, -1), draws.uniform)


def draw_filtered(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """The same after top-k, top-p and min-p, which all look at the tokens best first."""
    values, ids = (logits / draws.temperature).sort(descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=values.device)
    probabilities = torch.softmax(values.masked_fill(rank >= draws.top_k, -torch.inf), -1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the better tokens
    keep = (before < draws.top_p) & (probabilities >= draws.min_p * probabilities[:, :1])
    keep[:, 0] = True  # top_p 0 still leaves the best token
    return ids.gather(-1, _invert(probabilities * keep, draws.uniform).unsqueeze(-1)).squeeze(-1)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First index of each row [N, V] whose cumulative weight exceeds its draw's share of the total -> [N]."""
    cumulative = weights.double().cumsum(-1)
    found = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform, right=True)
    return found.clamp(max=weights.shape[-1] - 1).squeeze(-1)


def logprobs_of(values: torch.Tensor, tokens: torch.Tensor, count: int) -> Logprobs:
    """Of `tokens` [n], and of the `count` best, in log probabilities [n, V]."""
    best = values.topk(count, dim=-1)
    return Logprobs(values.gather(-1, tokens[:, None]).squeeze(-1), best.values, best.indices)


def prompt_logprobs(
    head: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, targets: torch.Tensor, count: int
) -> Logprobs:
    """Logprobs of `targets` [n], each the token that follows a position of x [n, C], and of the `count` best."""
    parts = [
        logprobs_of(head(x[i : i + PROMPT_ROWS]).log_softmax(-1), targets[i : i + PROMPT_ROWS], count)
        for i in range(0, len(targets), PROMPT_ROWS)
    ]
    names = ("chosen", "values", "token_ids")
    empty = logprobs_of(torch.empty(0, count or 1, device=x.device), targets[:0], count)
    return Logprobs(*(torch.cat([getattr(part, name) for part in parts or [empty]]) for name in names))

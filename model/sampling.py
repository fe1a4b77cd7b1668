"""From logits to tokens.

Legend: R rows (one per sequence that samples), V vocabulary.

A row's token depends on that row alone: its logits, its parameters and its draw. Rows that draw are computed together,
each along its own last dimension. Nothing here waits for the device: results stay there as a `Sampled`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from model.batch import Penalties, SampleRow, TokenLogprobs
from model.transfer import to_device

log = logging.getLogger(__name__)

PROMPT_ROWS = 64  # prompt positions whose logits are computed at a time: [64, V] float32 is what memory is kept for


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Raw logprobs of some positions, still on the device."""

    chosen: torch.Tensor  # [n]
    values: torch.Tensor  # [n, k], best first
    token_ids: torch.Tensor  # [n, k]

    def to_host(self) -> list[TokenLogprobs]:
        """One per position. Waits for the device."""
        best = zip(self.token_ids.tolist(), self.values.tolist(), strict=True)
        tops = [list(zip(ids, values, strict=True)) for ids, values in best]
        return [TokenLogprobs(chosen, top) for chosen, top in zip(self.chosen.tolist(), tops, strict=True)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step sampled: a token per row, and logprobs where they were asked for."""

    token_ids: torch.Tensor  # [R] int64
    logprobs: dict[int, Logprobs]  # by row
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)  # per Batch.prompt_rows; None: it failed
    errors: dict[int, str] = field(default_factory=dict)  # by row: why it has no token

    def to_host(self) -> "Sampled":
        """The tokens on their way to the host, without waiting for them; logprobs stay where they are."""
        if self.token_ids.device.type == "cpu":
            return self
        host = torch.empty(self.token_ids.shape, dtype=self.token_ids.dtype, pin_memory=True)
        return replace(self, token_ids=host.copy_(self.token_ids, non_blocking=True))

    def host_logprobs(self) -> dict[int, TokenLogprobs]:
        """By row. Waits for the device."""
        return {row: values.to_host()[0] for row, values in self.logprobs.items()}


def sample(logits: torch.Tensor, draws: list[SampleRow]) -> Sampled:
    """One token per row of logits [R, V] float32 (changed in place): the likeliest, unless one of `draws` says how.

    Logprobs are of the raw logits. A row that cannot be sampled is reported in `errors`; the others do not notice.
    """
    errors: dict[int, str] = {}
    raw: dict[int, torch.Tensor] = {}
    for draw in draws:
        with _alone(draw, errors):
            if draw.logprobs >= 0:
                raw[draw.row] = logits[draw.row].log_softmax(-1)
            _adjust(logits[draw.row], draw)
    _apply_masks(logits, [d for d in draws if d.mask and d.row not in errors], errors)
    tokens = logits.argmax(dim=-1)
    for filtered in (False, True):
        chosen = [d for d in draws if d.temperature > 0 and _is_filtered(d) == filtered and d.row not in errors]
        if chosen:
            _draw(_draw_filtered if filtered else _draw_plain, logits, tokens, chosen, errors)
    logprobs: dict[int, Logprobs] = {}
    for draw in draws:
        with _alone(draw, errors):
            if draw.row in raw and draw.row not in errors:
                logprobs[draw.row] = _logprobs(raw[draw.row][None], tokens[draw.row][None], draw.logprobs)
    return Sampled(tokens, logprobs, errors=errors)


def prompt_logprobs(
    head: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, targets: torch.Tensor, count: int
) -> Logprobs:
    """Logprobs of `targets` [n], each the token that follows a position of x [n, C], and of the `count` best."""
    parts = [
        _logprobs(head(x[i : i + PROMPT_ROWS]).log_softmax(-1), targets[i : i + PROMPT_ROWS], count)
        for i in range(0, len(targets), PROMPT_ROWS)
    ]
    names = ("chosen", "values", "token_ids")
    empty = _logprobs(torch.empty(0, count or 1, device=x.device), targets[:0], count)
    return Logprobs(*(torch.cat([getattr(part, name) for part in parts or [empty]]) for name in names))


@contextmanager
def _alone(draw: SampleRow, errors: dict[int, str]) -> Iterator[None]:
    """What goes wrong with one row stays its own: it is noted in `errors`, and never raised.

    A device that has failed is nobody's own.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        log.exception("a row could not be sampled")
        errors[draw.row] = f"{type(error).__name__} in the sampler"


def _is_filtered(row: SampleRow) -> bool:
    return row.top_k > 0 or row.top_p < 1.0 or row.min_p > 0.0


def _adjust(logits: torch.Tensor, draw: SampleRow) -> None:
    """Whatever changes a row's logits [V] before its token is chosen."""
    if draw.penalties is not None:
        _penalise(logits, draw.penalties)
    if draw.logit_bias:
        _add_bias(logits, draw.logit_bias)
    if draw.banned:
        logits.index_fill_(0, to_device(draw.banned, torch.int64, logits.device), -torch.inf)


def _apply_masks(logits: torch.Tensor, draws: list[SampleRow], errors: dict[int, str]) -> None:
    """Put what is not allowed out of reach; all rows together, and each alone if together fails."""
    try:
        if draws:
            _mask(logits, draws)
    except torch.AcceleratorError:
        raise
    except Exception:
        for draw in draws:
            with _alone(draw, errors):
                _mask(logits, [draw])


def _mask(logits: torch.Tensor, draws: list[SampleRow]) -> None:
    device, vocab = logits.device, logits.shape[-1]
    masks = to_device(np.frombuffer(b"".join(d.mask for d in draws), np.uint8), torch.uint8, device)
    added = _of_bytes(device).index_select(0, masks.int()).view(len(draws), -1)[:, :vocab]
    added = F.pad(added, (0, vocab - added.shape[1]), value=-torch.inf)
    logits.index_add_(0, to_device([d.row for d in draws], torch.int64, device), added)


@cache
def _of_bytes(device: torch.device) -> torch.Tensor:
    """[256, 8] What the bits of each byte of a mask add to logits: 0 or -inf. Adding does not branch."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return torch.where(bits == 1, 0.0, -torch.inf)


def _penalise(logits: torch.Tensor, penalties: Penalties) -> None:
    """Repetition (arXiv 1909.05858), presence and frequency penalties (OpenAI's definition) on logits [V]."""
    seen = to_device(list(penalties.counts), torch.int64, logits.device)
    counts = to_device(list(penalties.counts.values()), logits.dtype, logits.device)
    values = logits[seen]
    values = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    logits[seen] = values - penalties.frequency * counts - penalties.presence * (counts > 0)


def _add_bias(logits: torch.Tensor, bias: dict[int, float]) -> None:
    ids = to_device(list(bias), torch.int64, logits.device)
    logits[ids] += to_device(list(bias.values()), logits.dtype, logits.device)


Drawer = Callable[[torch.Tensor, list[SampleRow]], torch.Tensor]


def _draw(
    drawer: Drawer, logits: torch.Tensor, tokens: torch.Tensor, chosen: list[SampleRow], errors: dict[int, str]
) -> None:
    """Put what `drawer` draws for `chosen` into `tokens`; together, and each alone if together fails."""
    try:
        rows = to_device([draw.row for draw in chosen], torch.int64, logits.device)
        tokens[rows] = drawer(logits[rows], chosen)
    except torch.AcceleratorError:
        raise
    except Exception:
        for draw in chosen:
            with _alone(draw, errors):
                tokens[draw.row] = drawer(logits[draw.row][None], [draw])[0]


def _draw_plain(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Inverse-CDF sampling of [R, V] with each row's uniform draw -> [R]."""
    weights = torch.softmax(logits / _column(logits, [max(r.temperature, 1e-5) for r in rows]), -1)
    return _invert(weights, rows)


def _draw_filtered(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """The same after top-k, top-p and min-p, which all look at the tokens best first."""
    scaled = logits / _column(logits, [max(r.temperature, 1e-5) for r in rows])
    values, ids = scaled.sort(descending=True, stable=True)
    vocab = values.shape[-1]
    rank = torch.arange(vocab, device=values.device)
    k = _column(values, [r.top_k if 0 < r.top_k < vocab else vocab for r in rows])
    probabilities = torch.softmax(values.masked_fill(rank >= k, -torch.inf), -1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the better tokens
    top_p, min_p = (_column(values, [getattr(r, name) for r in rows]) for name in ("top_p", "min_p"))
    keep = (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    keep[:, 0] = True  # top_p 0 still leaves the best token
    return ids.gather(-1, _invert(probabilities * keep, rows).unsqueeze(-1)).squeeze(-1)


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    """One value per row, [R, 1]."""
    return to_device(values, like.dtype, like.device).unsqueeze(-1)


def _invert(weights: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """First index of each row [R, V] whose cumulative weight exceeds its draw's share of the total -> [R]."""
    cumulative = weights.double().cumsum(-1)
    draws = _column(cumulative, [r.uniform for r in rows])
    found = torch.searchsorted(cumulative, cumulative[:, -1:] * draws, right=True)
    return found.clamp(max=weights.shape[-1] - 1).squeeze(-1)


def _logprobs(values: torch.Tensor, tokens: torch.Tensor, count: int) -> Logprobs:
    """Of `tokens` [n], and of the `count` best, in log probabilities [n, V]."""
    best = values.topk(count, dim=-1)
    return Logprobs(values.gather(-1, tokens[:, None]).squeeze(-1), best.values, best.indices)

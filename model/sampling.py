"""From logits to tokens.

Legend: R rows (one per sequence that samples), V vocabulary.

A row's token depends on that row alone: its logits, its parameters and its draw. Rows that draw are computed together,
each along its own last dimension. Nothing here waits for the device: results stay there as a `Sampled`.
"""

from dataclasses import dataclass

import torch

from model.batch import Penalties, SampleRow, TokenLogprobs


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Raw logprobs of one row, still on the device."""

    chosen: torch.Tensor  # []
    values: torch.Tensor  # [k], best first
    token_ids: torch.Tensor  # [k]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step sampled: a token per row, and logprobs where they were asked for."""

    token_ids: torch.Tensor  # [R] int64
    logprobs: dict[int, RowLogprobs]  # by row

    def to_host(self) -> "Sampled":
        """The tokens on their way to the host, without waiting for them; logprobs stay where they are."""
        if self.token_ids.device.type == "cpu":
            return self
        host = torch.empty(self.token_ids.shape, dtype=self.token_ids.dtype, pin_memory=True)
        return Sampled(host.copy_(self.token_ids, non_blocking=True), self.logprobs)

    def host_logprobs(self) -> dict[int, TokenLogprobs]:
        """By row. Waits for the device."""
        return {
            i: TokenLogprobs(float(row.chosen), list(zip(row.token_ids.tolist(), row.values.tolist(), strict=True)))
            for i, row in self.logprobs.items()
        }


def sample(logits: torch.Tensor, draws: list[SampleRow]) -> Sampled:
    """One token per row of logits [R, V] float32 (changed in place): the likeliest, unless one of `draws` says how.

    Logprobs are of the raw logits.
    """
    raw = {draw.row: logits[draw.row].log_softmax(-1) for draw in draws if draw.logprobs >= 0}
    for draw in draws:
        if draw.penalties is not None:
            _penalise(logits[draw.row], draw.penalties)
        if draw.logit_bias:
            _add_bias(logits[draw.row], draw.logit_bias)
    tokens = logits.argmax(dim=-1)
    for filtered in (False, True):
        chosen = [draw for draw in draws if draw.temperature > 0 and _is_filtered(draw) == filtered]
        if chosen:
            rows = torch.tensor([draw.row for draw in chosen]).to(logits.device, non_blocking=True)
            tokens[rows] = (_draw_filtered if filtered else _draw_plain)(logits[rows], chosen)
    wanted = {draw.row: draw.logprobs for draw in draws}
    return Sampled(tokens, {i: _row_logprobs(values, tokens[i], wanted[i]) for i, values in raw.items()})


def _is_filtered(row: SampleRow) -> bool:
    return row.top_k > 0 or row.top_p < 1.0 or row.min_p > 0.0


def _penalise(logits: torch.Tensor, penalties: Penalties) -> None:
    """Repetition (arXiv 1909.05858), presence and frequency penalties (OpenAI's definition) on logits [V]."""
    seen = torch.tensor(list(penalties.counts), device=logits.device)
    counts = torch.tensor(list(penalties.counts.values()), device=logits.device, dtype=logits.dtype)
    values = logits[seen]
    values = torch.where(values > 0, values / penalties.repetition, values * penalties.repetition)
    logits[seen] = values - penalties.frequency * counts - penalties.presence * (counts > 0)


def _add_bias(logits: torch.Tensor, bias: dict[int, float]) -> None:
    ids = torch.tensor(list(bias), device=logits.device)
    logits[ids] += torch.tensor(list(bias.values()), device=logits.device, dtype=logits.dtype)


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
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True).unsqueeze(-1)


def _invert(weights: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """First index of each row [R, V] whose cumulative weight exceeds its draw's share of the total -> [R]."""
    cumulative = weights.double().cumsum(-1)
    draws = _column(cumulative, [r.uniform for r in rows])
    found = torch.searchsorted(cumulative, cumulative[:, -1:] * draws, right=True)
    return found.clamp(max=weights.shape[-1] - 1).squeeze(-1)


def _row_logprobs(values: torch.Tensor, token: torch.Tensor, count: int) -> RowLogprobs:
    best = values.topk(count)
    return RowLogprobs(values[token], best.values, best.indices)

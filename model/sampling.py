"""From logits to tokens.

Legend: R rows (one per sequence that samples), V vocabulary.

A row's token depends on that row alone: its logits, its parameters and its draw. Rows are grouped by what they need
only where every group computes the row the same way whoever shares the batch.
"""

import torch

from model.batch import Penalties, SampleRow, TokenLogprobs


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Draw one token per row from logits [R, V] float32 (changed in place). Logprobs are of the raw logits."""
    logprobs = _raw_logprobs(logits, rows)
    for i, row in enumerate(rows):
        if row.penalties is not None:
            _penalise(logits[i], row.penalties)
        if row.logit_bias:
            _add_bias(logits[i], row.logit_bias)
    tokens = logits.argmax(dim=-1).tolist()
    for i, row in enumerate(rows):
        if row.temperature > 0:
            tokens[i] = _draw(logits[i], row)
    return tokens, _attach(logprobs, tokens, rows)


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


def _draw(logits: torch.Tensor, row: SampleRow) -> int:
    """Inverse-CDF sampling of one row [V] with its uniform draw, after temperature, top-k, top-p and min-p."""
    scaled = logits / max(row.temperature, 1e-5)
    if row.top_k == 0 and row.top_p == 1.0 and row.min_p == 0.0:
        return _invert(torch.softmax(scaled, -1), row.uniform)
    if 0 < row.top_k < len(scaled):
        values, ids = scaled.topk(row.top_k)
    else:
        values, ids = scaled.sort(descending=True)
    probabilities = torch.softmax(values, -1)  # best first
    before = probabilities.cumsum(-1) - probabilities  # mass of the better tokens
    keep = (before < row.top_p) & (probabilities >= row.min_p * probabilities[0])
    keep[0] = True  # top_p 0 still leaves the best token
    return int(ids[_invert(probabilities * keep, row.uniform)])


def _invert(weights: torch.Tensor, uniform: float) -> int:
    """First index whose cumulative weight exceeds `uniform` of the total."""
    cumulative = weights.double().cumsum(-1)
    index = int(torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True))
    return min(index, len(weights) - 1)


def _raw_logprobs(logits: torch.Tensor, rows: list[SampleRow]) -> dict[int, torch.Tensor]:
    wanted = [i for i, row in enumerate(rows) if row.logprobs >= 0]
    return dict(zip(wanted, logits[wanted].log_softmax(-1), strict=True)) if wanted else {}


def _attach(logprobs: dict[int, torch.Tensor], tokens: list[int], rows: list[SampleRow]) -> list[TokenLogprobs | None]:
    attached: list[TokenLogprobs | None] = [None] * len(rows)
    for i, values in logprobs.items():
        best = values.topk(rows[i].logprobs) if rows[i].logprobs else None
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
        attached[i] = TokenLogprobs(float(values[tokens[i]]), top)
    return attached

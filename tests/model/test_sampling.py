"""The sampler against definitions written down independently, and its independence of company."""

import math

import msgspec
import pytest
import torch

from model.batch import Penalties, SampleRow, TokenLogprobs, uniform
from model.sampling import sample as sample_on_device
from model.sampling_params import SamplingParams

V = 50


def sample(logits: torch.Tensor, rows: list[SampleRow]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """`rows` in their order, whatever they say of it; logprobs of each, or None."""
    sampled = sample_on_device(logits, [msgspec.structs.replace(r, row=i) for i, r in enumerate(rows)])
    logprobs = sampled.host_logprobs()
    return sampled.token_ids.tolist(), [logprobs.get(i) for i in range(len(rows))]


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def row(
    i: int = 0, u: float = 0.5, t: float = 1.0, k: int = 0, p: float = 1.0, min_p: float = 0.0, **rest: object
) -> SampleRow:
    return SampleRow(i, u, t, k, p, min_p, **rest)  # type: ignore[arg-type]


def support(**options: float) -> dict[int, float]:
    """Tokens a row can draw, with their observed frequency over a fine grid of draws."""
    n = 4000
    drawn: dict[int, float] = {}
    for i in range(n):
        (token,), _ = sample(logits(), [row(u=(i + 0.5) / n, **options)])
        drawn[token] = drawn.get(token, 0) + 1 / n
    return drawn


def test_greedy_takes_the_best() -> None:
    values = logits(4)
    tokens, _ = sample(values.clone(), [row(i, t=0.0) for i in range(4)])
    assert tokens == values.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plain_sampling_follows_the_distribution(temperature: float) -> None:
    drawn = support(t=temperature)
    expected = torch.softmax(logits()[0] / temperature, -1)
    for token in range(V):
        assert drawn.get(token, 0.0) == pytest.approx(float(expected[token]), abs=1e-3)


def test_top_k_keeps_the_k_best_and_renormalises() -> None:
    drawn = support(k=3)
    best = logits()[0].topk(3)
    assert set(drawn) == set(best.indices.tolist())
    shares = torch.softmax(best.values, -1)
    for token, share in zip(best.indices.tolist(), shares.tolist(), strict=True):
        assert drawn[token] == pytest.approx(share, abs=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probabilities, ids = torch.softmax(logits()[0], -1).sort(descending=True)
    smallest = int((probabilities.cumsum(-1) < 0.6).sum()) + 1
    assert set(support(p=0.6)) == set(ids[:smallest].tolist())
    assert len(support(p=0.0)) == 1


def test_min_p_drops_what_is_far_below_the_best() -> None:
    probabilities = torch.softmax(logits()[0], -1)
    allowed = (probabilities >= 0.2 * probabilities.max()).nonzero().flatten().tolist()
    assert set(support(min_p=0.2)) == set(allowed)


def test_logit_bias_and_penalties() -> None:
    best = int(logits()[0].argmax())
    (token,), _ = sample(logits(), [row(t=0.0, logit_bias={best: -100.0, 7: 100.0})])
    assert token == 7
    values = logits()[0]
    counts = {best: 3, 5: 0}  # token 5 stands in the prompt only
    changed = logits()
    sample(changed, [row(t=0.0, penalties=Penalties(1.5, 0.25, 0.5, counts))])

    def repeated(x: float) -> float:
        return x / 1.5 if x > 0 else x * 1.5

    assert float(changed[0, best]) == pytest.approx(repeated(float(values[best])) - 3 * 0.5 - 0.25, abs=1e-5)
    assert float(changed[0, 5]) == pytest.approx(repeated(float(values[5])), abs=1e-5)
    assert float(changed[0, 8]) == float(values[8])


def test_logprobs_are_of_the_raw_logits() -> None:
    expected = logits()[0].log_softmax(-1)
    (token,), (logprobs,) = sample(logits(), [row(t=0.0, logit_bias={3: 100.0}, logprobs=2)])
    assert token == 3
    assert logprobs is not None
    assert logprobs.chosen == pytest.approx(float(expected[3]), abs=1e-6)
    assert [i for i, _ in logprobs.top] == expected.topk(2).indices.tolist()


def test_a_row_draws_the_same_in_any_company() -> None:
    kinds = [
        row(t=0.0),
        row(t=0.7),
        row(t=0.9, k=5),
        row(t=1.2, p=0.8, logprobs=3),
        row(min_p=0.1, logit_bias={1: 2.0}),
    ]
    alone = [sample(logits(1, seed=i), [r])[0][0] for i, r in enumerate(kinds)]
    together = torch.cat([logits(1, seed=i) for i in range(len(kinds))])
    assert sample(together, kinds)[0] == alone


def test_uniform_depends_on_seed_and_position_alone() -> None:
    draws = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.03
    assert uniform(3, 4) == uniform(3, 4) == uniform(3 + 2**64, 4)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 1.1), ("top_k", -1),
        ("min_p", 2.0), ("max_tokens", 0), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0), ("logprobs", 21), ("seed", 2**64), ("logit_bias", {3: 101.0}),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_named(field: str, value: object) -> None:
    params = {"max_tokens": 1, "seed": 0, field: value}
    with pytest.raises(ValueError, match=field):
        SamplingParams(**params)  # type: ignore[arg-type]

"""The sampler against definitions written down independently, and its independence of company."""

import math

import numpy as np
import pytest
import torch

from model.batch import Batch, Rules, TokenLogprobs
from model.sampler import MOST_TIMES, Sampler
from model.sampling import Draws, draw_filtered, draw_plain, uniform, uniforms
from model.sampling_params import SamplingParams
from tests.conftest import ints

V = 50
CPU = torch.device("cpu")


def step(rules: list[Rules | None], told: list[Rules], positions: list[int] | None = None) -> Batch:
    """Sequences of one token each, in slots 0, 1, ...; None: the likeliest is taken."""
    n = len(rules)
    all_ = ints(*range(n))
    before = ints(*(positions or [8] * n)) - 1
    draws = ints(*(i for i, one in enumerate(rules) if one is not None))
    return Batch(0, 0, all_, all_ * 0 + 1, before, all_, all_ * 0, ints(), -1, all_, draws, told)


def sample(logits: torch.Tensor, rules: list[Rules | None]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Tokens and logprobs of rows that have these rules, and slots in their order."""
    told = [one for one in rules if one is not None]
    sampled = Sampler(len(rules), V, 100, CPU).sample(step(rules, told), logits, {})
    assert not sampled.errors
    logprobs = sampled.row_logprobs()
    return sampled.token_ids.tolist(), [logprobs.get(i) for i in range(len(rules))]


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def support(t: float = 1.0, k: int = V, p: float = 1.0, min_p: float = 0.0) -> dict[int, float]:
    """Tokens a row can draw, with their observed frequency over a fine grid of draws."""
    n = 4000
    columns = (torch.full((n, 1), float(x)) for x in (t, k, p, min_p))
    grid = ((torch.arange(n) + 0.5) / n).double().unsqueeze(1)
    draw = draw_plain if (k, p, min_p) == (V, 1.0, 0.0) else draw_filtered
    tokens, counts = draw(logits().expand(n, V), Draws(*columns, grid)).unique(return_counts=True)
    return dict(zip(tokens.tolist(), (counts / n).tolist(), strict=True))


def test_greedy_takes_the_best() -> None:
    values = logits(4)
    tokens, _ = sample(values.clone(), [None, Rules(1, 0), Rules(2, 5), None])
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


def penalised_by_definition(values: torch.Tensor, rules: Rules, prompt: list[int], output: list[int]) -> torch.Tensor:
    """One token after another."""
    values = values.clone()
    for token in {*prompt, *output}:
        x, times = float(values[token]), output.count(token)
        x = x / rules.repetition if x > 0 else x * rules.repetition
        values[token] = x - rules.frequency * times - rules.presence * (times > 0)
    return values


def test_logit_bias_and_bans() -> None:
    best = int(logits()[0].argmax())
    assert sample(logits(), [Rules(0, 0, logit_bias={best: -100.0, 7: 100.0})])[0] == [7]
    second = int(logits()[0].topk(2).indices[1])
    for until, expected in ((8, best), (9, second)):  # the drawn token stands at position 8
        assert sample(logits(), [Rules(0, 0, banned=(best,), banned_until=until)])[0] == [expected]


@pytest.mark.parametrize("others", [0, 3])
def test_penalties_count_what_was_sampled_before(others: int) -> None:
    """Over many steps, in company, resumed in the middle, in a slot that was somebody else's."""
    torch.manual_seed(1)
    rules = {"counts": True, "repetition": 1.5, "presence": 0.25, "frequency": 0.5}
    prompt, n = [3, 4, 5, 5, 49], 1 + others
    resumed: list[int] = []
    for so_far in ([], [7, 7, 3]):
        sampler, output = Sampler(n, V, 100, CPU), list(so_far)
        former = Rules(0, 0, counts=True, repetition=9.0, prompt_ids=ints(*range(V)), output_ids=ints(*range(V)))
        sampler.sample(step([former], [former]), logits(), {})
        told = [
            Rules(i, 0, **rules, prompt_ids=ints(*{*prompt, i}), output_ids=ints(*so_far, *range(i)))  # type: ignore[arg-type]
            for i in range(n)
        ]
        for turn in range(60):
            values = logits(n, seed=turn)
            values[:, 7] += 6  # again and again
            sampled = sampler.sample(step([*told], told if turn == 0 else [], [8 + turn] * n), values.clone(), {})
            expected = penalised_by_definition(values[0], told[0], [*prompt, 0], output)
            token = int(sampled.token_ids[0])
            assert token == int(expected.argmax()), turn
            output.append(token)
        resumed.append(output.count(7))
    assert min(resumed) > 2


def test_a_count_stays_within_its_bits() -> None:
    rules = Rules(0, 0, counts=True, frequency=-1e-3, output_ids=np.full(40_000, 7, np.int32))
    sampler, values = Sampler(1, V, 100_000, CPU), torch.zeros(1, V)
    for told in ([rules], [], []):
        assert sampler.sample(step([rules], told), values, {}).token_ids.tolist() == [7]
    assert int(sampler._seen._counts[0, 7]) == MOST_TIMES


def test_logprobs_are_of_the_raw_logits() -> None:
    expected = logits(3).log_softmax(-1)
    rules = [Rules(i, 0, logit_bias={3: 100.0}, logprobs=count) for i, count in enumerate((2, -1, 0))]
    tokens, (two, none, zero) = sample(logits(3), [*rules])
    assert tokens == [3, 3, 3]
    assert none is None
    assert two is not None
    assert zero is not None
    assert zero.top == []
    assert two.chosen == pytest.approx(float(expected[0, 3]), abs=1e-6)
    assert zero.chosen == pytest.approx(float(expected[2, 3]), abs=1e-6)
    assert [i for i, _ in two.top] == expected[0].topk(2).indices.tolist()


def test_a_row_draws_the_same_in_any_company() -> None:
    kinds = [
        {},
        {"temperature": 0.7},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8, "logprobs": 3},
        {"temperature": 1.0, "min_p": 0.1, "logit_bias": {1: 2.0}},
        {"counts": True, "repetition": 1.4, "prompt_ids": ints(1, 2, 3)},
    ]
    alone = [sample(logits(1, seed=i), [Rules(0, i, **kind)])[0][0] for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    together = torch.cat([logits(1, seed=i) for i in range(len(kinds))])
    assert sample(together, [Rules(i, i, **kind) for i, kind in enumerate(kinds)])[0] == alone  # type: ignore[arg-type]


def test_a_token_that_the_model_does_not_know_is_its_askers_affair() -> None:
    rules = [Rules(0, 0, logit_bias={V: 1.0}), Rules(1, 0, logit_bias={5: 100.0})]
    sampled = Sampler(2, V, 100, CPU).sample(step([*rules], rules), logits(2), {})
    assert list(sampled.errors) == [0]
    assert int(sampled.token_ids[1]) == 5


def test_uniform_depends_on_seed_and_position_alone() -> None:
    draws = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.03
    assert uniform(3, 4) == uniform(3, 4) == uniform(3 + 2**64, 4)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    seeds, positions = np.arange(40, dtype=np.uint64), np.arange(40)
    assert uniforms(seeds, positions).tolist() == [uniform(i, i) for i in range(40)]
    correlation = np.corrcoef([[uniform(seed, position) for position in range(400)] for seed in range(20)])
    assert np.abs(correlation - np.eye(20)).max() < 0.25


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

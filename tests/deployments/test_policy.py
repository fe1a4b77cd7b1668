"""How many replicas, and which one: both pure functions of what replicas report."""

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.autoscaling import KV_USE, TOKENS_IN_FLIGHT, WAITING_TOKENS, Targets, TokenPolicy, desired_replicas
from deployments.router import Load, load_score

TARGETS = Targets(tokens_in_flight=1000, waiting_tokens=400, kv_use=0.8)


def load(tokens: float = 0, waiting: float = 0, kv: float = 0) -> dict[str, float]:
    return {TOKENS_IN_FLIGHT: tokens, WAITING_TOKENS: waiting, KV_USE: kv}


@pytest.mark.parametrize(
    ("current", "signals", "wanted"),
    [
        (1, load(), 1),
        (4, load(), 1),
        (1, load(tokens=1000), 1),
        (1, load(tokens=1001), 2),
        (2, load(tokens=3500), 4),
        (1, load(waiting=400), 1),  # a moment's queue is no reason
        (1, load(waiting=401), 3),
        (2, load(kv=1.5), 2),
        (2, load(kv=1.7), 3),
        (3, load(tokens=100, kv=0.1), 1),
    ],
)
def test_desired_replicas(current: int, signals: dict[str, float], wanted: int) -> None:
    assert desired_replicas(current, signals, TARGETS) == wanted


def context(running: int, target: int, **per_replica: list[float]) -> Any:
    metrics = {name: dict(enumerate(values)) for name, values in per_replica.items()}
    return SimpleNamespace(aggregated_metrics=metrics, running_replicas=range(running), target_num_replicas=target)


def test_the_policy_adds_up_what_replicas_report() -> None:
    policy = TokenPolicy(tokens_in_flight=1000, waiting_tokens=400, kv_use=0.8)
    assert policy(context(2, 2, **{TOKENS_IN_FLIGHT: [1500.0, 1600.0]}))[0] == 4
    assert policy(context(2, 2))[0] == 1


def test_replicas_that_still_load_are_waited_for() -> None:
    policy = TokenPolicy(tokens_in_flight=1000, waiting_tokens=400, kv_use=0.8)
    assert policy(context(1, 3, **{TOKENS_IN_FLIGHT: [9000.0]}))[0] == 3
    assert policy(context(0, 1))[0] == 1


def test_the_replica_with_the_most_room_is_the_best() -> None:
    scores = [
        load_score(Load(kv_use, waiting, routed), 64)
        for kv_use, waiting, routed in [(0.1, 0, 0), (0.1, 0, 3), (0.1, 10, 3), (0.9, 10, 3), (0.9, 64, 64)]
    ]
    assert scores == sorted(scores)
    assert load_score(Load(0.5, 0, 0), 64) < load_score(Load(0.4, 0, 32), 64), "what is on its way counts"

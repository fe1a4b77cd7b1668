"""How many replicas, and which one: both pure functions of what replicas report."""

import heapq
import random
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.routing.autoscaling import (
    KV_USE,
    TOKENS_IN_FLIGHT,
    WAITING_TOKENS,
    Targets,
    TokenPolicy,
    desired_replicas,
)
from deployments.routing.router import AS_GOOD, Load, load_score, ranking

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


def test_a_gateway_spreads_its_requests_over_replicas_with_about_as_much_room() -> None:
    def first(*loads: Load) -> int:
        return ranking(loads, 64)[0]

    assert first(Load(0.5, 0, 0, open=9), Load(0.5 + AS_GOOD / 2, 0, 0, open=8)) == 1
    assert first(Load(0.5, 0, 0, open=9), Load(0.5 + AS_GOOD * 2, 0, 0, open=0)) == 0, "room comes first"
    assert first(Load(0.51, 0, 0, open=9), Load(0.5, 0, 0, open=9)) == 1
    assert first(Load(0.5, 0, 0, True, open=0), Load(0.9, 30, 0, open=9)) == 1, "doubts come before all"
    assert first(Load(0.9, 0, 0, True), Load(0.1, 0, 0, True)) == 1, "of those in doubt, too"
    assert ranking([], 64) == []


def furthest_apart(seed: int) -> float:
    """Mean distance between the fullest and the emptiest of 3 replicas with room for 256 sequences each.

    768 streams reach them through 12 gateways, which read reports that come twice a second and are 0.5 s old.
    """
    replicas, gateways, seats, rng = 3, 12, 256, random.Random(seed)
    reported, open_by = [0] * replicas, [[0] * replicas for _ in range(gateways)]
    routed = [[0] * replicas for _ in range(gateways)]
    held: list[list[float]] = [[] for _ in range(replicas)]  # when each sequence will be finished
    ends: list[tuple[float, int, int]] = []
    now, next_report, distances = 0.0, 0.0, []

    def send() -> None:
        gateway = rng.randrange(gateways)
        loads = [
            Load(min(r, seats) / seats, max(0, r - seats), routed[gateway][i], open=open_by[gateway][i])
            for i, r in enumerate(reported)
        ]
        to = ranking(loads, seats)[0]
        routed[gateway][to] += 1
        open_by[gateway][to] += 1
        # A sequence beyond the seats waits for one: the next that ends.
        begins = now if len(held[to]) < seats else heapq.heappop(held[to])
        heapq.heappush(held[to], end := begins + rng.gammavariate(3, 6.0))
        heapq.heappush(ends, (end, gateway, to))

    old = reported[:]
    for _ in range(replicas * seats):
        send()
    while now < 120:
        if ends[0][0] > next_report:
            now, next_report = next_report, next_report + 0.5
            reported, old = old, [sum(by[i] for by in open_by) for i in range(replicas)]
            routed = [[0] * replicas for _ in range(gateways)]
            distances.append(max(old) - min(old))
            continue
        now, gateway, to = heapq.heappop(ends)
        held[to] = [end for end in held[to] if end > now]
        heapq.heapify(held[to])
        open_by[gateway][to] -= 1
        send()
    return sum(distances[60:]) / len(distances[60:])


def test_gateways_that_know_the_same_old_reports_do_not_all_send_to_the_same_replica() -> None:
    """By the reports alone 25 requests lie between the fullest and the emptiest; so, 6."""
    assert furthest_apart(0) < 12

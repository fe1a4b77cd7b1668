"""Which engine a request goes to, alone and in fleets: the router's real code, simulated engines."""

import random
from collections import Counter

import msgspec
import numpy as np
import pytest

from cluster.scheduling.prefix import Chain, Digest, root
from deployments.routing.outlook import NOTICED_S, STALE_S, Outlook, Prompt, Report
from tests.deployments.routing.fleet import Outcome, simulate

BLOCK, RATE = 16, 1000.0


def prompt(num_tokens: int, stem: int = 0) -> Prompt:
    tokens = [stem * 1000 + i for i in range(num_tokens)]
    return Prompt(num_tokens, BLOCK, Chain(root()).shorts(tokens, BLOCK))


def outlook(seed: int = 0, **reports: Report) -> Outlook:
    made = Outlook(seed)
    for name, report in reports.items():
        hear(made, name, report, 0.0)
    return made


def hear(of: Outlook, name: str, report: Report, now: float) -> bool:
    return of.hear(name, msgspec.structs.asdict(report), now)


def report(queued: float = 0.0, sequences: float = 0.0, **values: object) -> Report:
    return Report(1.0, queued, sequences, **{"prefill_rate": RATE, "decode_rate": 1000.0, **values})  # type: ignore[arg-type]


def first(of: Outlook, wanted: Prompt, now: float = 0.0, **values: object) -> str:
    names = ["a", "b"]
    return names[of.rank(names, wanted, now, **values)[0]]  # type: ignore[arg-type]


def holding(wanted: Prompt) -> Digest:
    return Digest.of(wanted.shorts, np.arange(1, len(wanted.shorts) + 1, dtype=np.int32))


def test_a_request_goes_where_its_beginning_is_until_waiting_there_costs_more() -> None:
    """1,600 tokens at 1,000 a second: 1.6 s of waiting are worth it, more are not."""
    for queued, expected in ((0, "a"), (1500, "a"), (1900, "b")):
        of = outlook(a=report(queued + NOTICED_S * RATE), b=report())
        of.hold({"a": holding(prompt(1600))})
        assert first(of, prompt(1600)) == expected
        assert of.take_decisions() == {"prefix" if expected == "a" else "room": 1}


def test_sequences_that_run_and_engines_that_are_full_count_in_seconds_too() -> None:
    assert first(outlook(a=report(sequences=9), b=report(sequences=8)), prompt(0)) == "b"
    assert first(outlook(a=report(sequences=9, is_full=True), b=report(sequences=10)), prompt(0)) == "b"
    assert first(outlook(a=report(prefill_rate=500.0), b=report()), prompt(100)) == "b", "the faster one"


def test_who_is_doubtful_comes_last_whatever_it_holds() -> None:
    of = outlook(a=report(), b=report(1e6, 300))
    of.hold({"a": holding(prompt(1600))})
    assert first(of, prompt(1600)) == "a"
    assert first(of, prompt(1600), doubtful={"a"}) == "b"
    hear(of, "b", msgspec.structs.replace(report(), stamp=2.0), STALE_S)
    assert first(of, prompt(1600), STALE_S + 0.1) == "b", "a has not been heard of"
    hear(of, "b", msgspec.structs.replace(report(is_ready=False), stamp=3.0), 0.0)
    assert first(of, prompt(1600)) == "a"
    assert of.rank([], prompt(0), 0.0) == []


def test_what_a_gateway_has_sent_is_known_before_any_report_says_so() -> None:
    of = outlook(a=report(), b=report())
    there = first(of, prompt(1600))
    of.send(there, prompt(1600), 0.0)
    assert first(of, prompt(1600, stem=1)) != there, "another prompt would wait"
    assert first(of, prompt(3200), 1.0) == there, "the same one, longer, finds half of it there"
    assert first(of, prompt(1600, stem=1), 3.0) in ("a", "b")
    assert not hear(of, "a", report(), 1.0), "no news"
    assert hear(of, there, msgspec.structs.replace(report(), stamp=2.0), 1.0)
    assert of.rank([there], prompt(0), 1.0) == [0]


def test_replicas_that_are_gone_are_forgotten() -> None:
    of = outlook(a=report(9e6), b=report())
    of.forget_all_but({"b"})
    hear(of, "a", report(), 0.0)
    assert len({first(outlook(seed, a=report(), b=report()), prompt(64)) for seed in range(20)}) == 2
    assert of.rank(["a", "b"], prompt(64), 0.0)


def test_a_burst_on_idle_engines_spreads_although_no_gateway_knows_what_the_others_send() -> None:
    """64 at once through 16 gateways to 64 engines: at random some get none and some 3 or 4; it was 16 on each of 4."""
    for seed in range(5):
        rng, names = random.Random(seed), [f"engine-{i}" for i in range(64)]
        gateways = [outlook(seed * 100 + i, **{name: report() for name in names}) for i in range(16)]
        sent: Counter[str] = Counter()
        for stem in range(64):
            gateway, wanted = rng.choice(gateways), prompt(512, stem)
            name = names[gateway.rank(names, wanted, 0.1)[0]]
            gateway.send(name, wanted, 0.1)
            sent[name] += 1
        assert len(sent) >= 36
        assert max(sent.values()) <= 5


def check(engines: int, gateways: int, seconds: float) -> tuple[Outcome, Outcome]:
    found = simulate(engines, gateways, seconds=seconds)
    ideal = simulate(engines, gateways, seconds=seconds, oracle=True)
    print(f"{engines} engines, {gateways} gateways: {found}; with all queues known: {ideal}")
    assert found.hit_rate >= 0.74
    assert found.p95 <= 1.15 * ideal.p95
    return found, ideal


def test_chats_come_back_to_what_is_cached() -> None:
    check(2, 2, 60.0)
    check(4, 3, 40.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engines", "gateways"), [(2, 1), (8, 1), (8, 4), (16, 8), (32, 16), (64, 8), (64, 16)])
def test_chats_come_back_to_what_is_cached_in_fleets_of_any_size(engines: int, gateways: int) -> None:
    check(engines, gateways, 40.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engines", "gateways"), [(4, 3), (16, 8)])
def test_a_beginning_that_most_prompts_share_spreads_before_it_overloads(engines: int, gateways: int) -> None:
    found = simulate(engines, gateways, seconds=60.0, hot=0.7)
    print(f"{engines} engines, {gateways} gateways, 70 % with one beginning: {found}")
    assert found.hit_rate >= 0.74
    assert found.busiest <= (1.25 if engines == 4 else 1.35)

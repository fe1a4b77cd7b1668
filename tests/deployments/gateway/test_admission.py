"""Which requests are taken, and what the others get: tokens against rates, tenant by tenant."""

import asyncio
import math
import random
import time
from typing import Any

import pytest

from cluster.engine import StepReport
from cluster.engine_rates import EngineRates
from deployments.config import parse_app_config
from deployments.engine.board import ReplicaStatus
from deployments.errors import ApiError
from deployments.gateway.admission import SAME_ANSWER_S, Admission, Capacity, Sizes, expected_wait
from deployments.gateway.crowd import Answer, Crowd
from deployments.gateway.tenants import ANONYMOUS, Tenant
from tests.deployments.gateway.test_gateway import ARGS
from tests.deployments.gateway.test_tenants import Guarded

BUSY = Capacity(prefill_rate=1000.0, decode_rate=400.0, max_seqs=8, kv_tokens=4000)


def status(**values: Any) -> ReplicaStatus:
    given: dict[str, Any] = {
        "replica": "r", "state": "ready", "reason": "", "loaded": 1.0, "updated_at": time.time(), "running": 0,
        "waiting": 0, "waiting_tokens": 0, "kv_blocks_used": 0, "kv_blocks_total": 250, "block_size": 16,
        "max_num_seqs": 8, "max_model_len": 256, "prefill_rate": 1000.0, "decode_rate": 400.0,
    }  # fmt: skip
    return ReplicaStatus(**{**given, **values})


def admission(target_ttft_s: float = 2.0, gateways: int = 1, **values: Any) -> Admission:
    args = {**ARGS, "admission": {"target_ttft_s": target_ttft_s}, "gateway": {"replicas": gateways}}

    async def replicas() -> list[ReplicaStatus]:
        return []

    made = Admission(parse_app_config(args), replicas)
    made.take([status(**values)])
    return made


def running(count: int, output: int = 60, prompt: int = 40) -> list[Answer]:
    """Answers with that many tokens of 100."""
    return [Answer(prompt, 100, output) for _ in range(count)]


@pytest.mark.parametrize(
    ("ahead", "new", "seconds"),
    [
        ([], [Answer(5000, 100)], 0.0),  # its own prompt does not count
        ([Answer(1000, 100)] * 3, [Answer(10, 100)], 3.0),  # prompts ahead
        (running(8), [Answer(10, 100)], 0.8),  # all 8 run, 50 tokens/s each, 40 tokens before their end
        ([*running(7), *running(1, 95)], [Answer(10, 100)], 0.1),  # one of them ends before the others
        (running(16), [Answer(10, 100)], 2.8),  # 8 wait before it: these, and one answer more
        (running(4, 500, 500), [Answer(210, 100)], 0.01),  # no KV: the first one has to end, which is about to
        ([Answer(100, 100)] * 8, [Answer(10, 100)], 2.8),  # all begin now: 800 tokens of prompts, then 100 of output
    ],
)
def test_the_wait_follows_from_tokens_and_rates(ahead: list[Answer], new: list[Answer], seconds: float) -> None:
    assert expected_wait(Crowd.of(ahead), new, BUSY, 100.0) == pytest.approx(seconds, rel=0.01)


def test_half_the_engine_is_half_as_fast() -> None:
    assert expected_wait(Crowd.of([Answer(1000, 1)]), [Answer(1, 1)], BUSY, 100.0, share=0.5) == 2.0


def test_what_ends_nobody_knows_when_is_not_waited_for() -> None:
    idle = Capacity(prefill_rate=1000.0, decode_rate=0.0, max_seqs=1, kv_tokens=4000)
    assert expected_wait(Crowd.of(running(1)), [Answer(1, 1)], idle, 100.0) == math.inf
    assert expected_wait(Crowd(), [Answer(9000, 1)], idle, 100.0) == 0.0, "an idle engine takes what comes"


def test_requests_are_taken_until_the_target_and_refused_at_once_after_it() -> None:
    door = admission(target_ttft_s=2.0, max_num_seqs=100, kv_blocks_total=10_000)
    tickets = [door.open(ANONYMOUS, [Answer(1000, 50)]) for _ in range(3)]  # 2 s of prompts ahead of the third
    with pytest.raises(ApiError) as caught:
        door.open(ANONYMOUS, [Answer(10, 50)])
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "1"
    tickets[0].grow(0, 1)
    door.open(ANONYMOUS, [Answer(10, 50)]).close()
    for ticket in tickets:
        ticket.end(0)
        ticket.close()
    assert door._open == {}
    door.check(ANONYMOUS)


def test_retry_after_is_never_longer_than_clients_wait() -> None:
    door = admission(target_ttft_s=1.0, prefill_rate=1.0)
    door.open(ANONYMOUS, [Answer(1000, 1)])
    with pytest.raises(ApiError) as caught:
        door.check(ANONYMOUS)
    assert caught.value.headers["Retry-After"] == "120"


def test_a_flood_of_one_tenant_does_not_close_the_door_to_another() -> None:
    greedy, small = Tenant(name="greedy"), Tenant(name="small")
    door = admission(target_ttft_s=2.0, max_num_seqs=8, kv_blocks_total=1000)

    def flood() -> None:
        for _ in range(100):
            door.open(greedy, [Answer(500, 100)])

    with pytest.raises(ApiError):
        flood()
    assert len(door._open) >= 5
    for _ in range(3):
        door.open(small, [Answer(200, 100)])  # up to its share it waits for nobody
    with pytest.raises(ApiError):
        door.open(greedy, [Answer(10, 10)])


def test_what_other_gateways_sent_counts_too() -> None:
    admission(waiting_tokens=9000, waiting=9, gateways=1).check(ANONYMOUS)  # old news of its own
    for theirs in ({"waiting_tokens": 9000, "waiting": 9}, {"running": 8, "running_tokens": 800, "decode_rate": 1.0}):
        with pytest.raises(ApiError):
            admission(gateways=2, **theirs).check(ANONYMOUS)


def test_without_a_ready_engine_nothing_is_refused() -> None:
    door = admission()
    door.take([])
    for _ in range(100):
        door.open(ANONYMOUS, [Answer(5000, 100)])


def test_the_average_answer_is_of_those_that_ended_once_some_have() -> None:
    sizes = Sizes()
    for _ in range(10):
        sizes.expect(1000)
    assert sizes.output == 1000
    for _ in range(10):
        sizes.end(20)
        sizes.expect(1000)
    assert sizes.output == 20


def test_rates_of_steps() -> None:
    rates = EngineRates()
    assert rates.prefill.per_second == rates.decode.per_second == 0.0
    for _ in range(100):
        rates.add(StepReport(120, 21, 0.0, [], seconds=0.1, num_prefill_tokens=100, num_sampled=20))
        rates.add(StepReport(20, 20, 0.0, [], seconds=0.1, num_prefill_tokens=0, num_sampled=20))
    assert rates.prefill.per_second == pytest.approx(1000)
    assert rates.decode.per_second == pytest.approx(200)
    for _ in range(600):
        rates.add(StepReport(20, 20, 0.0, [], seconds=0.1, num_prefill_tokens=0, num_sampled=10))
    assert rates.decode.per_second == pytest.approx(100, rel=0.01)
    assert rates.prefill.per_second == pytest.approx(1000), "no prompts say nothing about prompts"


def test_overload_over_http_is_429_in_openais_form() -> None:
    async def test() -> None:
        service = Guarded(admission={"target_ttft_s": 0.5})
        service.engine.statuses = [status(max_num_seqs=2)]
        service.engine.pause.clear()
        running = [asyncio.create_task(service.chat(max_tokens=4)) for _ in range(2)]
        while service.engine.open < 2:
            await asyncio.sleep(0.001)
        service.engine.statuses = [status(max_num_seqs=2, decode_rate=1.0)]
        await asyncio.sleep(0.6)
        started = time.perf_counter()
        refused = [await service.chat(max_tokens=4) for _ in range(20)]
        assert (time.perf_counter() - started) / 20 < 0.05
        for response in refused:
            assert response.status_code == 429
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "overloaded"
            assert 1 <= int(response.headers["retry-after"]) <= 120
        assert service.engine.open == 2
        assert (await service.client.get("/health")).status_code == 200
        assert service.metrics.counts["refused_total", "anonymous", "overloaded"] == 20
        service.engine.pause.set()
        assert [r.status_code for r in await asyncio.gather(*running)] == [200, 200]
        await asyncio.sleep(2 * SAME_ANSWER_S)
        assert (await service.chat()).status_code == 200

    asyncio.run(test())


# -- sums instead of lists --------------------------------------------------------------------------------------------


def exact_wait(ahead: list[Answer], new: list[Answer], capacity: Capacity, mean_output: float) -> float:
    """The same of every single answer, which takes the longer the more there are."""
    wait = sum(answer.waiting for answer in ahead) / capacity.prefill_rate
    running = ahead[: capacity.max_seqs]
    held = sum(answer.prompt + answer.output for answer in ahead)
    size = max(1.0, held / len(ahead)) if ahead else 1.0
    kv = (held + sum(answer.prompt for answer in new) - capacity.kv_tokens) / size
    lacking = min(len(ahead), math.ceil(max(len(ahead) + len(new) - capacity.max_seqs, kv)))
    if lacking <= 0:
        return wait
    left = sorted(max(1.0, min(mean_output, a.max_tokens) - a.output) for a in running)
    rounds, place = divmod(lacking - 1, len(left))
    begun = sum(a.waiting for a in running) / capacity.prefill_rate
    return max(wait, begun + (left[place] + rounds * mean_output) * len(running) / capacity.decode_rate)


@pytest.mark.parametrize("seed", range(200))
def test_sums_say_what_all_answers_say(seed: int) -> None:
    """Within a tenth of the average answer's time, whatever is open: so wide are the groups by length."""
    rng = random.Random(seed)
    seqs, mean = rng.choice([4, 64, 512]), rng.choice([50, 200, 1000])
    capacity = Capacity(rng.uniform(500, 20_000), rng.uniform(100, 5000), seqs, rng.choice([10**9, seqs * 300]))
    begun = [Answer(rng.randrange(1, 500), 4096, rng.randrange(1, mean)) for _ in range(rng.randrange(0, seqs + 1))]
    begun.sort(key=lambda answer: -answer.output)
    waiting = rng.randrange(0, 2 * seqs) if len(begun) == seqs else rng.randrange(0, 4)
    fresh = [Answer(rng.randrange(100, 101), 4096) for _ in range(waiting)]
    new = [Answer(100, 4096)]
    whole = exact_wait([*begun, *fresh], new, capacity, mean)
    lap = mean * max(1, min(seqs, len(begun) + waiting)) / capacity.decode_rate
    assert expected_wait(Crowd.of([*begun, *fresh]), new, capacity, mean) == pytest.approx(whole, abs=0.13 * lap)


def test_books_are_right_whatever_comes_and_goes() -> None:
    rng = random.Random(0)
    door = admission(target_ttft_s=1e9)
    tickets = []
    for _ in range(3000):
        if rng.random() < 0.3 or not tickets:
            tenant = Tenant(name=f"t{rng.randrange(5)}")
            tickets.append(door.open(tenant, [Answer(rng.randrange(1, 900), 500) for _ in range(rng.randrange(1, 4))]))
        elif rng.random() < 0.8:
            ticket = rng.choice(tickets)
            ticket.grow(rng.randrange(len(ticket.numbers)), rng.choice([0, 1, 1, 1, 40]))
        else:
            tickets.pop(rng.randrange(len(tickets))).close()
    assert door._all == Crowd.of(answer for _, answer in door._open.values())
    for name, crowded in door._tenants.items():
        assert crowded.crowd == Crowd.of(answer for whose, answer in door._open.values() if whose == name)
    for ticket in tickets:
        ticket.close()
    assert door._all == Crowd()
    assert door._tenants == {}


def test_a_check_takes_as_long_for_ten_thousand_as_for_ten() -> None:
    def seconds(count: int) -> float:
        door = admission(target_ttft_s=1e9, gateways=2)
        for i in range(count):
            door.open(Tenant(name=f"t{i % 8}"), [Answer(50, 500)]).grow(0, 1 + i % 300)
        times = []
        for _ in range(200):
            begun = time.perf_counter()
            door.check(ANONYMOUS)
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 4]  # not what the machine did meanwhile

    few, many = seconds(10), seconds(8192)
    assert many < 3 * few + 2e-5
    assert many < 1e-3

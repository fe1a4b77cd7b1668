"""Which requests are taken, and what the others get: tokens against rates, tenant by tenant."""

import asyncio
import math
import time
from typing import Any

import pytest

from cluster.engine import StepReport
from cluster.rates import EngineRates
from deployments.admission import Admission, Capacity, Load, Sizes, expected_wait
from deployments.config import parse_app_config
from deployments.errors import ApiError
from deployments.status import ReplicaStatus
from deployments.tenants import ANONYMOUS, Tenant
from tests.deployments.test_gateway import ARGS
from tests.deployments.test_tenants import Guarded

BUSY = Capacity(prefill_rate=1000.0, decode_rate=400.0, max_seqs=8, kv_tokens=4000)
SIZES = Sizes(prompt=100.0, output=100.0)


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


@pytest.mark.parametrize(
    ("ahead", "new", "seconds"),
    [
        (Load(), Load(5000, 1, 100), 0.0),  # its own prompt does not count
        (Load(3000, 3, 3000), Load(10, 1, 10), 3.0),  # prompts ahead
        (Load(0, 8, 800), Load(10, 1, 10), 0.25),  # all sequences run: one of 8 ends four times a second
        (Load(0, 4, 3990), Load(210, 1, 210), 0.25),  # no KV: 200 tokens are one request's
        (Load(100, 20, 2000), Load(10, 1, 10), 3.25),
    ],
)
def test_the_wait_follows_from_tokens_and_rates(ahead: Load, new: Load, seconds: float) -> None:
    assert expected_wait(ahead, new, BUSY, SIZES) == pytest.approx(seconds)


def test_half_the_engine_is_half_as_fast() -> None:
    assert expected_wait(Load(1000, 1, 1000), Load(1, 1, 1), BUSY, SIZES, share=0.5) == 2.0


def test_what_ends_nobody_knows_is_not_waited_for() -> None:
    idle = Capacity(prefill_rate=1000.0, decode_rate=0.0, max_seqs=1, kv_tokens=4000)
    assert expected_wait(Load(0, 1, 10), Load(1, 1, 1), idle, SIZES) == math.inf
    assert expected_wait(Load(), Load(1, 1, 1), idle, SIZES) == 0.0, "an idle engine takes what comes"


def test_requests_are_taken_until_the_target_and_refused_at_once_after_it() -> None:
    door = admission(target_ttft_s=2.0, max_num_seqs=100, kv_blocks_total=10_000)
    tickets = [door.open(ANONYMOUS, [(1000, 50)]) for _ in range(3)]  # 2 s of prompts ahead of the third
    with pytest.raises(ApiError) as caught:
        door.open(ANONYMOUS, [(10, 50)])
    assert caught.value.status == 429
    assert caught.value.headers["Retry-After"] == "1"
    tickets[0].began(1000)
    door.open(ANONYMOUS, [(10, 50)]).close(complete=False)
    for ticket in tickets:
        ticket.close(complete=True)
    assert door._total == Load()
    door.check(ANONYMOUS)


def test_retry_after_is_never_longer_than_clients_wait() -> None:
    door = admission(target_ttft_s=1.0, prefill_rate=1.0)
    door.open(ANONYMOUS, [(10_000, 1)])
    with pytest.raises(ApiError) as caught:
        door.check(ANONYMOUS)
    assert caught.value.headers["Retry-After"] == "120"


def test_a_flood_of_one_tenant_does_not_close_the_door_to_another() -> None:
    greedy, small = Tenant(name="greedy"), Tenant(name="small")
    door = admission(target_ttft_s=2.0, max_num_seqs=8, kv_blocks_total=1000)

    def flood() -> None:
        for _ in range(100):
            door.open(greedy, [(500, 100)])

    with pytest.raises(ApiError):
        flood()
    assert door._own["greedy"].open >= 5
    for _ in range(3):
        door.open(small, [(200, 100)])  # up to its share it waits for nobody
    with pytest.raises(ApiError):
        door.open(greedy, [(10, 10)])


def test_what_other_gateways_sent_counts_too() -> None:
    assert admission(waiting_tokens=9000, gateways=1)._others == Load(), "there are none"
    with pytest.raises(ApiError):
        admission(waiting_tokens=9000, waiting=9, gateways=2).check(ANONYMOUS)


def test_without_a_ready_engine_nothing_is_refused() -> None:
    door = admission()
    door.take([])
    for _ in range(100):
        door.open(ANONYMOUS, [(5000, 100)])


def test_sizes_are_those_of_ended_requests_once_there_are_some() -> None:
    sizes = Sizes()
    for _ in range(10):
        sizes.expect(100, 1000)
    assert (sizes.prompt, sizes.output) == (100, 1000)
    for _ in range(10):
        sizes.ended(50, 20)
        sizes.expect(100, 1000)
    assert (sizes.prompt, sizes.output) == (50, 20)


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
        assert (await service.chat()).status_code == 200

    asyncio.run(test())

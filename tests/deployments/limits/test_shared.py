"""One limit over all gateways, whichever of them a tenant's requests come through; and each on its own without it."""

import asyncio
import time
from typing import Any

import pytest
import ray

from deployments.errors import ApiError
from deployments.gateway.tenants import ANONYMOUS, Tenant
from deployments.limits.ledger import LedgerActor, LostLedger, RayLedger, Take, Verdict
from deployments.limits.shared import SharedLimits

pytestmark = pytest.mark.integration

TENANT = Tenant(name="t", requests_per_minute=60, tokens_per_minute=6000)


class Here:
    """A ledger in this process, which can be lost."""

    def __init__(self) -> None:
        self.actor, self.lost, self.asked = LedgerActor(), False, 0

    async def take(self, take: Take) -> Verdict:
        self.asked += 1
        if self.lost:
            raise LostLedger("away")
        return self.actor.take(take)


async def let_through(gateways: list[SharedLimits], requests: int) -> int:
    """How many of these requests are taken, spread over the gateways."""
    taken = 0
    for i in range(requests):
        try:
            await gateways[i % len(gateways)].take_request(TENANT)
        except ApiError:
            continue
        taken += 1
    return taken


def several(ledger: Any, count: int) -> list[SharedLimits]:
    return [SharedLimits(ledger, 1, lambda count: None) for _ in range(count)]


def test_sixty_a_minute_are_sixty_behind_sixteen_gateways() -> None:
    async def main() -> int:
        gateways = several(Here(), 16)
        try:
            return await let_through(gateways, 200)
        finally:
            for gateway in gateways:
                gateway.close()

    assert asyncio.run(main()) in (60, 61)


def test_tokens_that_answers_use_anywhere_are_owed_everywhere() -> None:
    async def main() -> None:
        first, second = several(Here(), 2)
        await first.take_request(TENANT)
        await second.take_prompt(TENANT, 5000)
        first.spend(TENANT, 3000)
        await asyncio.sleep(1.2)  # it is said every half second
        with pytest.raises(ApiError, match="tokens per minute: limit 6000"):
            await second.take_request(TENANT)
        for gateway in (first, second):
            gateway.close()

    asyncio.run(main())


def test_without_the_ledger_each_keeps_its_share() -> None:
    async def main() -> None:
        ledger = Here()
        counts: list[int] = []
        gateways = [SharedLimits(ledger, 1, counts.append) for _ in range(4)]
        for gateway in gateways:  # all are known
            await gateway.take_request(TENANT)
        await let_through(gateways, 4)
        assert counts[-1] == 4
        ledger.lost, asked = True, ledger.asked
        started = time.monotonic()
        taken = await let_through(gateways, 200)
        assert 48 <= taken <= 53, "what was left of 60, in four shares"
        assert ledger.asked - asked <= 4 * (2 + time.monotonic() - started), "one that is lost is not asked each time"
        assert "x-ratelimit-remaining-requests" in gateways[0].headers(TENANT)
        for gateway in gateways:
            gateway.close()

    asyncio.run(main())


def test_who_has_no_limits_asks_nobody() -> None:
    async def main() -> None:
        ledger = Here()
        gateway = SharedLimits(ledger, 1, lambda count: None)
        for _ in range(100):
            await gateway.take_request(ANONYMOUS)
            await gateway.take_prompt(ANONYMOUS, 10**9)
        gateway.spend(ANONYMOUS, 10**9)
        assert ledger.asked <= 1
        assert gateway.headers(ANONYMOUS) == {}
        gateway.close()

    asyncio.run(main())


class FoundLedger(RayLedger):
    """Finds the actor by a name of its own, where Serve does not keep it."""

    def _find(self) -> Any:
        return ray.get_actor("ledger-of-a-test")


def test_a_real_actor_is_asked_lost_and_found_again(ray_cluster: None) -> None:
    async def main() -> None:
        actor = ray.remote(LedgerActor).options(name="ledger-of-a-test", num_cpus=0).remote()
        await actor.take.remote(Take("first", None))  # it runs
        gateways = several(FoundLedger(timeout_s=5.0), 16)
        started = time.monotonic()
        taken = await let_through(gateways, 100)
        assert 60 <= taken <= 61 + time.monotonic() - started, "one comes back each second"
        await asyncio.to_thread(ray.kill, actor)
        started = time.monotonic()
        await let_through(gateways, 32)
        assert time.monotonic() - started < 5, "nobody waits for it"
        again = ray.remote(LedgerActor).options(name="ledger-of-a-test", num_cpus=0).remote()
        await again.take.remote(Take("first", None))
        await asyncio.sleep(2.5)
        started = time.monotonic()
        taken = await let_through(gateways, 100)
        assert 60 <= taken <= 61 + time.monotonic() - started
        for gateway in gateways:
            gateway.close()
        await asyncio.to_thread(ray.kill, again)

    asyncio.run(main())

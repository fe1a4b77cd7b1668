"""Limits as a gateway asks for them: those of all gateways together, or its share while nobody can tell it."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from deployments.limits.buckets import Limited, Limits, limited
from deployments.limits.ledger import LostLedger, Take, TenantLimits, Verdict

log = logging.getLogger(__name__)

SETTLE_S = 0.5  # how often it is said what answers have used
BEAT_S = 2.0  # and that this gateway is there
RETRY_S = 2.0  # a ledger that did not answer is left alone for so long


class Ledger(Protocol):
    """What keeps the count; see `ledger.RayLedger`."""

    async def take(self, take: Take) -> Verdict: ...


class SharedLimits:
    """One gateway's. `on_gateways` is told how many there are whenever that changes."""

    def __init__(self, ledger: Ledger | None, gateways: int, on_gateways: Callable[[int], None]) -> None:
        self._ledger = ledger
        self._on_gateways = on_gateways
        self._name = secrets.token_hex(8)
        self._known = Limits()  # as the ledger last said
        self._own = Limits(gateways)  # a share, to go by without it
        self._tenants: dict[str, Limited] = {}
        self._spent: Counter[str] = Counter()
        self._lost_until = 0.0
        self._settling: asyncio.Task[None] | None = None

    async def take_request(self, tenant: Limited) -> None:
        """Raises `ApiError` 429 if this request is one too many, or tokens are still owed."""
        if self._settling is None and self._ledger is not None:
            self._settling = asyncio.create_task(self._settle())
        if _is_limited(tenant) and not await self._asked(tenant, requests=1):
            self._own.take_request(tenant, time.monotonic())

    async def take_prompt(self, tenant: Limited, tokens: int) -> None:
        """Raises `ApiError` 429 if there is no room for so many tokens now."""
        if tenant.tokens_per_minute is not None and not await self._asked(tenant, tokens=tokens):
            self._own.take_prompt(tenant, tokens, time.monotonic())

    def spend(self, tenant: Limited, tokens: int) -> None:
        """Count output as it is made: nobody knows its length before."""
        if tenant.tokens_per_minute is not None:
            now = time.monotonic()
            self._tenants[tenant.name] = tenant
            self._spent[tenant.name] += tokens
            self._known.spend(tenant, tokens, now)
            self._own.spend(tenant, tokens, now)

    def headers(self, tenant: Limited) -> dict[str, str]:
        """x-ratelimit-*, as far as is known here."""
        return (self._own if self._is_lost else self._known).headers(tenant, time.monotonic())

    def close(self) -> None:
        if self._settling is not None:
            self._settling.cancel()

    @property
    def _is_lost(self) -> bool:
        return self._ledger is None or time.monotonic() < self._lost_until

    async def _asked(self, tenant: Limited, requests: int = 0, tokens: int = 0) -> bool:
        """Whether the ledger has answered. Raises `ApiError` if it says no."""
        if self._is_lost:
            return False
        spent = self._spent.pop(tenant.name, 0)
        verdict = await self._ask(Take(self._name, _limits_of(tenant), requests, tokens, spent))
        if verdict is None:
            return False
        now = time.monotonic()
        for limits in (self._known, self._own):
            limits.put(tenant, verdict.levels, now)
        if verdict.refusal is not None:
            raise limited(tenant, verdict.refusal)
        return True

    async def _ask(self, take: Take) -> Verdict | None:
        """None: it does not answer."""
        assert self._ledger is not None
        try:
            verdict = await self._ledger.take(take)
        except LostLedger as error:
            if take.spent:
                assert take.tenant is not None
                self._spent[take.tenant.name] += take.spent
            log.warning("limits hold for this gateway alone, by its share of %d: %s", self._own.gateways, error)
            self._lost_until = time.monotonic() + RETRY_S
            return None
        if verdict.gateways != self._own.gateways:
            self._own.gateways = verdict.gateways
            self._on_gateways(verdict.gateways)
        return verdict

    async def _settle(self) -> None:
        """Say what answers have used, and that this gateway is there, for as long as it is."""
        said = 0.0
        while True:
            if not self._is_lost:
                for name in list(self._spent):
                    tenant, said = self._tenants[name], time.monotonic()
                    await self._ask(Take(self._name, _limits_of(tenant), spent=self._spent.pop(name, 0)))
                if time.monotonic() - said > BEAT_S:
                    said = time.monotonic()
                    await self._ask(Take(self._name, None))
            await asyncio.sleep(SETTLE_S)


def _is_limited(tenant: Limited) -> bool:
    return tenant.requests_per_minute is not None or tenant.tokens_per_minute is not None


def _limits_of(tenant: Limited) -> TenantLimits:
    return TenantLimits(tenant.name, tenant.requests_per_minute, tenant.tokens_per_minute)

"""One count for each tenant, whichever gateway it comes through: an actor beside the gateways, kept by Serve."""

import asyncio
import time
from typing import Any, NamedTuple

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.limits.buckets import Limits, Refusal

LEDGER = "ledger"
GONE_S = 10.0  # a gateway that has not been heard of for so long is one no more


class TenantLimits(NamedTuple):
    """Of a tenant what the ledger needs to know."""

    name: str
    requests_per_minute: int | None
    tokens_per_minute: int | None


class Take(NamedTuple):
    """What a gateway asks for, or says that it has used."""

    gateway: str
    tenant: TenantLimits | None  # None: it only says that it is there
    requests: int = 0  # one, or none
    tokens: int = 0  # of a prompt
    spent: int = 0  # of answers, since it last said so


class Verdict(NamedTuple):
    """What becomes of it."""

    refusal: Refusal | None
    levels: dict[str, float]  # what is left
    gateways: int  # that are there


class LostLedger(Exception):
    """It does not answer now."""


class LedgerActor:
    """The actor. Calls are short and come one after the other."""

    def __init__(self) -> None:
        self._limits = Limits()
        self._gateways: dict[str, float] = {}

    def take(self, take: Take) -> Verdict:
        now = time.monotonic()
        self._gateways[take.gateway] = now
        self._gateways = {name: at for name, at in self._gateways.items() if now - at < GONE_S}
        tenant = take.tenant
        if tenant is None:
            return Verdict(None, {}, len(self._gateways))
        self._limits.spend(tenant, take.spent, now)
        refusal = self._limits.try_request(tenant, now) if take.requests else None
        if take.tokens:
            refusal = self._limits.try_prompt(tenant, take.tokens, now)
        return Verdict(refusal, self._limits.levels(tenant, now), len(self._gateways))


class RayLedger:
    """A gateway's way to it."""

    def __init__(self, timeout_s: float = 0.25) -> None:
        self._timeout_s = timeout_s
        self._actor: Any = None

    async def take(self, take: Take) -> Verdict:
        """Raises `LostLedger`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                self._actor = self._actor or await asyncio.to_thread(self._find)
                verdict: Verdict = await self._actor.take.remote(take)
                return verdict
        except (RayError, RayServeException, ValueError, TimeoutError) as error:
            self._actor = None  # Serve makes another one
            raise LostLedger(f"{type(error).__name__}: {error}") from None

    def _find(self) -> "ray.actor.ActorHandle[Any]":
        return serve.get_deployment_actor(LEDGER)

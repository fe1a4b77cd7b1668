"""What the page shows, once a second, worked out once for however many look."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from deployments.engine.board import ReplicaStatus
from deployments.errors import ApiError
from deployments.gateway.gateway import Gateway

PERIOD_S = 1.0
MOST_VIEWERS = 64  # of one gateway


class Feed:
    """Server-sent events for everybody who looks at one gateway's page."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._viewers = 0
        self._made_at = 0.0
        self._made: asyncio.Future[bytes] | None = None
        self._generated: dict[str, tuple[float, int]] = {}  # replica -> when its total was new, and what it was
        self._rates: dict[str, float] = {}

    def check_room(self) -> None:
        """Raises `ApiError` 503 if enough people look already."""
        if self._viewers >= MOST_VIEWERS:
            raise ApiError(503, "too many people look at this page already", headers={"Retry-After": "60"})

    async def events(self) -> AsyncIterator[bytes]:
        self._viewers += 1
        try:
            while True:
                yield await self._newest()
                await asyncio.sleep(PERIOD_S)
        finally:
            self._viewers -= 1

    async def _newest(self) -> bytes:
        now = time.monotonic()
        if self._made is None or (self._made.done() and now - self._made_at > 0.9 * PERIOD_S):
            self._made_at, self._made = now, asyncio.ensure_future(self._make())
        return await asyncio.shield(self._made)

    async def _make(self) -> bytes:
        statuses = await self._gateway.engine.replicas()
        body = {
            "model": self._gateway.config.model.name,
            "open": len(self._gateway.open_requests),
            "target_ttft_s": self._gateway.config.admission.target_ttft_s,
            "replicas": [self._shown(status) for status in sorted(statuses, key=lambda status: status.replica)],
        }
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _shown(self, status: ReplicaStatus) -> dict[str, Any]:
        gone = status.age_s > self._gateway.config.gateway.ready_max_age_s
        return {
            **msgspec.to_builtins(status),
            "state": "stalled" if gone else status.state,
            "reason": f"has not been heard of for {status.age_s:.0f} s" if gone else status.reason,
            "tokens_per_s": round(self._rate(status), 1),
        }

    def _rate(self, status: ReplicaStatus) -> float:
        """Tokens a second, by the replica's own clock between two of its reports."""
        at, total = self._generated.get(status.replica, (status.updated_at, status.generated_tokens))
        if status.updated_at > at:
            self._rates[status.replica] = max(0, status.generated_tokens - total) / (status.updated_at - at)
        self._generated[status.replica] = status.updated_at, status.generated_tokens
        return self._rates.get(status.replica, 0.0)

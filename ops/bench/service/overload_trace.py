"""More requests than a service can take: what becomes of those it accepts, and how fast it refuses the others."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ops.bench.service.load import percentiles


@dataclass(slots=True)
class Offered:
    """One request as its client saw it, in seconds."""

    at: float  # since the beginning
    status: int = 0  # 0: no answer at all
    ttft_s: float = 0.0  # of an accepted one
    seconds: float = 0.0  # until the answer's end
    retry_after: float = 0.0
    output_tokens: int = 0
    error: str = ""


async def offer(
    url: str,
    bodies: Sequence[dict[str, Any]],
    capacity: float,
    factor: float,
    seconds: float,
    every_second: Callable[[float], None],
) -> list[Offered]:
    """Requests that arrive by themselves (Poisson), in the end `factor` times as many as were accepted.

    How many that will be follows from those not refused so far, and from the `capacity` in requests/s for the rest.
    """
    rng = random.Random(0)
    offered: list[Offered] = []
    statuses: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=limits) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(_sample(started, seconds, every_second))
        at = 0.0
        while True:
            left, accepted = seconds - at, len(offered) - statuses[429]
            rate = (factor * (accepted + capacity * left) - len(offered)) / max(0.2, left)
            if (at := at + rng.expovariate(max(capacity, rate))) >= seconds:
                break
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            one = Offered(time.perf_counter() - started)
            tasks.create_task(_ask(client, url, bodies[len(offered) % len(bodies)], one, statuses))
            offered.append(one)
    return offered


async def _sample(started: float, seconds: float, every_second: Callable[[float], None]) -> None:
    while (now := time.perf_counter() - started) < seconds:
        await asyncio.to_thread(every_second, now)
        await asyncio.sleep(1.0)


async def _ask(client: httpx.AsyncClient, url: str, body: dict[str, Any], one: Offered, statuses: Counter[int]) -> None:
    began = time.perf_counter()
    try:
        async with client.stream("POST", url, json={**body, "stream": True}) as response:
            one.status = response.status_code
            statuses[one.status] += 1
            one.retry_after = float(response.headers.get("retry-after", 0))
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    one.ttft_s = one.ttft_s or time.perf_counter() - began
                    one.error = one.error or str(chunk.get("error", ""))
                    one.output_tokens = (chunk.get("usage") or {}).get("completion_tokens", one.output_tokens)
    except httpx.HTTPError as error:
        one.error = f"{type(error).__name__}: {error}"
    one.seconds = time.perf_counter() - began


def summary(offered: Sequence[Offered], seconds: float) -> dict[str, Any]:
    """Latencies of accepted and refused requests, and how they ended."""
    accepted = [one for one in offered if one.status == 200]
    refused = [one for one in offered if one.status == 429]
    return {
        "offered": len(offered),
        "offered_per_s": round(len(offered) / seconds, 1),
        "offered_over_accepted": round(len(offered) / max(1, len(accepted)), 1),
        "statuses": {str(status): count for status, count in sorted(Counter(one.status for one in offered).items())},
        "accepted": len(accepted),
        "broken": sum(bool(one.error) for one in offered),
        "errors": sorted({one.error[:200] for one in offered if one.error})[:5],
        "output_throughput": round(sum(one.output_tokens for one in accepted) / max(1.0, seconds), 1),
        "accepted_ttft_s": percentiles([one.ttft_s for one in accepted]),
        "refused_seconds": percentiles([one.seconds for one in refused]),
        "longest_retry_after_s": max((one.retry_after for one in refused), default=0.0),
    }

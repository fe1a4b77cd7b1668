"""Load over HTTP: streams at a fixed concurrency, with what clients see of them. Field names follow llmperf."""

import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import httpx
from rich.table import Table


@dataclass(slots=True)
class Stream:
    """One streamed request as the client saw it, in seconds."""

    ttft_s: float = 0.0
    end_to_end_latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # of its chunks, unix seconds
    output_tokens: int = 0
    prompt_tokens: int = 0
    text: str = ""
    error: str = ""  # why it does not count as served; empty if it does


@dataclass(frozen=True, slots=True)
class Summary:
    """A whole run."""

    requests: int
    failed: int
    seconds: float
    output_tokens: int
    request_throughput: float  # served requests/s
    output_throughput: float  # tokens/s
    total_token_throughput: float  # tokens/s, prompts included
    ttft_s: dict[str, float]
    inter_token_latency_s: dict[str, float]  # every gap of every stream
    tpot_s: dict[str, float]  # one mean per stream: time per output token after the first
    end_to_end_latency_s: dict[str, float]
    longest_gap_s: float  # that any stream had between two tokens

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def table(self, title: str) -> Table:
        table = Table("", "p50", "p95", "p99", title=title)
        for name in ("ttft_s", "inter_token_latency_s", "tpot_s", "end_to_end_latency_s"):
            values = getattr(self, name)
            table.add_row(name, *(f"{values[q] * 1000:.1f} ms" for q in ("p50", "p95", "p99")))
        table.caption = (
            f"{self.requests} requests ({self.request_throughput:.2f}/s), {self.failed} failed, "
            f"{self.output_throughput:.1f} output tok/s, "
            f"{self.total_token_throughput:.1f} total tok/s over {self.seconds:.1f} s"
        )
        return table


async def stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> Stream:
    """One request; whatever goes wrong is in its `error`, for a load test wants the count, not a traceback."""
    result = Stream()
    await stream_into(result, client, url, body, headers)
    return result


async def stream_into(
    result: Stream, client: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> None:
    """The same, filled in while it runs."""
    started = time.perf_counter()
    try:
        async with client.stream("POST", url, json={**body, "stream": True}, headers=headers) as response:
            if response.status_code == 200:
                await _follow(result, response, started)
            else:
                result.error = f"HTTP {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
    except httpx.HTTPError as error:
        result.error = f"{type(error).__name__}: {error}"
    result.end_to_end_latency_s = time.perf_counter() - started


async def _follow(result: Stream, response: httpx.Response, started: float) -> None:
    last, done = started, False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            done = True
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            result.error = str(chunk["error"].get("message"))
            return
        _take(result, chunk)
        if chunk.get("choices"):
            now = time.perf_counter()
            result.arrivals.append(time.time())
            if result.ttft_s:
                result.gaps_s.append(now - last)
            else:
                result.ttft_s = now - started
            last = now
    if not done:
        result.error = "the stream ended without [DONE]"


def _take(result: Stream, chunk: dict[str, Any]) -> None:
    for choice in chunk.get("choices", []):
        result.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    if chunk.get("usage"):
        result.output_tokens = chunk["usage"]["completion_tokens"]
        result.prompt_tokens = chunk["usage"].get("prompt_tokens", 0)


async def run(
    url: str,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    rate: float = 0.0,
    headers: dict[str, str] | None = None,
) -> tuple[Summary, list[Stream]]:
    """All bodies, `concurrency` at a time (closed loop). Each should ask for usage in the stream.

    With a `rate` they arrive by themselves, so many a second on average and at random times (open loop, Poisson), of
    which `concurrency` may be open at once.
    """
    limits = httpx.Limits(max_connections=concurrency)
    results: list[Stream] = []
    queue = list(reversed(bodies))
    rng = random.Random(0)
    arrivals = list(reversed(list(accumulate(rng.expovariate(rate) for _ in bodies)))) if rate else []
    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def worker() -> None:
            while queue:
                body = queue.pop()
                if arrivals:
                    await asyncio.sleep(max(0.0, started + arrivals.pop() - time.perf_counter()))
                results.append(await stream(client, url, body, headers))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return summarise(results, time.perf_counter() - started), results


def run_in_processes(
    url: str, bodies: Sequence[dict[str, Any]], concurrency: int, processes: int, rate: float = 0.0
) -> Summary:
    """The same from several processes, so that the clients are not what is measured: each takes its share."""
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        jobs = [
            (url, list(bodies[i::processes]), max(1, concurrency // processes), rate / processes)
            for i in range(processes)
        ]
        pool.map(_nothing, range(processes))  # their start is not what is measured either
        started = time.perf_counter()
        streams = [stream for part in pool.starmap(_run_share, jobs) for stream in part]
    return summarise(streams, time.perf_counter() - started)


def _nothing(_: int) -> None:
    time.sleep(0.2)


def _run_share(url: str, bodies: list[dict[str, Any]], concurrency: int, rate: float) -> list[Stream]:
    return asyncio.run(run(url, bodies, concurrency, rate))[1]


def summarise(results: Sequence[Stream], seconds: float) -> Summary:
    good = [r for r in results if not r.error]
    tokens = sum(r.output_tokens for r in good)
    return Summary(
        requests=len(results),
        failed=len(results) - len(good),
        seconds=seconds,
        output_tokens=tokens,
        request_throughput=len(good) / seconds,
        output_throughput=tokens / seconds,
        total_token_throughput=(tokens + sum(r.prompt_tokens for r in good)) / seconds,
        ttft_s=percentiles([r.ttft_s for r in good]),
        inter_token_latency_s=percentiles([gap for r in good for gap in r.gaps_s]),
        tpot_s=percentiles(
            [(r.end_to_end_latency_s - r.ttft_s) / (r.output_tokens - 1) for r in good if r.output_tokens > 1]
        ),
        end_to_end_latency_s=percentiles([r.end_to_end_latency_s for r in good]),
        longest_gap_s=max((gap for r in good for gap in r.gaps_s), default=0.0),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of `values`, 0 where there are none."""
    if len(values) < 2:
        only = values[0] if values else 0.0
        return {"p50": only, "p95": only, "p99": only}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}

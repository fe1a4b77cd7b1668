"""`caravan bench soak`: hours of everything that clients do, good and bad, and what grows meanwhile.

Whether something leaks is decided by slopes, not by a first and a last value: of the second half of the run, for the
first fills caches and arenas that are meant to be filled.
"""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.table import Table

from deployments.gateway.tenants import add_key
from ops.bench.service import load
from ops.bench.service.attacks import DEAR_GRAMMAR
from ops.bench.service.deployed import Deployed, deployed
from ops.local import session_processes
from ops.watch import top

SAMPLE_S = 5.0
KINDS = {"gateway": "Gateway", "engine": "ServeReplica:caravan:Engine", "stage": "StageActor"}  # a word of the title
CLIENTS = 6
MAY_GROW_PER_HOUR = 0.05  # of the level, in the second half: memory
MAY_GROW_COUNT = 3.0  # descriptors and threads, in the second half altogether
Json = dict[str, Any]


@dataclass(slots=True)
class Series:
    """One quantity over the run."""

    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, at: float, value: float) -> None:
        self.seconds.append(at)
        self.values.append(value)

    def second_half(self) -> "Series":
        middle = len(self.values) // 2
        return Series(self.seconds[middle:], self.values[middle:])

    def slope(self) -> float:
        """Per second, by Theil and Sen: the median over pairs, which single peaks do not move."""
        step = max(1, len(self.values) // 200)
        points = list(zip(self.seconds[::step], self.values[::step], strict=True))
        slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2) if t > s]
        return statistics.median(slopes) if slopes else 0.0


def verdict(series: dict[str, Series]) -> dict[str, str]:
    """What grows, and how: by the slopes of the second half."""
    growing = {}
    for name, whole in series.items():
        half = whole.second_half()
        slope, level = half.slope(), statistics.median(half.values) if half.values else 0.0
        span = half.seconds[-1] - half.seconds[0] if half.seconds else 0.0
        if name.endswith("_mb") and 3600 * slope > MAY_GROW_PER_HOUR * level:
            growing[name] = f"{3600 * slope:.0f} MB an hour at {level:.0f} MB"
        elif name.endswith(("_descriptors", "_threads")) and slope * span > MAY_GROW_COUNT:
            growing[name] = f"{slope * span:.1f} more in {span:.0f} s"
    return growing


class Crowd:
    """Clients of two tenants, one of whom behaves badly now and then."""

    def __init__(self, service: Deployed, keys: Sequence[str], seed: int) -> None:
        self._service = service
        self._headers = [{"Authorization": f"Bearer {key}"} for key in keys]
        self._rng = random.Random(seed)
        self._number = 0
        self.counts: Counter[str] = Counter()
        self.unexpected: list[str] = []

    async def one(self, client: httpx.AsyncClient) -> None:
        """Any of the things that clients do."""
        self._number += 1
        rng, headers = self._rng, self._rng.choice(self._headers)
        kind = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
        body: Json = {"model": self._service.model, "temperature": 1.0, "seed": self._number, "max_tokens": 24}
        path, expected = "/v1/completions", {200, 429}
        text = f"Number {self._number}: " + "once upon a time " * rng.randrange(1, 8)
        if kind == "long":
            body |= {"prompt": "once upon a time " * 300, "max_tokens": 8}
        elif kind == "chat":
            path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
        elif kind == "schema":
            name = f"name_{rng.randrange(40)}"
            schema = {"type": "object", "properties": {name: {"type": "string", "maxLength": 8}}, "required": [name]}
            body |= {"prompt": text, "guided_json": schema}
        elif kind == "dear":
            body, expected = body | {"prompt": text, "guided_grammar": DEAR_GRAMMAR, "max_tokens": 60}, {200, 400, 429}
        elif kind == "bad expression":
            expression = rf"(\w|\W){{1,{4000 + self._number % 900}}}"
            body, expected = body | {"prompt": text, "guided_regex": expression}, {400, 429}
        elif kind == "wrong":
            body, expected = body | {"prompt": text, "temperature": -1}, {400, 429}
        elif kind == "too long":
            body, expected = body | {"prompt": "9" * rng.randrange(10**6)}, {200, 400, 429}
        elif kind == "tokenize":
            path, body = "/tokenize", {"prompt": text * rng.randrange(1, 200)}
            expected = {200, 400, 429}
        else:
            body |= {"prompt": text, "n": rng.choice([1, 1, 2])}
        leaves_after = rng.uniform(0.05, 1.0) if kind == "leaves" else None
        await self._send(client, kind, path, body, headers, expected, leaves_after)

    async def _send(
        self, client: httpx.AsyncClient, kind: str, path: str, body: Json, headers: dict[str, str],
        expected: set[int], leaves_after: float | None,
    ) -> None:  # fmt: skip
        request = client.post(f"{self._service.url}{path}", json=body, headers=headers)
        try:
            response = await asyncio.wait_for(request, leaves_after)
        except TimeoutError:
            self.counts[f"{kind}: left"] += 1
            return
        except httpx.HTTPError as error:
            self._unexpected(kind, type(error).__name__)
            return
        self.counts[f"{kind}: {response.status_code}"] += 1
        if response.status_code not in expected:
            self._unexpected(kind, f"{response.status_code} {response.text[:200]}")

    def _unexpected(self, kind: str, what: str) -> None:
        self.counts[f"{kind}: unexpected"] += 1
        if len(self.unexpected) < 20:
            self.unexpected.append(f"{kind}: {what}")


SHARES = {
    "plain": 8, "chat": 4, "long": 2, "schema": 3, "leaves": 3, "tokenize": 2, "wrong": 1, "too long": 1, "dear": 0.3,
    "bad expression": 0.3,
}  # fmt: skip


def bench_soak(config: Path, seconds: float, haproxy: bool, seed: int = 0) -> Json:
    """Raises `LocalError`."""
    with tempfile.TemporaryDirectory(prefix="cv") as temporary:
        file = Path(temporary) / "keys.yaml"
        keys = {name: add_key(file, name) for name in ("canary", "one", "two")}
        with deployed(config, {"auth": {"keys_file": str(file)}}, haproxy) as service:
            return asyncio.run(_Soak(service, keys, seconds, seed).run())


class _Soak:
    """One run."""

    def __init__(self, service: Deployed, keys: dict[str, str], seconds: float, seed: int) -> None:
        self._service = service
        self._canary = {"Authorization": f"Bearer {keys['canary']}"}
        self._crowd = Crowd(service, [keys["one"], keys["two"]], seed)
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self._series: dict[str, Series] = {}
        self._gaps: list[float] = []  # of the canary since the last sample
        self._canary_errors: list[str] = []

    async def run(self) -> Json:
        limits = httpx.Limits(max_connections=CLIENTS + 1)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            await asyncio.gather(self._sample(), self._sing(client), *(self._work(client) for _ in range(CLIENTS)))
        kv_at_rest = await self._kv_at_rest()
        growing = verdict(self._series)
        return {
            "seconds": round(time.monotonic() - self._began),
            "requests": sum(self._crowd.counts.values()),
            "answers": dict(sorted(self._crowd.counts.items())),
            "unexpected": self._crowd.unexpected,
            "canary_errors": self._canary_errors[:5],
            "growing": growing,
            "kv_blocks_at_rest": kv_at_rest,
            "passed": not (growing or self._crowd.unexpected or self._canary_errors or kv_at_rest),
            "series": {name: {"s": s.seconds, "v": s.values} for name, s in self._series.items()},
            "machine_load": os.getloadavg()[0],
        }

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._deadline

    async def _work(self, client: httpx.AsyncClient) -> None:
        while not self._over:
            await self._crowd.one(client)

    async def _sing(self, client: httpx.AsyncClient) -> None:
        number = 0
        while not self._over:
            number += 1
            body = self._service.bodies(1, number, 16, 32)[0]
            stream = await load.stream(client, self._service.completions, body, self._canary)
            self._gaps += stream.gaps_s
            if stream.error:
                self._canary_errors.append(stream.error)
                await asyncio.sleep(0.5)

    async def _sample(self) -> None:
        while not self._over:
            await asyncio.sleep(SAMPLE_S)
            at = time.monotonic() - self._began
            for name, value in (await asyncio.to_thread(self._look)).items():
                self._series.setdefault(name, Series()).add(round(at, 1), round(value, 2))
            gaps, self._gaps = self._gaps, []
            if gaps:
                self._series.setdefault("canary_ms", Series()).add(round(at, 1), 1000 * statistics.median(gaps))

    def _look(self) -> dict[str, float]:
        found: Counter[str] = Counter()
        for pid in session_processes(self._service.head):
            try:
                process = psutil.Process(pid)
                title = " ".join(process.cmdline())
                kind = next((kind for kind, word in KINDS.items() if word in title), None)
                if kind is not None:
                    found[f"{kind}_mb"] += process.memory_info().rss / 1e6
                    found[f"{kind}_descriptors"] += process.num_fds()
                    found[f"{kind}_threads"] += process.num_threads()
            except psutil.Error:
                continue
        return {**found, "kv_blocks": self._kv_blocks()}

    def _kv_blocks(self) -> float:
        samples = top.scrape(self._service.head.metrics)
        return sum(value for (name, _), value in samples.items() if name == "kv_blocks_used")

    async def _kv_at_rest(self) -> float:
        for _ in range(30):
            await asyncio.sleep(1)
            if not (left := await asyncio.to_thread(self._kv_blocks)):
                return 0.0
        return left


def soak_table(result: Json) -> Table:
    """For people."""
    shown = Table("what", "first", "median", "last", "in the second half", title=f"{result['requests']} requests")
    for name, series in sorted(result["series"].items()):
        half = Series(series["s"], series["v"]).second_half()
        values = series["v"]
        shown.add_row(
            name, f"{values[0]:.0f}", f"{statistics.median(values):.0f}", f"{values[-1]:.0f}",
            f"{3600 * half.slope():+.1f} an hour",
        )  # fmt: skip
    growing = ", ".join(f"{name}: {how}" for name, how in result["growing"].items()) or "nothing"
    shown.caption = f"growing: {growing}; unexpected: {len(result['unexpected'])}; passed: {result['passed']}"
    return shown

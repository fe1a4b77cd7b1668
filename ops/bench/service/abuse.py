"""`caravan bench abuse`: what plain clients notice while one other client does its worst.

The same clients are measured alone and beside each attack, against one deployed service: two plain streams after each
other, and one that asks for a JSON schema nobody has asked for before. Ratios are to the mean of the quiet runs before
and after, so that a machine which is busy with something else counts on both sides.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.table import Table

from deployments.gateway.tenants import add_key
from ops.bench.service import load
from ops.bench.service.attacks import ATTACKS
from ops.bench.service.deployed import Deployed, deployed
from ops.local import session_processes

PLAIN_CLIENTS, PLAIN_TOKENS = 2, 24
MOST_INTER_TOKEN, MOST_FIRST_TOKEN, MOST_MEMORY = 1.5, 2.0, 1.2  # of quiet: what must hold
BEGIN_S = 1.0  # until an attack is under way
SETTLE_S = 60.0  # after the last attack, before memory is looked at
SAMPLE_S = 0.1
Json = dict[str, Any]


@dataclass(slots=True)
class Seen:
    """What the plain clients saw for a while."""

    first_tokens_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    constrained_s: list[float] = field(default_factory=list)  # until the first token under a new schema
    errors: list[str] = field(default_factory=list)
    gateway_mb: float = 0.0  # the most

    def as_json(self) -> Json:
        return {
            "streams": len(self.first_tokens_s),
            "inter_token_ms": _milliseconds(self.gaps_s),
            "first_token_ms": _milliseconds(self.first_tokens_s),
            "constrained_first_token_ms": _milliseconds(self.constrained_s),
            "errors": self.errors[:5],
            "failed": len(self.errors),
            "gateway_mb": round(self.gateway_mb),
        }


class Bystanders:
    """The plain clients of a service."""

    def __init__(self, service: Deployed, key: str = "") -> None:
        self._service = service
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._number = 0

    async def watch(self, seconds: float) -> Seen:
        """Ask for so long, and say what was seen."""
        seen, deadline = Seen(), time.monotonic() + seconds
        limits = httpx.Limits(max_connections=PLAIN_CLIENTS + 1)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            asking = [self._plain(client, seen, deadline) for _ in range(PLAIN_CLIENTS)]
            work = asyncio.gather(*asking, self._constrained(client, seen, deadline))
            while not work.done():
                seen.gateway_mb = max(seen.gateway_mb, gateway_mb(self._service))
                await asyncio.sleep(SAMPLE_S)
            await work
        return seen

    async def _plain(self, client: httpx.AsyncClient, seen: Seen, deadline: float) -> None:
        while time.monotonic() < deadline:
            stream = await self._ask(client, PLAIN_TOKENS)
            if stream.error:
                seen.errors.append(stream.error)
                await asyncio.sleep(0.2)
            else:
                seen.first_tokens_s.append(stream.ttft_s)
                seen.gaps_s += stream.gaps_s

    async def _constrained(self, client: httpx.AsyncClient, seen: Seen, deadline: float) -> None:
        while time.monotonic() < deadline:
            self._number += 1
            schema = {"type": "object", "properties": {f"name_{self._number}": {"type": "string", "maxLength": 5}}}
            stream = await self._ask(client, 2, guided_json=schema)
            if stream.error:
                seen.errors.append(f"constrained: {stream.error}")
            else:
                seen.constrained_s.append(stream.ttft_s)
            await asyncio.sleep(0.5)

    async def _ask(self, client: httpx.AsyncClient, tokens: int, **more: Any) -> load.Stream:
        self._number += 1
        body = self._service.bodies(1, self._number, 16, tokens)[0]
        if more:
            del body["ignore_eos"]
        return await load.stream(client, self._service.completions, {**body, **more}, self._headers)


def bench_abuse(config: Path, kinds: Sequence[str], seconds: float, with_keys: bool, haproxy: bool) -> Json:
    """Every attack for so long, each between two quiet spells; then memory a minute later. Raises `LocalError`."""
    with tempfile.TemporaryDirectory(prefix="cv") as temporary:
        keys = {"good": "", "bad": ""}
        sections: dict[str, Json] = {}
        if with_keys:
            file = Path(temporary) / "keys.yaml"
            keys = {name: add_key(file, name) for name in keys}
            sections["auth"] = {"keys_file": str(file)}
        with deployed(config, sections, haproxy) as service:
            return asyncio.run(_measure(service, keys, kinds, seconds))


async def _measure(service: Deployed, keys: dict[str, str], kinds: Sequence[str], seconds: float) -> Json:
    bystanders = Bystanders(service, keys["good"])
    await bystanders.watch(3)  # warm: the first grammar starts the process that compiles
    quiet = [await bystanders.watch(seconds)]
    rows = []
    for kind in kinds:
        attack, answers = await _beside(service, kind, seconds, bystanders, keys["bad"])
        quiet.append(await bystanders.watch(seconds))
        rows.append(_row(kind, quiet[-2:], attack, answers))
    await asyncio.sleep(SETTLE_S)
    after = gateway_mb(service)
    return {
        "with_keys": bool(keys["bad"]),
        "seconds": seconds,
        "attacks": rows,
        "gateway_mb": {"quiet": round(quiet[0].gateway_mb), "a_minute_later": round(after)},
        "memory_held": after <= MOST_MEMORY * quiet[0].gateway_mb,
        "machine_load": os.getloadavg()[0],
    }


async def _beside(
    service: Deployed, kind: str, seconds: float, bystanders: Bystanders, key: str
) -> tuple[Seen, dict[str, int]]:
    """What is seen beside an attack, and what the attacker was answered."""
    command = [sys.executable, "-m", "ops.bench.service.attacks", service.url, service.model, kind]
    command.append(str(seconds + 2 * BEGIN_S))
    attacker = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "CARAVAN_ABUSE_KEY": key})
    try:
        await asyncio.sleep(BEGIN_S)
        seen = await bystanders.watch(seconds)
        out, _ = await asyncio.to_thread(attacker.communicate, timeout=60)
        return seen, json.loads(out or b"{}")
    finally:
        attacker.kill()


def _row(kind: str, quiet: Sequence[Seen], attack: Seen, answers: dict[str, int]) -> Json:
    alone = Seen(
        [s for seen in quiet for s in seen.first_tokens_s],
        [s for seen in quiet for s in seen.gaps_s],
        [s for seen in quiet for s in seen.constrained_s],
        gateway_mb=max(seen.gateway_mb for seen in quiet),
    )
    ratios = {
        "inter_token_p50": _ratio(attack.gaps_s, alone.gaps_s, "p50"),
        "inter_token_p99": _ratio(attack.gaps_s, alone.gaps_s, "p99"),
        "first_token_p50": _ratio(attack.first_tokens_s, alone.first_tokens_s, "p50"),
        "first_token_latest": round(max(attack.first_tokens_s, default=0) / max(alone.first_tokens_s), 2),
        "constrained_p50": _ratio(attack.constrained_s, alone.constrained_s, "p50"),
    }
    holds = (
        ratios["inter_token_p99"] <= MOST_INTER_TOKEN
        and ratios["first_token_latest"] <= MOST_FIRST_TOKEN
        and bool(attack.first_tokens_s)
        and not attack.errors
        and not any(status.startswith("5") and status != "503" for status in answers)
    )
    return {
        "attack": kind,
        "holds": holds,
        "ratios": ratios,
        "quiet": alone.as_json(),
        "beside": attack.as_json(),
        "attacker_was_answered": answers,
    }


def gateway_mb(service: Deployed) -> float:
    """Resident memory of the largest gateway."""
    found = [0.0]
    for pid in session_processes(service.head):
        try:
            process = psutil.Process(pid)
            if "Gateway" in process.name() or any("Gateway" in word for word in process.cmdline()):
                found.append(process.memory_info().rss / 1e6)
        except psutil.Error:
            continue
    return max(found)


def _ratio(values: Sequence[float], quiet: Sequence[float], quantile: str) -> float:
    return round(load.percentiles(values)[quantile] / max(1e-9, load.percentiles(quiet)[quantile]), 2)


def _milliseconds(values: Sequence[float]) -> Json:
    found = {name: round(1000 * value, 1) for name, value in load.percentiles(values).items()}
    mean = round(1000 * statistics.fmean(values), 1) if values else 0.0
    return {**found, "mean": mean, "most": round(1000 * max(values, default=0.0), 1)}


def abuse_table(result: Json) -> Table:
    """For people."""
    shown = Table(
        "attack", "holds", "inter-token p50, p99", "first token p50, latest", "new schema p50", "failed", "gateway MB",
        "the attacker was answered",
        title=f"Beside one attacker; ratios to the same clients alone; {'with' if result['with_keys'] else 'no'} keys",
    )  # fmt: skip
    for row in result["attacks"]:
        r = row["ratios"]
        shown.add_row(
            row["attack"],
            "yes" if row["holds"] else "NO",
            f"{r['inter_token_p50']}, {r['inter_token_p99']}",
            f"{r['first_token_p50']}, {r['first_token_latest']}",
            str(r["constrained_p50"]),
            str(row["beside"]["failed"]),
            str(row["beside"]["gateway_mb"]),
            ", ".join(f"{n} x {what}" for what, n in sorted(row["attacker_was_answered"].items())),
        )
    memory = result["gateway_mb"]
    shown.caption = f"gateway: {memory['quiet']} MB at first, {memory['a_minute_later']} MB a minute after the last one"
    return shown


KINDS = (*ATTACKS, "all")

"""`caravan bench overload`: a service of its own on this machine, with what it can take, then with ten times as much.

What must hold: accepted requests have their first token within twice the target, refused ones know it within 50 ms, and
the gateway's memory stays as it was.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from ops.bench.service import load, overload_trace
from ops.bench.service.deployed import Deployed, all_served, deployed
from ops.local import Head, LocalError, session_processes

PROMPT_TOKENS, NEW_TOKENS = 100, 32
MAX_SEQS = 16  # few: what is tested is admission, and a small machine can offer ten times what such a service takes
Json = dict[str, Any]


def gateway_process(head: Head) -> psutil.Process:
    for pid in session_processes(head):
        process = psutil.Process(pid)
        if "ServeReplica" in (line := " ".join(process.cmdline())) and "Gateway" in line:
            return process
    raise LocalError("no gateway process was found")


def bench_overload(config: Path, target_ttft_s: float, seconds: float, factor: float, haproxy: bool) -> Json:
    """Capacity, then `factor` times as much for so many seconds."""
    sections: dict[str, Json] = {"scheduler": {"max_num_seqs": MAX_SEQS}, "admission": {"target_ttft_s": target_ttft_s}}
    with deployed(config, sections, haproxy) as service:
        return {"target_ttft_s": target_ttft_s, "haproxy": haproxy, **_measure(service, seconds, factor)}


def _measure(service: Deployed, seconds: float, factor: float) -> Json:
    def bodies(count: int, first: int) -> list[Json]:
        return service.bodies(count, first, PROMPT_TOKENS, NEW_TOKENS)

    path = service.completions
    asyncio.run(load.run(path, bodies(2 * MAX_SEQS, 50_000), MAX_SEQS))  # warm
    # A few more than run at once, so that there is always one to take the place of one that ended.
    capacity, _ = asyncio.run(load.run(path, bodies(8 * MAX_SEQS, 0), MAX_SEQS + 4))
    rate = all_served(capacity).request_throughput
    gateway = gateway_process(service.head)
    memory: list[tuple[float, float]] = []

    def sample(at: float) -> None:
        memory.append((round(at, 1), round(gateway.memory_info().rss / 1e6, 1)))

    sample(-1.0)
    asked = bodies(int(2 * factor * rate * seconds), 1000)
    offered = asyncio.run(overload_trace.offer(path, asked, rate, factor, seconds, sample))
    after, _ = asyncio.run(load.run(path, bodies(8, 90_000), 1))
    rss = [mb for _, mb in memory]
    return {
        "max_num_seqs": MAX_SEQS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "capacity_requests_per_s": round(rate, 2),
        "capacity_ttft_s": capacity.ttft_s,
        "factor": factor,
        **overload_trace.summary(offered, seconds),
        "gateway_rss_mb": {"before": rss[0], "lowest": min(rss), "highest": max(rss), "trace": memory},
        "ttft_alone_after_s": after.ttft_s,
        "machine_load": os.getloadavg()[0],
    }


def overload_table(result: Json) -> Table:
    """Each figure beside its aim."""
    table = Table(
        "",
        "measured",
        "aim",
        title=f"{result['factor']:g} times the capacity of {result['capacity_requests_per_s']} requests/s",
    )
    rss, target = result["gateway_rss_mb"], result["target_ttft_s"]
    rows = (
        (
            "offered",
            f"{result['offered_per_s']} a second, {result['offered_over_accepted']} times what was accepted",
            "",
        ),
        ("neither answered nor refused", str(result["broken"]), "0"),
        ("first token of accepted, p50", f"{result['accepted_ttft_s']['p50']:.2f} s", ""),
        ("first token of accepted, p99", f"{result['accepted_ttft_s']['p99']:.2f} s", f"{2 * target:g} s"),
        ("refused within, p50", f"{1000 * result['refused_seconds']['p50']:.0f} ms", ""),
        ("refused within, p99", f"{1000 * result['refused_seconds']['p99']:.0f} ms", "50 ms"),
        ("Retry-After, longest", f"{result['longest_retry_after_s']:.0f} s", "120 s"),
        ("gateway memory", f"{rss['before']:.0f} MB, {rss['lowest']:.0f} to {rss['highest']:.0f} under load", "+-10%"),
    )
    for row in rows:
        table.add_row(*row)
    return table

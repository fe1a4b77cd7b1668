"""The same question over HTTP: `caravan bench fairness --deploy FILE`.

A service of its own on this machine that asks for keys, and two tenants, one of whom wants ten times as much. Requests
arrive by themselves, at the same times whether the other tenant is there or not.
"""

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from deployments.gateway.tenants import add_key
from ops.bench.service import load
from ops.bench.service.deployed import Deployed, all_served, deployed
from ops.watch import top

PROMPT_TOKENS, NEW_TOKENS, MAX_SEQS = 100, 32, 8
TARGET_TTFT_S = 10.0
METRICS_S = 5.0  # until what was counted can be read at the metrics endpoint
DEMAND = 10  # what the greedy tenant wants, in what the small one wants
Json = dict[str, Any]


def bench_fairness_http(config: Path, shares: list[float], seconds: float) -> Json:
    """A small tenant that wants such shares of the service, for so many seconds alone, and as long beside the other."""
    with tempfile.TemporaryDirectory(prefix="cv") as temporary:
        file = Path(temporary) / "keys.yaml"
        keys = {name: add_key(file, name) for name in ("small", "greedy")}
        sections: dict[str, Json] = {
            "scheduler": {"max_num_seqs": MAX_SEQS},
            "admission": {"target_ttft_s": TARGET_TTFT_S},
            "auth": {"keys_file": str(file)},
        }
        with deployed(config, sections, haproxy=False) as service:
            return asyncio.run(_Tenants(service, keys).measure(shares, seconds))


class _Tenants:
    """Two keys for one service, and the tokens that each was sent."""

    def __init__(self, service: Deployed, keys: dict[str, str]) -> None:
        self._service = service
        self._headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
        self._received = dict.fromkeys(keys, 0)
        self._next = 0

    async def measure(self, shares: list[float], seconds: float) -> Json:
        await self._ask("greedy", 4 * MAX_SEQS, MAX_SEQS)  # warm
        capacity = all_served(await self._ask("greedy", 12 * MAX_SEQS, MAX_SEQS + 2))
        rows = [await self._row(share, capacity, seconds) for share in shares]
        await asyncio.sleep(METRICS_S)
        metered = {name: int(self._metered(name)) for name in self._received}
        return {
            "capacity_tokens_per_s": round(capacity.output_throughput, 1),
            "max_num_seqs": MAX_SEQS,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "seconds": seconds,
            "shares": rows,
            "tokens_received": self._received,
            "tokens_metered": metered,  # by tenant_generated_tokens_total
            "machine_load": os.getloadavg()[0],
        }

    async def _row(self, share: float, capacity: load.Summary, seconds: float) -> Json:
        rate = share * capacity.request_throughput
        count = max(2, round(rate * seconds))
        alone = await self._ask("small", count, count, rate)
        small, greedy = await asyncio.gather(
            self._ask("small", count, count, rate), self._ask("greedy", DEMAND * count, DEMAND * count, DEMAND * rate)
        )
        fair = min(alone.output_throughput, capacity.output_throughput / 2)
        return {
            "share_wanted": share,
            "requests": count,
            "fair_share_tokens_per_s": round(fair, 1),
            "of_fair_share": round(small.output_throughput / fair, 3),
            "ttft_p50_ratio": round(small.ttft_s["p50"] / alone.ttft_s["p50"], 2),
            "ttft_p99_ratio": round(small.ttft_s["p99"] / alone.ttft_s["p99"], 2),
            **{name: _of(s) for name, s in (("alone", alone), ("small", small), ("greedy", greedy))},
        }

    async def _ask(self, name: str, count: int, concurrency: int, rate: float = 0.0) -> load.Summary:
        bodies = self._service.bodies(count, self._next, PROMPT_TOKENS, NEW_TOKENS)
        self._next += count
        summary, streams = await load.run(self._service.completions, bodies, concurrency, rate, self._headers[name])
        self._received[name] += sum(stream.output_tokens for stream in streams)
        return summary

    def _metered(self, name: str) -> float:
        samples = top.scrape(self._service.head.metrics)
        wanted = "tenant_generated_tokens_total"
        return sum(
            value for (metric, labels), value in samples.items() if metric == wanted and ("tenant", name) in labels
        )


def _of(summary: load.Summary) -> Json:
    return {
        "requests": summary.requests,
        "refused": summary.failed,
        "output_throughput": round(summary.output_throughput, 1),
        "ttft_s": summary.ttft_s,
        "tpot_s": summary.tpot_s,
    }


def fairness_http_table(result: Json) -> Table:
    """For people."""
    shown = Table(
        "small wants", "gets, of its fair share", "TTFT p50, p99 alone", "beside greedy", "ratios",
        "refused", "greedy gets tok/s", "refused",
        title=f"{result['capacity_tokens_per_s']:.0f} tok/s to share; greedy wants ten times as much",
    )  # fmt: skip
    for r in result["shares"]:
        ttft = {name: [f"{1000 * r[name]['ttft_s'][q]:.0f}" for q in ("p50", "p99")] for name in ("alone", "small")}
        shown.add_row(
            f"{r['share_wanted']:.0%}", f"{r['of_fair_share']:.1%}", f"{', '.join(ttft['alone'])} ms",
            f"{', '.join(ttft['small'])} ms", f"{r['ttft_p50_ratio']:.2f}, {r['ttft_p99_ratio']:.2f}",
            f"{r['small']['refused']} of {r['small']['requests']}", f"{r['greedy']['output_throughput']:.0f}",
            f"{r['greedy']['refused']} of {r['greedy']['requests']}",
        )  # fmt: skip
    return shown

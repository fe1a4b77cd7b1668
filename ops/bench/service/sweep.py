"""A running service over HTTP, streamed, on the fixed list: one load (`bench serve`) or many (`bench sweep`)."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ops.bench import workload
from ops.bench.plot import Point
from ops.bench.service import load

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: `concurrency` at a time (closed loop), or `rate` a second by themselves (open loop)."""

    concurrency: int = 0
    rate: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.rate:g}/s" if self.rate else f"{self.concurrency}"


def bodies(model: str, count: int, vocab_size: int, longest: int) -> list[Json]:
    """Requests of the list in ops/bench/workload.py, cut to `longest` tokens each way."""
    return [
        {
            "model": model,
            "prompt": workload.prompt(i, min(prompt, longest), vocab_size),
            "max_tokens": min(new, longest),
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        for i, (prompt, new) in enumerate(workload.lengths(count))
    ]


def measure(url: str, requests: list[Json], how: Load, processes: int) -> load.Summary:
    """All requests under one load. In an open loop every one may be open at once: nothing holds arrivals back."""
    at_once = len(requests) if how.rate else how.concurrency
    return load.run_in_processes(f"{url}/v1/completions", requests, at_once, min(processes, at_once), how.rate)


def as_json(how: Load, summary: load.Summary, processes: int) -> Json:
    return {"concurrency": how.concurrency, "rate": how.rate, "processes": processes, **asdict(summary)}


def sweep_table(title: str, results: list[tuple[Load, load.Summary]]) -> Table:
    """For people: a row for each load."""
    table = Table("streams or rate", "failed", "requests/s", "output tok/s", title=title, box=None)
    table.caption = "latencies: p50/p99, ms"
    columns = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("end to end", "end_to_end_latency_s"))
    for name, _ in columns:
        table.add_column(name, justify="right")
    for how, s in results:
        latencies = (getattr(s, field) for _, field in columns)
        cells = (f"{1000 * q['p50']:.0f}/{1000 * q['p99']:.0f}" for q in latencies)
        table.add_row(how.label, str(s.failed), f"{s.request_throughput:.2f}", f"{s.output_throughput:.1f}", *cells)
    return table


def sweep_points(results: list[tuple[Load, load.Summary]]) -> list[Point]:
    """For the plot: what a stream waits between tokens, by what all streams get."""
    return [
        Point(how.label, s.output_throughput, {q: s.tpot_s[q] for q in ("p50", "p99")})
        for how, s in sorted(results, key=lambda item: item[1].output_throughput)
    ]


def batch_points(batches: list[Json]) -> list[Point]:
    """The same of the engine alone, by batch size; its streams are all alike."""
    return [
        Point(f"batch {b['batch']}", b["output_throughput"], {"p50": b["ms_per_token"] / 1000})
        for b in sorted(batches, key=lambda b: float(b["output_throughput"]))
    ]

"""What each pipeline did while a load lasted, from the metrics that operators see."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import Any

import httpx

from ops.watch.top import ReplicaView, Sample, quantile, scrape, summarise

PERIOD_S = 2.0

Json = dict[str, Any]
Seen = list[tuple[float, Sample]]  # when it was read (`time.monotonic`), and what


@contextmanager
def watching(url: str, period_s: float = PERIOD_S) -> Iterator[Seen]:
    """Read the metrics endpoint at its begin, every so often, and at its end; what could not be read is missing."""
    seen: Seen = []
    over = threading.Event()

    def look() -> None:
        with suppress(httpx.HTTPError):
            seen.append((time.monotonic(), scrape(url)))

    def watch() -> None:
        look()
        while not over.wait(period_s):
            look()
        look()

    thread = threading.Thread(target=watch, name="watching", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def middle_half(seen: Seen) -> list[Json]:
    """Each pipeline between the first and the last quarter of what was seen, without ramp and end; [] if too little.

    `running` and `waiting` are means of requests, a stage's `busy`, `waiting` and `transfer` shares of the time.
    """
    middle = seen[len(seen) // 4 : len(seen) - len(seen) // 4]
    if len(middle) < 2:
        return []
    moments = [summarise({}, sample, 1.0).replicas for _, sample in middle]
    (began, first), (ended, last) = middle[0], middle[-1]
    return [
        {
            "running": round(fmean(m.running for m in _of(view, moments)), 1),
            "waiting": round(fmean(m.waiting for m in _of(view, moments)), 1),
            "output_throughput": round(view.output_tokens, 1),
            "stages": [
                {"busy": round(s.busy, 4), "waiting": round(s.waiting, 4), "transfer": round(s.transfer, 4)}
                for s in view.stages
            ],
        }
        for view in summarise(first, last, ended - began).replicas
    ]


def _of(view: ReplicaView, moments: list[list[ReplicaView]]) -> list[ReplicaView]:
    """The same replica at all moments."""
    return [replica for moment in moments for replica in moment if replica.replica == view.replica]


def moved(seen: Seen) -> Json:
    """Streams that went on with another engine meanwhile, by cause, and the seconds they had none; {} if too little.

    Quantiles are upper edges of the histogram's buckets, None beyond the last one.
    """
    if len(seen) < 2:
        return {}
    (_, before), (_, after) = seen[0], seen[-1]
    counts: dict[str, int] = {}
    for (name, labels), value in after.items():
        if name == "streams_resumed_total" and (count := round(value - before.get((name, labels), 0.0))):
            cause = dict(labels)["cause"]
            counts[cause] = counts.get(cause, 0) + count
    pauses = {f"p{q}": quantile(q / 100, "stream_pause_seconds", before, after) for q in (50, 95, 99)}
    return {
        "streams_moved": counts,
        "stream_pause_s": {name: edge if math.isfinite(edge) else None for name, edge in pauses.items()},
    }

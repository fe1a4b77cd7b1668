"""What the second tier of the cache is worth: conversations that come back from host memory, and what others pay."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cluster.config import read_model
from cluster.engine import Engine
from cluster.scheduling.sequence import TokenEvent
from deployments.config import AppConfig
from ops.bench import workload
from ops.bench.engine.run import Run, engine_in, placed, serve_all, submit
from ops.bench.service.load import percentiles

Json = dict[str, Any]
SETTLE_S = 0.5  # what was computed last is copied by then
REPEATS = 3


@dataclass(slots=True)
class Watched(Run):
    """A run that keeps the times between the tokens of some requests."""

    gaps: list[float] = field(default_factory=list)
    _last: dict[str, float] = field(default_factory=dict)

    def on_tokens(self, events: list[TokenEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            if event.request_id.startswith("other"):
                if event.request_id in self._last:
                    self.gaps.append(now - self._last[event.request_id])
                self._last[event.request_id] = now
        Run.on_tokens(self, events)


def bench_copies(config: AppConfig, num_tokens: int, others: int, returning: int) -> Json:
    """A conversation of `num_tokens` that was evicted; then `returning` of them at once beside `others` that decode.

    Needs a running Ray, and `cache.host_gb` with room for twice the device's cache.
    """
    without = config.model_copy(update={"cache": config.cache.model_copy(update={"host_gb": 0.0})})
    vocabulary = read_model(config.model).vocab_size
    result: Json = {"num_tokens": num_tokens, "others": others, "returning": returning}
    with placed(config) as group:
        for name, one in (("with", config), ("without", without)):
            with engine_in(one, group, Watched()) as (engine, run):
                assert isinstance(run, Watched)
                result[name] = _measure(engine, run, num_tokens, others, returning, vocabulary)
    return result


def _measure(engine: Engine, run: Watched, num_tokens: int, others: int, returning: int, vocabulary: int) -> Json:
    talks = [workload.prompt(80_000 + i, num_tokens, vocabulary) for i in range(max(returning, REPEATS))]
    nothing_to_gain = [(workload.prompt(90_000 + i, 128, vocabulary), 64) for i in range(4 * others)]
    serve_all(engine, run, nothing_to_gain, "warm")
    throughput = serve_all(engine, run, nothing_to_gain[::-1], "throughput")["output_throughput"]
    engine.reset_cache()
    computed = [_first_token(engine, run, talk, f"computed{i}") for i, talk in enumerate(talks)]
    _evict(engine, run, num_tokens, vocabulary)
    returned = [_first_token(engine, run, talk, f"returned{i}") for i, talk in enumerate(talks[:REPEATS])]
    _evict(engine, run, num_tokens, vocabulary)
    alone, beside = _gaps(engine, run, talks[:returning], others, vocabulary)
    stats = engine.scheduler.stats()
    return {
        "first_token_computed_s": round(statistics.median(computed), 4),
        "first_token_returned_s": round(statistics.median(returned), 4),
        "output_tokens_per_s": throughput,
        "inter_token_alone_s": {q: round(v, 4) for q, v in percentiles(alone).items()},
        "inter_token_beside_s": {q: round(v, 4) for q, v in percentiles(beside).items()},
        "copied_back_tokens": stats.host_hit_tokens,
        "damaged": stats.host.damaged,
    }


def _first_token(engine: Engine, run: Run, prompt: list[int], name: str) -> float:
    submit(engine, run, [(prompt, 1)], name)
    run.wait()
    time.sleep(SETTLE_S)
    progress = next(iter(run.requests.values()))
    return progress.first - progress.added


def _evict(engine: Engine, run: Run, num_tokens: int, vocabulary: int) -> None:
    """By prompts that take all of the device's blocks."""
    blocks = engine.scheduler.blocks
    count = -(-blocks.num_blocks * blocks.block_size // num_tokens) + 1
    prompts = [(workload.prompt(100_000 + i, num_tokens, vocabulary), 1) for i in range(count)]
    serve_all(engine, run, prompts, "evict", 4)
    time.sleep(SETTLE_S)


def _gaps(
    engine: Engine, run: Watched, talks: list[list[int]], others: int, vocabulary: int
) -> tuple[list[float], list[float]]:
    """Between tokens of others: undisturbed, and from when these come back until all have their first token."""
    decoding = [(workload.prompt(110_000 + i, 128, vocabulary), 256) for i in range(others)]
    ids = submit(engine, run, decoding, "other")
    run.wait(lambda run: min(run.requests[i].tokens for i in ids) >= 32)
    run.gaps.clear()
    run.wait(lambda run: min(run.requests[i].tokens for i in ids) >= 96)
    alone = list(run.gaps)
    run.gaps.clear()
    submit(engine, run, [(talk, 1) for talk in talks], "back")
    run.wait()
    beside = list(run.gaps)
    for name in ids:
        engine.abort(name)
    return alone, beside


def copies_table(title: str, result: Json) -> Table:
    """For people."""
    table = Table("", "host tier", "without", title=title)

    def row(name: str, key: str, form: str = "{:.3f} s") -> None:
        table.add_row(name, *(form.format(result[one][key]) for one in ("with", "without")))

    row(f"first token of {result['num_tokens']} tokens, computed", "first_token_computed_s")
    row("the same, come back after eviction", "first_token_returned_s")
    row("output with nothing to gain", "output_tokens_per_s", "{:.1f} tok/s")
    beside = f"while {result['returning']} come back"
    for name, key in (("alone", "inter_token_alone_s"), (beside, "inter_token_beside_s")):
        shown = [result[one][key].items() for one in ("with", "without")]
        cells = [", ".join(f"{q} {1000 * value:.1f} ms" for q, value in values) for values in shown]
        table.add_row(f"between tokens of {result['others']} others, {name}", *cells)
    row("tokens copied back", "copied_back_tokens", "{:,}")
    return table

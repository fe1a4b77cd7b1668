"""What the death of a stage costs: kill -9 of one in the middle of many streams, beside an undisturbed run."""

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cluster.engine import Engine, RecoveryReport
from cluster.ray_pipeline import RayPipeline
from cluster.scheduling.sequence import TokenEvent
from deployments.config import AppConfig
from ops.bench import workload
from ops.bench.engine.run import Run, placed, submit
from ops.bench.service.load import percentiles

Json = dict[str, Any]


@dataclass(slots=True)
class Recording(Run):
    """A run that keeps every token, and the longest silence between two messages."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    longest_gap: float = 0.0
    rebuilt: float = 0.0  # when the pipeline was last; 0: never
    next_tokens: dict[str, float] = field(default_factory=dict)  # seconds from there to each stream's next token
    _heard: float = 0.0

    def on_tokens(self, events: list[TokenEvent]) -> None:
        now = time.monotonic()
        self.longest_gap = max(self.longest_gap, now - (self._heard or now))
        self._heard = now
        for event in events:
            self.token_ids.setdefault(event.request_id, []).append(event.token_id)
            if self.rebuilt:
                self.next_tokens.setdefault(event.request_id, now - self.rebuilt)
        Run.on_tokens(self, events)

    def on_recovery(self, report: RecoveryReport) -> None:
        self.rebuilt = time.monotonic()
        Run.on_recovery(self, report)


def bench_recovery(config: AppConfig, streams: int, new_tokens: int, stage: int, prompt_tokens: int = 128) -> Json:
    """`streams` equal requests twice, stage number `stage` being killed in the second run. Needs a running Ray."""
    from cluster.launch import launch_engine

    requests = [(workload.prompt(70_000 + i, prompt_tokens), new_tokens) for i in range(streams)]
    run = Recording()
    with placed(config) as group:
        started = time.monotonic()
        engine = launch_engine(config, group, 1, run)
        start_s = time.monotonic() - started
        try:
            assert isinstance(engine.pipeline, RayPipeline)
            undisturbed = _tokens(engine, run, requests, "undisturbed", None)
            before, run.longest_gap = [report.pid for report in engine.pipeline.stages], 0.0
            disturbed = _tokens(engine, run, requests, "disturbed", before[stage])
            after = [report.pid for report in engine.pipeline.stages]
        finally:
            engine.close()
    engine.scheduler.check()
    return {
        "streams": streams,
        "new_tokens": new_tokens,
        "killed_stage": stage,
        "start_s": round(start_s, 2),
        "recovery_s": [round(report.seconds, 2) for report in run.recoveries],
        "stages_replaced": sum(report.num_replaced for report in run.recoveries),
        "survivors": sum(old == new for old, new in zip(before, after, strict=True)),
        "longest_pause_s": round(run.longest_gap, 2),
        "prompt_tokens": prompt_tokens,
        "next_token_s": {q: round(value, 3) for q, value in percentiles(list(run.next_tokens.values())).items()},
        "copied_back_tokens": engine.scheduler.stats().host_hit_tokens,
        "streams_finished": sum(len(tokens) == new_tokens for tokens in disturbed),
        "tokens": streams * new_tokens,
        "tokens_equal": sum(a == b for x, y in zip(undisturbed, disturbed, strict=True) for a, b in zip(x, y)),  # noqa: B905
    }


def _tokens(
    engine: Engine, run: Recording, requests: list[tuple[list[int], int]], name: str, victim: int | None
) -> list[list[int]]:
    """The tokens of all requests; `victim`, a process, is killed once a third of them is there."""
    run._heard = 0.0
    ids = submit(engine, run, requests, name)
    if victim is not None:
        third = len(requests) * requests[0][1] // 3
        run.wait(lambda run: sum(progress.tokens for progress in run.requests.values()) >= third)
        os.kill(victim, signal.SIGKILL)
    run.wait()
    return [run.token_ids[request_id] for request_id in ids]


def recovery_table(title: str, result: Json) -> Table:
    """For people."""
    table = Table("", "", title=title, show_header=False)
    table.add_row("start of the whole pipeline", f"{result['start_s']:.1f} s")
    table.add_row(f"kill -9 of stage {result['killed_stage']}: rebuilt in", f"{result['recovery_s']} s")
    table.add_row("stages replaced, kept", f"{result['stages_replaced']}, {result['survivors']}")
    table.add_row("longest pause of the streams", f"{result['longest_pause_s']:.1f} s")
    after = ", ".join(f"{q} {value:.2f} s" for q, value in result["next_token_s"].items())
    table.add_row("from there to each stream's next token", after)
    table.add_row("tokens copied back from host memory", f"{result['copied_back_tokens']:,}")
    table.add_row("streams finished", f"{result['streams_finished']} of {result['streams']}")
    table.add_row("tokens as in the undisturbed run", f"{result['tokens_equal']:,} of {result['tokens']:,}")
    return table

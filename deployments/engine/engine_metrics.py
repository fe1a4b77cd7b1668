"""An engine's reports and totals as metrics."""

import time
from collections import Counter, deque

from cluster.engine import Engine, RecoveryReport, StepReport
from cluster.pipeline import Place
from cluster.scheduling.sequence import TokenEvent
from deployments.engine.board import PastRecovery, StageStatus
from deployments.engine.health import PROBE_PREFIX
from deployments.metrics import Recorder
from model.batch import StageTiming

RECENT, SHOWN_S = 4096, 10.0  # steps of stages, and seconds, of which the shares of their time are told
LAST_RECOVERIES = 3
STAGE_TOTALS = (
    "stage_steps_total",
    "stage_busy_seconds_total",
    "stage_wait_seconds_total",
    "stage_transfer_seconds_total",
)


class EngineMetrics:
    """Fed from the engine's thread, which must not wait; recorded now and then from another one."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._reports: deque[StepReport | StageTiming | RecoveryReport] = deque()
        self._generated = 0  # tokens for clients
        self._counted: dict[str, int] = {}  # totals as last recorded: metrics count increments
        self.stages: list[StageStatus] = []  # as of the last `record`
        self._recent: deque[tuple[float, StageTiming]] = deque(maxlen=RECENT)  # and when it was heard of here
        self._recoveries: deque[tuple[float, RecoveryReport]] = deque(maxlen=LAST_RECOVERIES)
        self._created = False  # whether the series of all stages begin at 0 already

    def add(self, report: StepReport | StageTiming | RecoveryReport) -> None:
        self._reports.append(report)

    def count(self, events: list[TokenEvent]) -> None:
        self._generated += sum(event.has_token and not event.request_id.startswith(PROBE_PREFIX) for event in events)

    def record(self, engine: Engine | None, ready: bool, loaded: float, last_token: float) -> None:
        """`loaded` is a share of the weights, `last_token` a time of the monotonic clock."""
        self._recorder.set("ready", float(ready))
        self._recorder.set("weights_loaded_ratio", loaded)
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, StageTiming):
                self._record_stage(report)
            elif isinstance(report, RecoveryReport):
                self._record_recovery(report)
            else:
                self._record_step(report)
        if engine is not None:
            self._recorder.set("last_token_age_seconds", time.monotonic() - last_token)
            self._record_stats(engine)

    @property
    def generated(self) -> int:
        """Tokens for clients, in all."""
        return self._generated

    @property
    def recoveries(self) -> list[PastRecovery]:
        now = time.monotonic()
        return [PastRecovery(report.cause, report.seconds, now - at) for at, report in list(self._recoveries)]

    def _record_stage(self, timing: StageTiming) -> None:
        m, stage = self._recorder, str(timing.stage)
        self._recent.append((time.monotonic(), timing))
        m.inc("stage_steps_total", stage=stage)
        m.inc("stage_busy_seconds_total", timing.finished - timing.started, stage=stage)
        m.inc("stage_wait_seconds_total", timing.wait, stage=stage)
        m.inc("stage_transfer_seconds_total", timing.transfer, stage=stage)
        m.observe("stage_step_seconds", timing.finished - timing.started, stage=stage)

    def _record_recovery(self, report: RecoveryReport) -> None:
        m = self._recorder
        self._recoveries.append((time.monotonic(), report))
        m.inc("recoveries_total", cause=report.cause)
        m.inc("stages_replaced_total", report.num_replaced)
        m.observe("recovery_seconds", report.seconds)

    def _record_step(self, report: StepReport) -> None:
        m = self._recorder
        m.observe("step_tokens", report.num_tokens)
        m.observe("scheduler_seconds", report.scheduler_seconds)
        for wait in report.queue_waits:
            m.observe("queue_wait_seconds", wait)

    def _record_places(self, places: list[Place]) -> None:
        for stage, place in enumerate(places):
            if not self._created:
                for name in STAGE_TOTALS:
                    self._recorder.create(name, stage=str(stage))
            for gpu in place.gpus or ("",):
                self._recorder.set("stage_info", 1.0, stage=str(stage), node=place.node, gpu=gpu)
        self._created = True
        now = time.monotonic()
        recent = [timing for heard, timing in self._recent if now - heard < SHOWN_S]
        self.stages = [stage_status(place, [t for t in recent if t.stage == i]) for i, place in enumerate(places)]

    def _record_stats(self, engine: Engine) -> None:
        m, stats = self._recorder, engine.stats
        self._record_places(engine.pipeline.places)
        m.set("running", stats.running)
        m.set("waiting", stats.waiting)
        m.set("waiting_tokens", stats.waiting_tokens)
        m.set("kv_blocks_used", stats.kv_blocks_used)
        m.set("kv_blocks_total", stats.kv_blocks_total)
        m.set("host_blocks_used", stats.host.used)
        m.set("host_blocks_total", stats.host.total)
        for name, total in (
            ("generated_tokens_total", self._generated),
            ("preemptions_total", stats.preemptions),
            ("prefix_cache_queried_tokens_total", stats.prefix_queried_tokens),
            ("prefix_cache_hit_tokens_total", stats.prefix_hit_tokens + stats.host_hit_tokens),
            ("host_cache_hit_tokens_total", stats.host_hit_tokens),
            ("kv_blocks_evicted_total", stats.blocks_evicted),
            ("host_blocks_evicted_total", stats.host.evicted),
            ("host_blocks_damaged_total", stats.host.damaged),
        ):
            self._raise(name, name, total)
        for direction, blocks in (("in", stats.host.copied_in), ("out", stats.host.copied_out)):
            self._raise("host_blocks_copied_total", direction, blocks, direction=direction)
        self._record_drafts("speculation_proposed_tokens_total", stats.proposed_tokens)
        self._record_drafts("speculation_accepted_tokens_total", stats.accepted_tokens)

    def _record_drafts(self, name: str, totals: Counter[int]) -> None:
        for place, total in totals.items():
            self._raise(name, f"{name} {place}", total, place=str(place))

    def _raise(self, name: str, key: str, total: int, **labels: str) -> None:
        """A counter to a total of all time."""
        self._recorder.inc(name, total - self._counted.get(key, 0), **labels)
        self._counted[key] = total


def stage_status(place: Place, timings: list[StageTiming]) -> StageStatus:
    """Shares of the time that these steps account for; without any it has nothing to do."""
    busy = sum(t.finished - t.started for t in timings)
    waiting, transfer = sum(t.wait for t in timings), sum(t.transfer for t in timings)
    whole = busy + waiting + transfer or 1.0
    step_ms = 1000 * busy / (len(timings) or 1)
    return StageStatus(place.node, ",".join(place.gpus), busy / whole, waiting / whole, transfer / whole, step_ms)

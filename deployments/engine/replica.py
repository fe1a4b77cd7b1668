"""One pipeline as a Ray Serve replica: streams in, token events out, one message per step and gateway."""

import asyncio
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve import metrics as serve_metrics

from cluster.engine import Engine, RecoveryReport, StepReport
from cluster.errors import CaravanError, EngineStopped, RequestRejected, StageDied
from cluster.launch import launch_engine
from cluster.rates import EngineRates
from cluster.sequence import Matcher, Request, TokenEvent
from deployments import logs
from deployments.config import parse_app_config
from deployments.engine import board
from deployments.engine.board import ReplicaStatus
from deployments.engine.token_link import GatewayLost, ReplyAddress, TokenSender
from deployments.metrics import Recorder
from deployments.routing.autoscaling import KV_USE, TOKENS_IN_FLIGHT, WAITING_TOKENS
from model.batch import StageTiming
from model.sampling_params import SamplingParams
from model.text.grammar import Masks
from model.text.tokenizer import load_tokenizer
from model.weights import resolve_path

log = logging.getLogger(__name__)

PUBLISH_PERIOD_S = 1.0
BEAT_PERIOD_S = 1.0  # how often gateways that have requests here hear that the engine lives
PROBE_PERIOD_S = 5.0  # how often an idle pipeline proves itself with one token
OVERDUE_S = 1.0  # a step so much later than its deadline, which the engine acts on by itself
SWITCH_INTERVAL_S = 0.0002
PROBE_PREFIX = "probe-"

_decode_request = msgspec.msgpack.Decoder(Request).decode


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request some gateway waits for."""

    reply_to: ReplyAddress
    done: asyncio.Future[None]

    def finish(self, error: CaravanError | None = None) -> None:
        """From the event loop's thread."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class EngineReplica:
    """The Serve deployment `Engine`. Its first bundle is this process, the others are its stages."""

    def __init__(self, args: dict[str, Any]) -> None:
        # The engine's thread must get hold of the interpreter when a step ends, not up to 5 ms (the default) later:
        # the first stage waits for what it passes on, and this process also carries every token to its client.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        context = serve.get_replica_context()
        self._app, self._replica = context.app_name, context.replica_id.unique_id
        logs.configure(replica=self._replica)
        self._config = parse_app_config(args)
        self._metrics = Recorder(serve_metrics, "engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[str, OpenRequest] = {}
        self._sender = TokenSender(self._replica)
        self._engine: Engine | None = None
        self._masks: Masks | None = None
        self._loaded = 0.0
        self._last_token = time.monotonic()
        self._probe_sent = 0.0
        self._generated = 0  # tokens for clients
        self._counted: dict[str, int] = {}  # totals as last recorded: metrics count increments
        self._reports: deque[StepReport | StageTiming | RecoveryReport] = deque()
        self._rates = EngineRates()
        self._serving = False  # the constructor is through: what fails from now on is for Serve to replace
        self._stopping = threading.Event()
        # One thread each: the board is in the cluster's control plane, which may be away; gateways must not notice.
        for period, work in (
            (BEAT_PERIOD_S, self._beat),
            (PUBLISH_PERIOD_S, self._keep_house),
            (PUBLISH_PERIOD_S, self._publish),
        ):
            threading.Thread(target=self._repeat, args=(period, work), name=work.__name__, daemon=True).start()
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ValueError("the Engine deployment needs placement_group_bundles: use the application builder's")
        try:
            self._engine = launch_engine(self._config, group, 1, self, self._on_progress)
            path = resolve_path(self._config.model.path)
            self._masks = Masks(lambda: load_tokenizer(path), self._engine.pipeline.wake)
            self._await_probe()
            self._await_probe(
                min(self._config.scheduler.max_num_batched_tokens, self._engine.scheduler.max_model_len - 1)
            )
            self._serving = True
        except BaseException:
            self._shut_down()
            raise

    # -- what the gateway and Serve call ------------------------------------------------------------------------------

    async def generate(self, request_id: str, payload: bytes, reply_to: tuple[str, str]) -> None:
        """Run one encoded `Request`; returns when its last token is on its way to `reply_to`.

        Cancelling it frees the sequence. Raises `RequestRejected` or `EngineStopped`.
        """
        assert self._engine is not None
        self._loop = self._loop or asyncio.get_running_loop()
        request = _decode_request(payload)
        if request_id != request.request_id:  # the router goes by it (see router.py)
            raise RequestRejected(f"request {request.request_id} came under the id {request_id}")
        if request_id in self._open:
            raise RequestRejected(f"a request with id {request_id} is running already")
        entry = self._open[request.request_id] = OpenRequest(ReplyAddress(*reply_to), self._loop.create_future())
        finished = False
        try:
            matcher = await self._matcher(request)
            self._engine.add(request, matcher)
            await entry.done
            finished = True
        finally:
            del self._open[request.request_id]
            if not finished:
                self._engine.abort(request.request_id)

    async def _matcher(self, request: Request) -> Matcher | None:
        """For a request with a constraint. Its grammar was compiled before, by a gateway; it may still take a while."""
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        try:
            assert self._masks is not None
            return await asyncio.to_thread(self._masks.open, constraint, request.output_ids)
        except ValueError as error:
            raise RequestRejected(f"the constraint cannot be followed: {error}") from error

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has stopped for good."""
        current = self._status()
        if current.state in ("failed", "stalled"):
            raise RuntimeError(f"engine {self._replica} is {current.state}: {current.reason}")

    def record_routing_stats(self) -> dict[str, Any]:
        """For `MostRoomRouter`."""
        assert self._engine is not None
        stats = self._engine.stats
        kv_use = stats.kv_blocks_used / stats.kv_blocks_total
        ready = self._status().state == "ready"
        return {"kv_use": kv_use, "waiting": stats.waiting, "ready": ready, "report": time.time()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `TokenPolicy`."""
        assert self._engine is not None
        stats = self._engine.stats
        return {
            TOKENS_IN_FLIGHT: float(stats.running_tokens + stats.waiting_tokens),
            WAITING_TOKENS: float(stats.waiting_tokens),
            KV_USE: stats.kv_blocks_used / stats.kv_blocks_total,
        }

    def __del__(self) -> None:
        self._shut_down()

    # -- what the engine calls, from its thread -----------------------------------------------------------------------

    def on_tokens(self, events: list[TokenEvent]) -> None:
        self._last_token = time.monotonic()
        self._generated += sum(not event.request_id.startswith(PROBE_PREFIX) for event in events)
        by_gateway: dict[ReplyAddress, list[TokenEvent]] = {}
        finished: list[OpenRequest] = []
        for event in events:
            entry = self._open.get(event.request_id)
            if entry is not None:  # probes have none, and clients may have left
                by_gateway.setdefault(entry.reply_to, []).append(event)
                if event.finish_reason is not None:
                    finished.append(entry)
        for gateway, its_events in by_gateway.items():
            try:
                self._sender.send(gateway, its_events)
            except GatewayLost as error:
                self._end([e for e in list(self._open.values()) if e.reply_to == gateway], EngineStopped(str(error)))
        self._end(finished)

    def on_step(self, report: StepReport) -> None:
        self._rates.add(report)
        self._reports.append(report)

    def on_timing(self, timing: StageTiming) -> None:
        self._reports.append(timing)

    def on_death(self, death: StageDied) -> None:
        self._beat()  # at once: gateways may know of another engine for what is open here

    def on_recovery(self, report: RecoveryReport) -> None:
        self._reports.append(report)
        self._beat()

    def on_failure(self, error: CaravanError) -> None:
        self._end(list(self._open.values()), EngineStopped(str(error)))

    def _end(self, entries: list[OpenRequest], error: CaravanError | None = None) -> None:
        """Let the calls of these requests return, or fail, in their own thread."""
        if not entries or self._loop is None:
            return

        def end() -> None:
            for entry in entries:
                entry.finish(error)

        self._loop.call_soon_threadsafe(end)

    # -- state ------------------------------------------------------------------------------------------------------

    def _on_progress(self, share: float) -> None:
        self._loaded = share

    def _status(self) -> ReplicaStatus:
        engine = self._engine
        if engine is None:
            return self._make_status("loading", f"loading {self._loaded:.0%}".replace("%", " %"))
        if engine.failure is not None:
            return self._make_status("failed", str(engine.failure))
        if engine.recovering is not None:
            return self._make_status("loading", f"rebuilding after: {engine.recovering}")
        if engine.overdue_s > OVERDUE_S:
            return self._make_status("stalled", f"a step is {engine.overdue_s:.0f} s late")
        if engine.idle_s > self._config.pipeline.step_timeout_s:
            return self._make_status("stalled", f"the engine has not moved for {engine.idle_s:.0f} s")
        return self._make_status("ready", "")

    def _make_status(self, state: board.State, reason: str) -> ReplicaStatus:
        stats = self._engine.stats if self._engine is not None else None
        return ReplicaStatus(
            replica=self._replica,
            state=state,
            reason=reason,
            loaded=self._loaded,
            updated_at=time.time(),
            running=stats.running if stats else 0,
            waiting=stats.waiting if stats else 0,
            waiting_tokens=stats.waiting_tokens if stats else 0,
            kv_blocks_used=stats.kv_blocks_used if stats else 0,
            kv_blocks_total=stats.kv_blocks_total if stats else 0,
            max_model_len=self._engine.scheduler.max_model_len if self._engine else 0,
            running_tokens=stats.running_tokens if stats else 0,
            block_size=self._config.cache.block_size,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            prefill_rate=self._rates.prefill.per_second,
            decode_rate=self._rates.decode.per_second,
        )

    def _await_probe(self, prompt_tokens: int = 1) -> None:
        """A replica is ready when a token has come out of its last stage, not when its processes exist.

        A longer prompt also shows how fast it computes prompts, before the first request has to be admitted by it.
        """
        before = self._last_token
        self._probe(prompt_tokens)
        deadline = time.monotonic() + self._config.pipeline.step_timeout_s
        while self._last_token == before:
            assert self._engine is not None
            if self._engine.failure is not None:
                raise self._engine.failure
            if time.monotonic() > deadline:
                raise EngineStopped("the first token did not come out of the pipeline in time")
            time.sleep(0.02)

    def _probe(self, prompt_tokens: int = 1) -> None:
        assert self._engine is not None
        self._probe_sent = time.monotonic()
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        self._engine.add(
            Request(request_id=f"{PROBE_PREFIX}{os.urandom(4).hex()}", token_ids=[0] * prompt_tokens, sampling=params)
        )

    # -- every now and then -------------------------------------------------------------------------------------------

    def _repeat(self, period: float, work: Callable[[], None]) -> None:
        """In a thread of its own, until the end."""
        while not self._stopping.wait(period):
            try:
                work()
            except EngineStopped:
                pass  # the status says so already
            except Exception:
                log.exception("%s failed; trying again", work.__name__)

    def _beat(self) -> None:
        waiting = {entry.reply_to for entry in list(self._open.values())}
        self._sender.beat(waiting, self._engine is not None and self._engine.recovering is None)

    def _publish(self) -> None:
        board.publish(self._app, self._status())

    def _keep_house(self) -> None:
        """Record metrics, probe an idle pipeline, make room for a replica that works."""
        self._record()
        self._probe_if_idle()
        if self._serving and self._engine is not None and self._engine.failure is not None:
            log.error("this replica ends, so that Serve starts another one: %s", self._engine.failure)
            board.publish(self._app, self._status())
            os._exit(1)  # quicker than failing three health checks; stages and placement group go with it

    def _probe_if_idle(self) -> None:
        engine, now = self._engine, time.monotonic()
        if engine is None or engine.failure is not None or engine.recovering is not None:
            return
        if min(now - self._last_token, now - self._probe_sent) > PROBE_PERIOD_S and not engine.scheduler.has_work:
            self._probe()

    def _record(self) -> None:
        m = self._metrics
        m.set("weights_loaded_ratio", self._loaded)
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, StageTiming):
                stage = str(report.stage)
                m.inc("stage_steps_total", stage=stage)
                m.inc("stage_busy_seconds_total", report.finished - report.started, stage=stage)
                m.inc("stage_wait_seconds_total", report.wait, stage=stage)
                m.inc("stage_transfer_seconds_total", report.transfer, stage=stage)
                m.observe("stage_step_seconds", report.finished - report.started, stage=stage)
            elif isinstance(report, RecoveryReport):
                m.inc("recoveries_total", cause=report.cause)
                m.inc("stages_replaced_total", report.num_replaced)
                m.observe("recovery_seconds", report.seconds)
            else:
                m.observe("step_tokens", report.num_tokens)
                m.observe("scheduler_seconds", report.scheduler_seconds)
                for wait in report.queue_waits:
                    m.observe("queue_wait_seconds", wait)
        if self._engine is not None:
            self._record_stats(self._engine)

    def _record_stats(self, engine: Engine) -> None:
        m, stats = self._metrics, engine.stats
        m.set("running", stats.running)
        m.set("waiting", stats.waiting)
        m.set("waiting_tokens", stats.waiting_tokens)
        m.set("kv_blocks_used", stats.kv_blocks_used)
        m.set("kv_blocks_total", stats.kv_blocks_total)
        m.set("last_token_age_seconds", time.monotonic() - self._last_token)
        for name, total in (
            ("generated_tokens_total", self._generated),
            ("preemptions_total", stats.preemptions),
            ("prefix_cache_queried_tokens_total", stats.prefix_queried_tokens),
            ("prefix_cache_hit_tokens_total", stats.prefix_hit_tokens),
        ):
            m.inc(name, total - self._counted.get(name, 0))
            self._counted[name] = total

    def _shut_down(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._engine is not None:
            self._engine.close()
        if self._masks is not None:
            self._masks.close()
        self._sender.close()
        board.remove(self._app, self._replica)

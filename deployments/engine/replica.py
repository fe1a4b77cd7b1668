"""One pipeline as a Ray Serve replica: what Serve calls, what the engine calls, and what is done every now and then."""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve import metrics as serve_metrics

from cluster.config import ModelArgs
from cluster.engine import Engine, RecoveryReport, StepReport
from cluster.errors import CaravanError, EngineStopped, RequestRejected, StageDied
from cluster.launch import launch_engine
from cluster.scheduling.prefix import Digest
from cluster.scheduling.sequence import AdapterRef, Matcher, Request, TokenEvent
from deployments import logs
from deployments.adapters.names import configured
from deployments.config import AppConfig, ConfigError, parse_app_config, with_user_config
from deployments.engine import board
from deployments.engine.engine_metrics import EngineMetrics
from deployments.engine.health import Health
from deployments.engine.load import EngineLoad
from deployments.engine.streams import Streams
from deployments.engine.token_link import ReplyAddress, TokenSender
from deployments.metrics import Recorder
from deployments.offload.turns import ModestThreads
from deployments.placement import first_stage
from deployments.telemetry import audit
from model.batch import StageTiming
from model.text.grammar import Masks
from model.text.tokenizer import load_tokenizer
from model.weights import resolve_path

log = logging.getLogger(__name__)

PUBLISH_PERIOD_S = 1.0
DIGEST_PERIOD_S = 2.0
BEAT_PERIOD_S = 1.0  # how often gateways that have requests here hear that the engine lives
SWITCH_INTERVAL_S = 0.0002
AT_ONCE, FOR_EACH, NICENESS = 2, 1, 5  # grammars that are compiled: in all, and of one tenant

_decode_request = msgspec.msgpack.Decoder(Request).decode


class EngineReplica:
    """The Serve deployment `Engine`. Its first bundle is this process, the others are its stages."""

    def __init__(self, args: dict[str, Any]) -> None:
        # The engine's thread must get hold of the interpreter when a step ends, not up to 5 ms (the default) later:
        # the first stage waits for what it passes on, and this process also carries every token to its client.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        context = serve.get_replica_context()
        self._app, self._replica = context.app_name, context.replica_id.unique_id
        self._args = args
        config = self._config = self._parse(context._deployment_config.user_config)
        self._load = EngineLoad(config)
        self._streams = Streams(TokenSender(self._replica), self._load)
        self._metrics = EngineMetrics(Recorder(serve_metrics, "engine"))
        self._health = Health(self._replica, config)
        self._engine: Engine | None = None
        self._masks: Masks | None = None
        self._last_reset: bytes | None = None  # the order that was followed last
        self._digest: Digest | None = None  # the last one that was published
        self._compiling = ModestThreads("grammars", AT_ONCE, FOR_EACH, waiting=sys.maxsize, niceness=NICENESS)
        self._serving = False  # the constructor is through: what fails from now on is for Serve to replace
        self._stopping = threading.Event()
        # One thread each: the board is in the cluster's control plane, which may be away; gateways must not notice.
        for period, work in (
            (BEAT_PERIOD_S, self._beat),
            (PUBLISH_PERIOD_S, self._keep_house),
            (PUBLISH_PERIOD_S, self._publish),
            (DIGEST_PERIOD_S, self._publish_digest),
            (PUBLISH_PERIOD_S, self._obey),
        ):
            threading.Thread(target=self._repeat, args=(period, work), name=work.__name__, daemon=True).start()
        group = ray.util.get_current_placement_group()
        if group is None:
            raise ValueError("the Engine deployment needs placement_group_bundles: use the application builder's")
        try:
            engine = self._engine = launch_engine(config, group, first_stage(config), self, self._on_progress)
            path = resolve_path(config.model.path)
            self._masks = Masks(lambda: load_tokenizer(path), engine.pipeline.wake)
            self._load_configured(engine, config.model, config.pipeline.start_timeout_s)
            self._health.await_probe(engine)
            longest = min(config.scheduler.max_num_batched_tokens, engine.scheduler.max_model_len - 1)
            self._health.await_probe(engine, longest)
            self._serving = True
        except BaseException:
            self._shut_down()
            raise

    def _parse(self, user_config: Any) -> AppConfig:
        config = parse_app_config(with_user_config(self._args, user_config, "Engine"))
        logs.configure(config.logging.level, replica=self._replica)
        return config

    # -- what the gateway and Serve call ------------------------------------------------------------------------------

    async def generate(self, request_id: str, payload: bytes, reply_to: tuple[str, str]) -> AsyncGenerator[None, None]:
        """Run one encoded `Request`; says something once, when its last token is on its way to `reply_to`.

        A stream of answers, so that Serve's router hears at once that the request is taken, not when it has ended.
        Cancelling it frees the sequence. Raises `RequestRejected` or `EngineStopped`.
        """
        assert self._engine is not None
        request = _decode_request(payload)
        if request_id != request.request_id:  # the router goes by it (see router.py)
            raise RequestRejected(f"request {request.request_id} came under the id {request_id}")
        with self._streams.open(request_id, ReplyAddress(*reply_to)) as done:
            finished = False
            try:
                matcher = await self._matcher(request)
                self._engine.add(request, matcher)
                await done
                finished = True
                yield
            finally:
                if not finished:
                    self._engine.abort(request_id)

    async def awake(self) -> None:
        """Nothing to do: to be called is enough, for Serve starts an engine then if none runs."""

    async def load_adapter(self, digest: str, path: str) -> None:
        """Have all stages read an adapter. Raises `RequestRejected` if it cannot be served."""
        assert self._engine is not None
        try:
            await asyncio.wrap_future(self._engine.load_adapter(AdapterRef(digest, path)))
        except ValueError as error:
            raise RequestRejected(str(error)) from error

    def _load_configured(self, engine: Engine, model: ModelArgs, timeout_s: float) -> None:
        """What the configuration names is there before the first request. Raises `ValueError`."""
        for named in configured(model)[: model.max_host_adapters]:
            engine.load_adapter(named.ref).result(timeout_s)

    async def _matcher(self, request: Request) -> Matcher | None:
        """For a request with a constraint. Its grammar was compiled before, by a gateway; it may still take a while."""
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        assert self._masks is not None
        work = partial(self._masks.open, constraint, request.output_ids, request.tenant)
        try:
            return await self._compiling.run(request.tenant, work)
        except ValueError as error:
            raise RequestRejected(f"the constraint cannot be followed: {error}") from error

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has stopped for good."""
        state, reason = self._health.state(self._engine)
        if state in ("failed", "stalled"):
            raise RuntimeError(f"engine {self._replica} is {state}: {reason}")

    def record_routing_stats(self) -> dict[str, Any]:
        """A `Report`, for the routers of all gateways."""
        assert self._engine is not None
        return msgspec.structs.asdict(self._health.report(self._engine))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For the scaler (`routing.autoscaling`)."""
        assert self._engine is not None
        return self._load.stats(self._engine, self._health.rates, self._streams.open_requests)

    def reconfigure(self, user_config: Any) -> None:
        """Serve calls it when `user_config` changes; see `deployments.app.Gateway.reconfigure`."""
        try:
            config = self._parse(user_config)
        except ConfigError as error:
            log.error("the configuration stays as it was: %s", error)
            return
        if config.logging != self._config.logging:
            log.info("the log level is %s now", config.logging.level)
        self._config = config

    def __del__(self) -> None:
        self._shut_down()

    # -- what the engine calls, from its thread -----------------------------------------------------------------------

    def on_tokens(self, events: list[TokenEvent]) -> None:
        self._health.last_token = time.monotonic()
        self._metrics.count(events)
        self._streams.deliver(events)

    def on_step(self, report: StepReport) -> None:
        self._health.rates.add(report)
        self._metrics.add(report)

    def on_timing(self, timing: StageTiming) -> None:
        self._metrics.add(timing)

    def on_death(self, death: StageDied) -> None:
        self._beat()  # at once: gateways may know of another engine for what is open here

    def on_recovery(self, report: RecoveryReport) -> None:
        self._metrics.add(report)
        self._beat()

    def on_failure(self, error: CaravanError) -> None:
        self._streams.fail(error)

    def _on_progress(self, share: float) -> None:
        self._health.loaded = share

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
        self._streams.beat(self._engine is not None and self._engine.recovering is None)

    def _publish(self) -> None:
        status, m = self._health.status(self._engine), self._metrics
        told = msgspec.structs.replace(status, generated_tokens=m.generated, stages=m.stages, recoveries=m.recoveries)
        board.publish(self._app, told)

    def _publish_digest(self) -> None:
        """What the cache holds, if that has changed."""
        if self._engine is not None and (digest := self._engine.scheduler.blocks.digest()) != self._digest:
            board.publish_digest(self._app, self._replica, digest)
            self._digest = digest

    def _obey(self) -> None:
        """Forget the cache, if somebody has ordered that since this replica last looked."""
        order = board.last_reset(self._app)
        if self._engine is not None and order != self._last_reset:
            self._engine.reset_cache()
            log.info("all cached keys and values are forgotten, as was ordered")
        self._last_reset = order

    def _keep_house(self) -> None:
        """Record metrics, probe an idle pipeline, make room for a replica that works."""
        ready = self._health.state(self._engine)[0] == "ready"
        self._metrics.record(self._engine, ready, self._health.loaded, self._health.last_token)
        if self._engine is None:
            return
        self._health.probe_if_idle(self._engine)
        if self._serving and self._engine.failure is not None:
            log.error("this replica ends, so that Serve starts another one: %s", self._engine.failure)
            self._publish()
            os._exit(1)  # quicker than failing three health checks; stages and placement group go with it

    def _shut_down(self) -> None:
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._serving:
            audit.tell("drained", replica=self._replica, application=self._app)
        if self._engine is not None:
            self._engine.close()
        if self._masks is not None:
            self._masks.close()
        self._compiling.close()
        self._streams.close()
        board.remove(self._app, self._replica)

"""The Serve application: `import_path: deployments.app:build`, with our configuration as its `args`."""

import logging
import threading
import time
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import metrics as serve_metrics
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments import logs
from deployments.asgi import create_gateway
from deployments.config import AppConfig, parse_app_config
from deployments.gateway.engine_client import ServeEngineClient
from deployments.metrics import Recorder
from deployments.telemetry.record import Record

log = logging.getLogger(__name__)

REPORT_PERIOD_S = 1.0
UNLIMITED = 1_000_000  # the engine queues by itself, and knows better than Serve what it can hold


@serve.ingress()
class Gateway:
    """The Serve deployment `Gateway`: HTTP in front, the engines' handle behind. Needs no accelerator and no torch."""

    def __init__(self, engine: DeploymentHandle[Any], args: dict[str, Any]) -> None:
        self._engine = engine
        self._config = parse_app_config(args)
        logs.configure(log_prompts=self._config.logging.log_prompts)
        warn_if_open()

    def __serve_build_asgi_app__(self) -> FastAPI:
        client = ServeEngineClient(self._engine, serve.get_replica_context().app_name)
        recorder = Recorder(serve_metrics, "gateway")
        app = create_gateway(self._config, client, recorder, echo_request_id=False)
        open_requests: set[Record] = app.state.gateway.open_requests
        threading.Thread(target=_report, args=(recorder, open_requests), name="report", daemon=True).start()
        return app


def _report(recorder: Recorder, open_requests: set[Record]) -> None:
    """For as long as the process lives: gauges that nobody sets anew vanish, and so say that it is gone."""
    while True:
        recorder.set("open_requests", len(open_requests))
        time.sleep(REPORT_PERIOD_S)


def warn_if_open() -> None:
    """Ray's ports run whatever they are sent; only its token keeps strangers out."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if not is_token_auth_enabled():
        log.warning(
            "Ray runs without token authentication: whoever reaches its ports can run code on this cluster. Start all "
            "nodes with RAY_AUTH_MODE=token (see ops/SECURITY.md)"
        )


def build(args: dict[str, Any]) -> serve.Application:
    """Gateway -> Engine, with Serve's options set for language models. Raises `ConfigError` for wrong `args`."""
    from deployments.engine.replica import EngineReplica  # and torch with it, which gateways do without

    config = parse_app_config(args)
    engine = serve.deployment(
        EngineReplica,
        name="Engine",
        placement_group_bundles=bundles(config),
        placement_group_strategy="PACK",
        ray_actor_options={"num_cpus": config.resources.engine_cpus},
        max_ongoing_requests=UNLIMITED,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.resources.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,  # its streams are handed over at once
        max_surge_percent=config.resources.max_surge_percent,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.routing.router:MostRoomRouter",
            request_router_kwargs={"sequences_per_replica": config.scheduler.max_num_seqs},
            request_routing_stats_period_s=0.5,
        ),
        autoscaling_config=autoscaling(config),
    )
    gateway = serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options={"num_cpus": config.resources.gateway_cpus},
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=config.resources.drain_timeout_s,
        max_surge_percent=100,
        health_check_period_s=2,
    )
    return gateway.bind(engine.bind(args), args)


def bundles(config: AppConfig) -> list[dict[str, float]]:
    """One replica's placement group: the engine's own process, then one bundle per stage."""
    stage: dict[str, float] = {"CPU": config.resources.stage_cpus}
    if config.pipeline.device == "cuda":
        stage["GPU"] = config.resources.stage_gpus * config.pipeline.tensor_parallel
    return [{"CPU": config.resources.engine_cpus}, *(dict(stage) for _ in range(config.pipeline.stages))]


def autoscaling(config: AppConfig) -> AutoscalingConfig:
    """Serve's part (bounds and delays) and ours (the policy)."""
    a = config.autoscaling
    policy = AutoscalingPolicy(
        policy_function="deployments.routing.autoscaling:TokenPolicy",
        policy_kwargs={
            "tokens_in_flight": a.target_tokens_in_flight,
            "waiting_tokens": a.target_waiting_tokens,
            "kv_use": a.target_kv_use,
        },
    )
    return AutoscalingConfig(
        min_replicas=a.min_replicas,
        max_replicas=a.max_replicas,
        upscale_delay_s=a.upscale_delay_s,
        downscale_delay_s=a.downscale_delay_s,
        look_back_period_s=a.look_back_period_s,
        policy=policy,
    )

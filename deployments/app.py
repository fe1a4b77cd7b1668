"""The Serve application: `import_path: deployments.app:build`, with our configuration as its `args`.

What may change while it runs stands in the `user_config` of its deployments, and Serve hands it on without restarting
anything; a change of `args` replaces every process.
"""

import logging
import threading
import time
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import metrics as serve_metrics
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, DeploymentActorConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments import asgi, logs, placement
from deployments.config import AppConfig, ConfigError, parse_app_config, with_user_config
from deployments.gateway import gateway as gateway_
from deployments.gateway.engine_client import ServeEngineClient
from deployments.limits.ledger import LEDGER, LedgerActor, RayLedger
from deployments.metrics import Recorder
from deployments.routing.gateway_load import GatewayLoad
from deployments.telemetry import audit
from deployments.telemetry.record import Record

log = logging.getLogger(__name__)

REPORT_PERIOD_S = 1.0
UNLIMITED = 1_000_000  # the engine queues by itself, and knows better than Serve what it can hold


@serve.ingress()
class Gateway:
    """The Serve deployment `Gateway`: HTTP in front, the engines' handle behind. Needs no accelerator and no torch."""

    def __init__(self, engine: DeploymentHandle[Any], args: dict[str, Any]) -> None:
        self._engine = engine
        self._args = args
        # Read here, so that no request meets a gateway without the keys that it is to ask for.
        self._config = self._parse(serve.get_replica_context()._deployment_config.user_config)
        self._audit(self._config)
        warn_if_open()

    def _parse(self, user_config: Any) -> AppConfig:
        config = parse_app_config(with_user_config(self._args, user_config, "Gateway"))
        logs.configure(config.logging.level, log_prompts=config.logging.log_prompts)
        return config

    def __serve_build_asgi_app__(self) -> FastAPI:
        recorder, name, load = Recorder(serve_metrics, "gateway"), serve.get_replica_context().app_name, GatewayLoad()
        client = ServeEngineClient(self._engine, name, self._config.cache.block_size, recorder, load)
        self._app = asgi.create_gateway(self._config, client, recorder, RayLedger(), load, echo_request_id=False)
        open_requests: set[Record] = self._app.state.gateway.open_requests
        threading.Thread(target=_report, args=(recorder, open_requests), name="report", daemon=True).start()
        return self._app

    def reconfigure(self, user_config: Any) -> None:
        """Serve calls it when `user_config` changes. Requests under way go on; those that come next find the change.

        What is wrong changes nothing and is said in the log and at /ready: were it raised, Serve would replace this
        process, and its successor could not start.
        """
        gateway: gateway_.Gateway = self._app.state.gateway
        try:
            config = self._parse(user_config)
            asgi.reconfigure(self._app, config)
            gateway.refused_config = ""
            self._audit(config)
            log.info("the configuration was taken in, without a restart")
        except ConfigError as error:
            gateway.refused_config = str(error)
            log.error("the configuration stays as it was: %s", error)

    @staticmethod
    def _audit(config: AppConfig) -> None:
        audit.configuration(serve.get_replica_context().app_name, config.model_dump(mode="json"))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For the scaler (`routing.autoscaling`)."""
        gateway: gateway_.Gateway = self._app.state.gateway
        return gateway.load.stats(gateway.config.admission.target_ttft_s)


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
        **placement.options(config),
        max_ongoing_requests=UNLIMITED,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=config.resources.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,  # its streams are handed over at once
        max_surge_percent=config.resources.max_surge_percent,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.routing.router:LeastWorkRouter",
            request_routing_stats_period_s=0.5,
        ),
        autoscaling_config=autoscaling(config),
    )
    gateway = serve.deployment(
        Gateway,
        name="Gateway",
        ray_actor_options={"num_cpus": config.resources.gateway_cpus},
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=config.resources.drain_timeout_s,
        max_surge_percent=100,
        health_check_period_s=2,
        deployment_actors=[
            DeploymentActorConfig(name=LEDGER, actor_class=ray.remote(LedgerActor), actor_options={"num_cpus": 0})
        ],
        # As many as are asked for; a range in the file lets the scaler choose. Only what scales reports its load.
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.gateway.replicas, max_replicas=config.gateway.replicas, look_back_period_s=20.0
        ),
    )
    return gateway.bind(engine.bind(args), args)


def autoscaling(config: AppConfig) -> AutoscalingConfig:
    """Serve's part (bounds and delays) and ours (the policy). What the file says of it in `deployments` replaces it."""
    a = config.autoscaling
    policy = AutoscalingPolicy(
        policy_function="deployments.routing.autoscaling:EnginePolicy",
        policy_kwargs={"target_s": config.admission.target_ttft_s},
    )
    return AutoscalingConfig(
        min_replicas=a.min_replicas,
        max_replicas=a.max_replicas,
        upscale_delay_s=a.upscale_delay_s,
        downscale_delay_s=a.downscale_delay_s,
        look_back_period_s=a.look_back_period_s,
        policy=policy,
    )

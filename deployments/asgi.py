"""The ASGI application: routes, request ids, and every error in one form."""

import json
import logging
import re
import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import CaravanError
from deployments import logs
from deployments.config import AppConfig
from deployments.errors import ApiError, from_engine
from deployments.gateway.engine_client import EngineClient
from deployments.gateway.gateway import Gateway
from deployments.gateway.guard import OPEN_PATHS, Guard
from deployments.limits.shared import Ledger
from deployments.live import page as live
from deployments.metrics import MetricsRecorder
from deployments.routes import adapters as adapter_routes
from deployments.routes import openai, operators, tokens
from deployments.routes.hosted.drop_in import DropIn, drop_ins
from deployments.routes.openapi import add_docs
from deployments.routing.gateway_load import GatewayLoad
from deployments.telemetry.answers import Answers, create_series
from deployments.version import package_version

log = logging.getLogger(__name__)

NO_ENGINE = "no engine runs: the first request starts one, if none is starting yet"

DESCRIPTION = """Models of the Llama 2 family behind OpenAI's API.

Send `Authorization: Bearer KEY` if the service asks for keys. Errors always have the form
`{"error": {"message", "type", "param", "code"}}`.
Every answer carries an `X-Request-Id`, the client's own if it sent one.
"""


def create_gateway(
    config: AppConfig,
    engine: EngineClient,
    recorder: MetricsRecorder,
    ledger: Ledger | None = None,
    load: GatewayLoad | None = None,
    *,
    echo_request_id: bool = True,
) -> FastAPI:
    """The ASGI application. Raises `ValueError` if the checkpoint's tokenizer or template cannot be read.

    `echo_request_id` is False behind Ray Serve's proxy, which writes the X-Request-Id of every answer by itself.
    """
    gateway = Gateway(config, engine, recorder, ledger, load)
    create_series(recorder, config.gateway.routes)
    app = FastAPI(title="Caravan", description=DESCRIPTION, version=package_version(), docs_url=None, redoc_url=None)
    add_docs(app)
    app.state.gateway = gateway

    def hosted(scope: Scope) -> str | None:
        return next((drop_in.name for drop_in in app.state.drop_ins if drop_in.owns(scope)), None)

    app.add_middleware(Guard, gateway=gateway, respond=respond, open_paths=OPEN_PATHS | live.OPEN_PATHS)
    app.add_middleware(Answers, recorder=recorder, endpoint_of=hosted, open_requests=gateway.open_requests)
    app.add_middleware(RequestId, echo=echo_request_id)
    app.add_middleware(Normalised)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(CaravanError, _caravan_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    app.include_router(openai.router(gateway))
    app.include_router(tokens.router(gateway))
    if gateway.adapters.any:
        app.include_router(adapter_routes.router(gateway))
    app.include_router(live.router(gateway))
    app.include_router(operators.router(gateway))

    @app.get("/health", summary="Whether this process lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether work moves, or why not")
    async def ready() -> Response:
        return await _ready(gateway)

    @app.get("/version", summary="What is running")
    async def version_() -> dict[str, str]:
        return {"version": package_version()}

    app.state.own_routes = list(app.router.routes)
    add_drop_ins(app)
    return app


def add_drop_ins(app: FastAPI) -> None:
    """The APIs of hosted services that are switched on now, in place of those that were."""
    app.router.routes[:] = app.state.own_routes
    app.openapi_schema = None  # made anew when it is asked for
    app.state.drop_ins = drop_ins(app.state.gateway)  # errors are written in their forms too
    for drop_in in app.state.drop_ins:
        app.include_router(drop_in.router)


def reconfigure(app: FastAPI, config: AppConfig) -> None:
    """Go on with these settings; see `Gateway.apply`."""
    gateway: Gateway = app.state.gateway
    routes = gateway.config.gateway.routes
    gateway.apply(config)
    if config.gateway.routes != routes:
        create_series(gateway.recorder, config.gateway.routes)
        add_drop_ins(app)


async def _ready(gateway: Gateway) -> Response:
    """200 if some replica has produced a token lately; otherwise 503 with every replica's reason."""
    replicas = []
    for status in await gateway.engine.replicas():
        state, reason = status.state, status.reason
        if status.age_s > gateway.config.gateway.ready_max_age_s:
            state, reason = "stalled", f"has not been heard of for {status.age_s:.0f} s"
        replicas.append({"replica": status.replica, "state": state, "reason": reason, "loaded": status.loaded})
    ready = any(replica["state"] == "ready" for replica in replicas)
    reason = "" if ready else "; ".join(str(r["reason"]) for r in replicas) or NO_ENGINE
    body: dict[str, Any] = {"ready": ready, "reason": reason, "replicas": replicas}
    if gateway.refused_config:
        body["refused_configuration"] = gateway.refused_config
    return JSONResponse(body, 200 if ready else 503, headers={} if ready else {"Retry-After": "5"})


class Normalised:
    """A path with a slash at its end is the path without it; HEAD is GET whose body is not sent (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["path"] = scope["path"].rstrip("/") or "/"
        if scope["method"] != "HEAD":
            return await self._app(scope, receive, send)
        scope = {**scope, "method": "GET"}  # a copy: the server looks at its own, to see what length an answer has

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app(scope, receive, send_head)


class RequestId:
    """Gives every request an id, the client's own if it is fit to print, and sends it back on every answer."""

    _FIT = re.compile(r"[!-~]{1,128}")

    def __init__(self, app: ASGIApp, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if self._FIT.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        logs.begin(request_id=request_id)

        async def send_with_id(message: Message) -> None:
            if self._echo and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def respond(http: Request, error: ApiError) -> Response:
    """The error in the form of the API that the request's path belongs to; OpenAI's for all others."""
    owners: list[DropIn] = http.app.state.drop_ins
    for drop_in in owners:
        if drop_in.owns(http.scope):
            return drop_in.respond(error, http.scope["state"]["request_id"])
    return Response(
        json.dumps(error.body), status_code=error.status, headers=error.headers, media_type="application/json"
    )


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return respond(http, error)


async def _caravan_error(http: Request, error: Exception) -> Response:
    return respond(http, from_engine(error))


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
    message = what.get(error.status_code, str(error.detail))
    return respond(http, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _internal_error(http: Request, error: Exception) -> Response:
    log.error("internal error", exc_info=error, extra={"request_id": http.scope.get("state", {}).get("request_id")})
    return respond(http, from_engine(error))

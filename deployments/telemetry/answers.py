"""Every answer, whatever its status, is counted once, timed and logged in one line."""

import logging
import time
from collections.abc import Callable, Iterable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.metrics import MetricsRecorder
from deployments.telemetry import record as records
from deployments.telemetry import tracing
from deployments.telemetry.record import Record

log = logging.getLogger(__name__)

UNTRACED = {"probe", "other"}
PROBE = "probe"  # the endpoint of questions that load balancers ask all day: their lines are of level DEBUG
ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/models": "models",
    "/v1/load_lora_adapter": "adapters",
    "/v1/unload_lora_adapter": "adapters",
    "/tokenize": "tokens",
    "/detokenize": "tokens",
    **dict.fromkeys(("/health", "/ready", "/version", "/ping"), PROBE),
}
GENERATING = ("chat", "completions", "responses")  # and those of hosted services
SIMPLE = {*ENDPOINTS.values(), "other"} - {*GENERATING}
CLIENT_LEFT = 499  # as nginx calls it
# How an answer may end, with its status.
BAD = [("rejected", status) for status in (400, 404, 405, 408, 413, 415, 431)]
BAD += [("refused", status) for status in (401, 403, 429)] + [("error", 500), ("error", 503)]
SHORT = [("ok", 200), *BAD]
GENERATED = [(outcome, 200) for outcome in ("stop", "length", "cancelled", "error", "rejected")]
GENERATED += [("cancelled", CLIENT_LEFT), ("error", 408), *BAD]


def create_series(recorder: MetricsRecorder, hosted: Iterable[str]) -> None:
    """All that can be counted begins at 0: a counter that is born with its first error has no rate then."""
    for endpoint in {*ENDPOINTS.values(), *GENERATING, *hosted, "other"}:
        for outcome, status in GENERATED if endpoint in {*GENERATING, *hosted} else SHORT:
            recorder.create("requests_total", endpoint=endpoint, outcome=outcome, status=str(status))


def create_tenant_series(recorder: MetricsRecorder, tenant: str) -> None:
    """The same for those of one tenant."""
    for outcome in dict.fromkeys(outcome for outcome, _ in [*GENERATED, *SHORT]):
        recorder.create("tenant_requests_total", tenant=tenant, outcome=outcome)
    for reason in ("rate_limit_exceeded", "overloaded", "invalid_api_key"):
        recorder.create("refused_total", tenant=tenant, reason=reason)
    for name in ("tenant_prompt_tokens_total", "tenant_generated_tokens_total"):
        recorder.create(name, tenant=tenant)


class Answers:
    """ASGI middleware. `endpoint_of` names the endpoint of a path that is not in the table.

    `open_requests` holds the records of those that engines are asked for, while they are answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        recorder: MetricsRecorder,
        endpoint_of: Callable[[Scope], str | None],
        open_requests: set[Record],
    ) -> None:
        self._app = app
        self._recorder = recorder
        self._endpoint_of = endpoint_of
        self._open = open_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = Record(request_id=scope["state"]["request_id"], endpoint=self._name(scope))
        records.begin(record)
        span = tracing.begin(record, dict(scope["headers"])) if record.endpoint not in UNTRACED else None
        parent = tracing.traceparent(span) if span is not None else None
        if record.endpoint not in SIMPLE:
            self._open.add(record)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if parent is not None:
                    MutableHeaders(scope=message)["traceparent"] = parent
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            record.status = record.status or 500  # which the server writes once it has this error
            raise
        finally:
            self._open.discard(record)
            tenant = scope["state"].get("tenant")
            record.tenant = tenant.name if tenant is not None else record.tenant
            outcome = self._end(record)
            if span is not None:
                tracing.end(span, record, outcome)

    def _name(self, scope: Scope) -> str:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith("/v1/models/"):
            return "models"
        return ENDPOINTS.get(path) or self._endpoint_of(scope) or "other"

    def _end(self, record: Record) -> str:
        """Returns how it ended."""
        seconds = time.monotonic() - record.started
        status = record.status or CLIENT_LEFT
        outcome = record.outcome or outcome_of(status)
        self._recorder.inc("requests_total", endpoint=record.endpoint, outcome=outcome, status=str(status))
        if record.endpoint != PROBE:
            self._recorder.inc("tenant_requests_total", tenant=record.tenant, outcome=outcome)
            self._recorder.observe("e2e_seconds", seconds, outcome=outcome)
        for part, spent in record.parts.items():
            self._recorder.observe("request_part_seconds", spent, part=part)
        fields = {
            "endpoint": record.endpoint,
            "outcome": outcome,
            "request_id": record.request_id,
            "tenant": record.tenant,
            "status": status,
            "ttft_s": round(record.first_token - record.started, 4) if record.first_token else None,
            "e2e_s": round(seconds, 4),
            "parts_s": {part: round(spent, 4) for part, spent in record.parts.items()} or None,
            **record.fields,
        }
        log.log(logging.DEBUG if record.endpoint == PROBE else logging.INFO, "request finished", extra=fields)
        return outcome


def outcome_of(status: int) -> str:
    """What an answer that no generation stands behind has come to."""
    if status < 400:
        return "ok"
    if status == CLIENT_LEFT:
        return "cancelled"
    return "error" if status >= 500 else "refused" if status in (401, 403, 429) else "rejected"

"""Every error a client can see, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import math
from typing import Any

from cluster.errors import CaravanError, EngineStopped, RequestFatal, RequestRejected

LONGEST_RETRY_S = 120.0  # openai-python does not retry at all if it is told to wait longer


class TimeExceeded(CaravanError):
    """A request took longer than it may."""


class ApiError(Exception):
    """An HTTP error with everything its JSON body says. Text of the client's prompt never goes into it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def too_many(message: str, kind: str, code: str, wait: float) -> ApiError:
    """429 that says when to come back."""
    wait = min(max(wait, 0.001), LONGEST_RETRY_S)
    headers = {"Retry-After": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(1000 * wait))}
    return ApiError(429, message, kind=kind, code=code, headers=headers)


def unknown_model(name: str, served: str, param: str) -> ApiError:
    shown = name if len(name) < 200 else name[:200] + "..."
    message = f"The model `{shown}` does not exist; this service has `{served}`"
    return ApiError(404, message, param=param, code="model_not_found")


def from_engine(error: Exception) -> ApiError:
    """What the engine or the path to it raised, as the client should see it."""
    if isinstance(error, RequestRejected):
        return bad_request(str(error))
    if isinstance(error, TimeExceeded):
        return ApiError(408, str(error), code="request_timeout", headers={"x-should-retry": "false"})
    if isinstance(error, EngineStopped):
        return ApiError(
            503, f"{error}; try again shortly", kind="server_error", code="engine_unavailable",
            headers={"Retry-After": "5"},
        )  # fmt: skip
    if isinstance(error, RequestFatal):
        return ApiError(
            500, "computing this request ended the process that did it, again and again: it is not tried any more",
            kind="server_error", code="request_fatal", headers={"x-should-retry": "false"},
        )  # fmt: skip
    return ApiError(
        500, "internal error: see the server's log for this request id", kind="server_error", code="internal_error",
        headers={"x-should-retry": "false"},
    )  # fmt: skip

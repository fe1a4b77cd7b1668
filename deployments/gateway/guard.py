"""What every request passes before any route sees it: where it comes from, its key, its limits.

All of it is decided from the headers, so that a refusal costs no reading and no tokenising. A body is counted while it
is read, whatever its headers said of it.
"""

import asyncio
import ipaddress
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.config import GatewayArgs
from deployments.errors import ApiError
from deployments.gateway.gateway import Gateway
from deployments.gateway.tenants import ANONYMOUS, Tenant, sha256
from model.heap import return_freed_memory

log = logging.getLogger(__name__)

ASSETS = "/docs/assets"
PAGE_FILES = frozenset(f"{ASSETS}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"))
OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/ping", "/docs", "/openapi.json"}) | PAGE_FILES  # need no key
NEED_NO_ENGINE = frozenset(
    {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/tokenize", "/detokenize", "/ml/v1/text/tokenization"}
)  # however busy engines are
CLOSE = {"Connection": "close"}  # what else the client sends is not read
MOST_DIGITS = 18  # of a Content-Length; Python refuses to make a number of thousands
LARGE_BODY = 1_000_000  # bytes; what such a request has filled is given back to the system
RETURN_AFTER_S = 1.0  # once for all that end meanwhile


@dataclass(slots=True)
class Buffered:
    """Bytes of bodies that all open requests hold now."""

    held: int = 0


class Guard:
    """ASGI middleware. Puts the tenant into the request's state. `respond` writes an error in its route's form.

    `open_paths` need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        gateway: Gateway,
        respond: Callable[[Request, ApiError], Response],
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._gateway = gateway
        self._respond = respond
        self._open_paths = open_paths
        self._buffered = Buffered()
        self._returning: asyncio.TimerHandle | None = None

    @property
    def _args(self) -> GatewayArgs:
        return self._gateway.config.gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["state"]["tenant"] = ANONYMOUS
        body = BodyReader(receive, self._args, self._buffered)
        writer = Writer(send, self._args.write_timeout_s)
        try:
            if scope["path"].removeprefix(scope.get("root_path", "")) not in self._open_paths:
                await self._check(scope)
            writer.headers = self._limits_of(scope)
            await self._app(scope, body.receive, writer.send)
        except ApiError as error:
            writer.headers = self._limits_of(scope)
            await self._respond(Request(scope), error)(scope, receive, writer.send)
        except ClientDisconnect:
            log.info("the client left before its request was whole")
        finally:
            if body.release() > LARGE_BODY:
                self._return_memory()

    def _return_memory(self) -> None:
        """Soon, in a thread: the C library keeps what long texts and their tokens have taken."""
        if self._returning is not None:
            return
        loop = asyncio.get_running_loop()

        def begin() -> None:
            self._returning = None
            loop.run_in_executor(None, return_freed_memory)

        self._returning = loop.call_later(RETURN_AFTER_S, begin)

    def _limits_of(self, scope: Scope) -> dict[str, str]:
        return self._gateway.limits.headers(scope["state"]["tenant"])

    async def _check(self, scope: Scope) -> None:
        """Find out whose request it is. Raises `ApiError` for what need not be read."""
        headers = Headers(scope=scope)
        try:
            tenant = scope["state"]["tenant"] = self._tenant(scope, headers)
            self._check_headers(scope, headers)
            if scope["method"] == "POST":
                await self._gateway.limits.take_request(tenant)
                if scope["path"].removeprefix(scope.get("root_path", "")) not in NEED_NO_ENGINE:
                    await self._gateway.admission.refresh()
                    self._gateway.admission.check(tenant)
        except ApiError as error:
            if error.status in (401, 429):
                self._gateway.accounting.refused(scope["state"]["tenant"], error)
            raise

    def _tenant(self, scope: Scope, headers: Headers) -> Tenant:
        """By `Authorization: Bearer KEY` or `x-api-key: KEY`."""
        keys = self._gateway.keys
        if not keys.required:
            return ANONYMOUS
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        tenant = keys.find(key.strip()) if key else None
        digest = sha256(key.strip()) if key else None
        if tenant is not None and digest is not None:
            self._gateway.key_audit.used(tenant.name, digest)
            return tenant
        self._gateway.key_audit.refused(digest, (scope.get("client") or ("unknown",))[0])
        message = "Incorrect API key provided." if key else "You didn't provide an API key: send it as a Bearer token."
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", **CLOSE})

    def _check_headers(self, scope: Scope, headers: Headers) -> None:
        args = self._args
        if not self._gateway.keys.required and is_foreign(headers, args.allowed_origins):
            raise ApiError(403, "requests of web pages are not taken from this origin", headers=CLOSE)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > args.max_header_bytes:
            raise ApiError(431, f"the headers are longer than {args.max_header_bytes} bytes", headers=CLOSE)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415,
                "Content-Encoding is not supported: send the body as it is",
                headers={"Accept-Encoding": "identity", **CLOSE},
            )
        digits = headers.get("content-length", "0").lstrip("0")
        if digits.isdecimal() and (len(digits) > MOST_DIGITS or int(digits) > args.max_body_bytes):
            raise too_large(args.max_body_bytes)


class BodyReader:
    """A request's `receive`, with limits of size and time, and all bodies together within what memory there is."""

    def __init__(self, receive: Receive, args: GatewayArgs, buffered: Buffered) -> None:
        self._receive = receive
        self._args = args
        self._buffered = buffered
        self._deadline = time.monotonic() + args.body_timeout_s
        self._size = 0
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not arrive within {self._args.body_timeout_s:g} s"
            raise ApiError(408, text, code="request_timeout", headers=CLOSE) from None
        if message["type"] == "http.request":
            self._whole = not message.get("more_body", False)
            self._count(len(message.get("body", b"")))
        return message

    def _count(self, size: int) -> None:
        self._size += size
        self._buffered.held += size
        if self._size > self._args.max_body_bytes:
            raise too_large(self._args.max_body_bytes)
        if self._buffered.held > self._args.max_buffered_bytes:
            text = "too many bytes of requests are being read at once: try again shortly"
            raise ApiError(503, text, kind="server_error", code="overloaded", headers={"Retry-After": "1", **CLOSE})

    def release(self) -> int:
        """The bytes that this request held; they count no more."""
        size, self._size = self._size, 0
        self._buffered.held -= size
        return size


class Writer:
    """A request's `send`: adds headers, and gives up on a client that does not read."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self.headers: dict[str, str] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(self.headers)
        async with asyncio.timeout(self._timeout_s):
            await self._send(message)


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes", code="request_too_large", headers=CLOSE)


def is_foreign(headers: Headers, allowed: Collection[str]) -> bool:
    """Whether a page of somebody else's made the request, in the browser of somebody who reaches the service.

    Such a page has no key. Where none is asked for, any page could use what its reader reaches: with a plain form, or
    by a name of its own that it lets point to the service's address (DNS rebinding). Browsers say in `Origin` whose
    page makes a request that is more than a look; what has none was not made by a page. `allowed` may hold "*".
    """
    origin = headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return False
    try:
        page = urlsplit(origin)
        return page.netloc != headers.get("host", "") or not _is_address(page.hostname or "")
    except ValueError:  # no URL at all
        return True


def _is_address(host: str) -> bool:
    """Whether nobody can let it point elsewhere: an IP address, or this machine's own name for itself."""
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False

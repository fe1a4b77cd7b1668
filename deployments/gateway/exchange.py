"""One HTTP exchange: a body in, an answer out, whole or as a stream, and a client that may leave at any time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from cluster.errors import CaravanError
from deployments.errors import ApiError, bad_request, from_engine
from deployments.gateway.accounting import Usage
from deployments.gateway.gateway import Gateway, Generation
from deployments.gateway.pieces import Piece
from deployments.gateway.tenants import Tenant
from deployments.telemetry.record import spent

log = logging.getLogger(__name__)

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect a stream
HELD_S = 0.2  # how soon it is noticed that no engine runs
LOADING_S = 2.0  # how often a stream says how far the engine has come that it waits for
COMMENT = b": waiting\n\n"  # a line that clients of server-sent events skip
# Of one body; more than any request has tokens. A text of 8 MB is decoded in 10 ms, as many bytes of empty lists in a
# second, in which no stream moves.
MAX_VALUES = 300_000

T = TypeVar("T")
Json = dict[str, Any]


class AnswerFormat(Protocol):
    """How a route writes its answers: the JSON of a whole one, the bytes of a streamed one."""

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        """From the pieces of all answers, in the order in which they came."""
        ...

    def opening(self) -> bytes:
        """What a stream begins with; sent with the first piece."""
        ...

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        """`usage` as of this piece."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """What a stream ends with."""
        ...

    def broken(self, error: ApiError) -> bytes:
        """What a stream ends with instead if it fails under way."""
        ...


async def read_json(http: Request, limit: int) -> Any:
    """The body's JSON. Raises `ApiError`: 413 beyond `limit` bytes, 400 for what is no JSON or too much of it."""
    body = bytearray()
    with spent("body"):
        async for part in http.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes", code="request_too_large")
    if not body:
        raise bad_request("the body is empty: send a JSON object")
    if len(body) > MAX_VALUES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise bad_request(f"the body holds more than {MAX_VALUES} values or commas", code="request_too_large")
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None


def request_id(http: Request) -> str:
    """As the `RequestId` middleware gave it."""
    return str(http.scope["state"]["request_id"])


def tenant(http: Request) -> Tenant:
    """As the `Guard` middleware found it."""
    found = http.scope["state"]["tenant"]
    assert isinstance(found, Tenant)
    return found


async def answer(
    http: Request, gateway: Gateway, generation: Generation, written: AnswerFormat, stream: bool
) -> Response:
    """The response to a request under way. If the client leaves, the generation is closed."""
    if not stream:
        body = await or_disconnect(http, _whole(generation, written))
        return Response(body, media_type="application/json")
    # The first piece is awaited here, so that an engine that refuses is still an HTTP error; unless no engine runs.
    first = asyncio.ensure_future(anext(generation.pieces))
    await or_disconnect(http, _first_or_held(first, gateway))
    return EventStream(generation, first, _events(first, gateway, generation, written), gateway)


async def _first_or_held(first: "asyncio.Future[Piece]", gateway: Gateway) -> None:
    """Until the first piece is there, or requests are known to be held because no engine runs. Raises what it does."""
    try:
        while not first.done() and not gateway.load.held:
            await asyncio.wait({first}, timeout=HELD_S)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        raise


async def _whole(generation: Generation, written: AnswerFormat) -> bytes:
    try:
        collected = [piece async for piece in generation.pieces]
    finally:
        await generation.pieces.aclose()
    return await _made(collected, lambda: msgspec.json.encode(written.whole(collected, generation.usage)))


async def _made(pieces: list[Piece], make: Callable[[], bytes]) -> bytes:
    """What is written of these pieces: in a thread if a whole prompt's logprobs are among them, which takes a while."""
    return await asyncio.to_thread(make) if any(piece.prompt_logprobs for piece in pieces) else make()


async def _events(
    coming: "asyncio.Future[Piece]", gateway: Gateway, generation: Generation, written: AnswerFormat
) -> AsyncIterator[bytes]:
    """Server-sent events. What fails under way, be it the engine or this request alone, is said in the stream."""
    usage = generation.usage
    try:
        first = await coming
        yield written.opening() + await _made([first], lambda: written.chunk(first, usage))
        unseen: dict[int, list[int]] = {}  # by answer: tokens that have added nothing to be shown yet
        async for piece in generation.pieces:
            unseen[piece.index] = piece.token_ids = unseen.get(piece.index, []) + piece.token_ids
            if piece.text or piece.calls or piece.finish_reason or piece.logprobs or piece.prompt_logprobs:
                unseen[piece.index] = []
                yield written.chunk(piece, usage)
        yield written.closing(usage)
    except Exception as error:
        if not isinstance(error, CaravanError):
            log.exception("a stream failed")
        gateway.recorder.inc("streams_broken_total")
        yield written.broken(from_engine(error))


class EventStream(StreamingResponse):
    """A stream whose generation is closed with it, even if the client has left before the first byte.

    While nothing comes, because the pipeline is being rebuilt, say, a comment every `keepalive_s` keeps the connection
    from being taken for dead; while no engine runs, comments say how far the one has come that loads.
    """

    def __init__(
        self, generation: Generation, first: "asyncio.Future[Piece]", parts: AsyncIterator[bytes], gateway: Gateway
    ) -> None:
        super().__init__(parts, media_type="text/event-stream", headers=UNBUFFERED)
        self._first = first
        self._generation = generation
        self._gateway = gateway

    def _period(self) -> float:
        keepalive_s = self._gateway.config.gateway.keepalive_s
        return min(LOADING_S, keepalive_s) if self._gateway.load.held else keepalive_s

    async def _comment(self) -> bytes:
        if not self._gateway.load.held:
            return COMMENT
        await self._gateway.admission.refresh()
        return f": {self._gateway.admission.loading or 'starting an engine'}\n\n".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn = asyncio.Lock()
        sent = 0.0  # when, by the event loop's clock; 0: nothing yet, and a comment must not come first

        async def send_in_turn(message: Message) -> None:
            nonlocal sent
            async with turn:
                await send(message)
                sent = asyncio.get_running_loop().time()

        async def keep_alive() -> None:
            while True:
                period = self._period()
                await asyncio.sleep(period)
                if sent and asyncio.get_running_loop().time() - sent >= period:
                    body = await self._comment()
                    await send_in_turn({"type": "http.response.body", "body": body, "more_body": True})

        comments = asyncio.create_task(keep_alive())
        try:
            await super().__call__(scope, receive, send_in_turn)
        finally:
            comments.cancel()
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
            await self._generation.pieces.aclose()


def sse(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def or_disconnect(http: Request, work: Awaitable[T]) -> T:
    """`work`, unless the client leaves first: then it is cancelled, which frees the sequence in the engine."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

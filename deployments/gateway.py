"""HTTP in front of the engines: parse, tokenise, stream, and say clearly what went wrong.

The gateway keeps no state beyond open requests: any number of them may run, and any may die.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import CaravanError
from cluster.sequence import Request as EngineRequest
from deployments.config import AppConfig
from deployments.engine_client import EngineClient, MetricsRecorder
from deployments.errors import ApiError, bad_request, from_engine
from deployments.formats import ChatFormat, CompletionFormat, Format, usage
from deployments.protocol import ChatRequest, CompletionRequest, SamplingFields, parse
from deployments.resume import ResumingEngineClient
from deployments.text import Piece, pieces
from model.chat import ChatTemplate, PromptFormatError, load_chat_template
from model.infill import can_infill, encode_infill, infill_stop_ids
from model.tokenizer import Detokenizer, Tokenizer, check_fits, load_tokenizer
from model.weights import read_config, resolve_path

log = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat may use the rest of the context
LONG_TEXT = 4_000  # characters; tokenising more than this would hold up other streams


T = TypeVar("T")


@dataclass(slots=True)
class Usage:
    """Counts and times of one request, for its `usage` field, its metrics and its log line."""

    endpoint: str
    request_id: str
    prompt_tokens: int
    started: float
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0
    outcome: str = "cancelled"  # until something else is known

    def as_json(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request makes of its text."""

    token_ids: list[int]
    stop_ids: frozenset[int] = frozenset()  # that end the answer, beside the tokenizer's own
    starts_text: bool = False  # whether the answer is a text of its own, not the continuation of the prompt


class Gateway:
    """One gateway: a model's name, tokenizer and template in front of an engine client."""

    def __init__(self, config: AppConfig, engine: EngineClient, recorder: MetricsRecorder) -> None:
        path = resolve_path(config.model.path)
        self.config = config
        g = config.gateway
        self.engine = ResumingEngineClient(engine, g.resume_attempts, g.resume_timeout_s, recorder)
        self.recorder = recorder
        model = read_config(path)
        self.tokenizer: Tokenizer = load_tokenizer(path)
        check_fits(self.tokenizer, model.vocab_size, path)
        self.template: ChatTemplate | None = load_chat_template(path, self.tokenizer, config.model.prompt_format)
        self.max_model_len = config.model.max_model_len or model.context_length
        self.created = int(time.time())

    # -- the two endpoints --------------------------------------------------------------------------------------------

    async def chat(self, http: Request) -> Response:
        request = parse(ChatRequest, await self._body(http))
        self._check_model(request)
        prompt = await self._chat_prompt(request)
        answer = ChatFormat(f"chatcmpl-{secrets.token_hex(12)}", self.config.model.name, request.wants_usage)
        return await self._answer(http, request, prompt, answer, self.max_model_len)

    async def completion(self, http: Request) -> Response:
        request = parse(CompletionRequest, await self._body(http))
        self._check_model(request)
        prompt = await self._completion_prompt(request)
        answer = CompletionFormat(f"cmpl-{secrets.token_hex(12)}", self.config.model.name, request.wants_usage)
        return await self._answer(http, request, prompt, answer, DEFAULT_COMPLETION_TOKENS)

    async def _answer(
        self, http: Request, request: SamplingFields, prompt: Prompt, answer: Format, default: int
    ) -> Response:
        ids = prompt.token_ids
        max_tokens = self._max_tokens(len(ids), request.budget, default)
        self._check_biases(request)
        sampling = request.sampling(max_tokens, self.tokenizer.eos_ids | prompt.stop_ids)
        endpoint = "chat" if prompt.starts_text else "completions"
        counts = Usage(endpoint, http.scope["state"]["request_id"], len(ids), time.monotonic())
        events = self.engine.generate(EngineRequest(request_id=secrets.token_hex(12), token_ids=ids, sampling=sampling))
        detokenizer = Detokenizer(self.tokenizer, at_start=prompt.starts_text)
        stream = self._counted(pieces(events, self.tokenizer, detokenizer, request.stop), counts)
        if not request.stream:
            body = await or_disconnect(http, self._whole(stream, answer, counts))
            return Response(msgspec.json.encode(body), media_type="application/json")
        # The first piece is awaited here, so that an engine that refuses is still an HTTP error.
        first = await or_disconnect(http, anext(stream))
        body_parts = self._events(first, stream, answer, counts, request.wants_usage)
        return StreamingResponse(body_parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _whole(self, stream: AsyncGenerator[Piece, None], answer: Format, counts: Usage) -> dict[str, Any]:
        try:
            collected = [piece async for piece in stream]
        finally:
            await stream.aclose()
        return answer.whole(collected, counts.as_json())

    async def _events(
        self, first: Piece, rest: AsyncGenerator[Piece, None], answer: Format, counts: Usage, with_usage: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events. An engine that fails under way is said so in the stream, which then ends."""
        try:
            opening = answer.opening()
            yield (sse(opening) if opening else b"") + sse(answer.chunk(first))
            async for piece in rest:
                if piece.text or piece.finish_reason or piece.logprobs:
                    yield sse(answer.chunk(piece))
            yield (sse(answer.usage_chunk(counts.as_json())) if with_usage else b"") + b"data: [DONE]\n\n"
        except CaravanError as error:
            self.recorder.inc("streams_broken_total")
            yield sse(from_engine(error).body)
        finally:
            await rest.aclose()

    async def _counted(self, stream: AsyncGenerator[Piece, None], counts: Usage) -> AsyncGenerator[Piece, None]:
        """The same pieces, counted and timed."""
        try:
            async for piece in stream:
                now = time.monotonic()
                if not counts.completion_tokens:
                    counts.first_token = now
                    counts.cached_tokens = piece.num_cached_tokens
                    self.recorder.observe("ttft_seconds", now - counts.started)
                elif piece.num_tokens:
                    gap = (now - counts.last_token) / piece.num_tokens
                    self.recorder.observe("inter_token_seconds", gap)
                counts.last_token = now
                counts.completion_tokens += piece.num_tokens
                if piece.finish_reason is not None:
                    counts.outcome = piece.finish_reason
                yield piece
        except CaravanError as error:
            counts.outcome = "rejected" if isinstance(error, ValueError) else "error"
            raise
        finally:
            await stream.aclose()
            self._record(counts)

    def _record(self, counts: Usage) -> None:
        seconds = time.monotonic() - counts.started
        self.recorder.inc("requests_total", endpoint=counts.endpoint, outcome=counts.outcome)
        self.recorder.inc("prompt_tokens_total", counts.prompt_tokens)
        self.recorder.observe("e2e_seconds", seconds)
        fields = {
            "request_id": counts.request_id,
            "endpoint": counts.endpoint,
            "outcome": counts.outcome,
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
            "ttft_s": round(counts.first_token - counts.started, 4) if counts.first_token else None,
            "e2e_s": round(seconds, 4),
        }
        log.info("request finished", extra=fields)

    # -- checks and prompts -------------------------------------------------------------------------------------------

    async def _body(self, http: Request) -> Any:
        limit = self.config.gateway.max_body_bytes
        body = bytearray()
        async for part in http.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes", code="request_too_large")
        if not body:
            raise bad_request("the body is empty: send a JSON object")
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise bad_request(f"the body is not valid JSON: {error}") from None

    def _check_model(self, request: SamplingFields) -> None:
        if request.model != self.config.model.name:
            raise unknown_model(request.model, self.config.model.name)

    def _check_biases(self, request: SamplingFields) -> None:
        for token_id in request.logit_bias or {}:
            if not 0 <= int(token_id) < self.tokenizer.vocab_size:
                raise bad_request(f"logit_bias: {token_id} is not a token id of this model", "logit_bias")

    async def _chat_prompt(self, request: ChatRequest) -> Prompt:
        template = self.template
        if template is None:
            raise bad_request("this model has no chat format: use /v1/completions", "messages")
        messages = [message.as_template_input for message in request.messages]
        size = sum(len(m["content"]) for m in messages)
        try:
            ids = await in_thread_if(size > LONG_TEXT, lambda: template.encode(messages))
        except PromptFormatError as error:
            raise bad_request(str(error), "messages") from None
        return Prompt(ids, template.stop_ids, starts_text=True)

    async def _completion_prompt(self, request: CompletionRequest) -> Prompt:
        prompt = request.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if request.suffix:
            return await self._infill_prompt(prompt, request.suffix)
        if isinstance(prompt, str):
            text = prompt
            ids = await in_thread_if(len(text) > LONG_TEXT, lambda: self.tokenizer.encode(text, add_bos=True))
        else:
            ids = self._checked_ids(prompt)
        if not ids:
            raise bad_request("prompt: is empty", "prompt")
        return Prompt(ids)

    async def _infill_prompt(self, prefix: Any, suffix: str) -> Prompt:
        """Code Llama writes what belongs between prompt and suffix."""
        if not can_infill(self.tokenizer):
            raise bad_request("suffix: this model cannot fill in text before a suffix", "suffix")
        if not isinstance(prefix, str):
            raise bad_request("prompt: must be a string if there is a suffix", "prompt")
        long = len(prefix) + len(suffix) > LONG_TEXT
        ids = await in_thread_if(long, lambda: encode_infill(self.tokenizer, prefix, suffix))
        return Prompt(ids, infill_stop_ids(self.tokenizer))

    def _checked_ids(self, ids: Sequence[Any]) -> list[int]:
        if any(isinstance(i, str | list) for i in ids):
            raise bad_request("prompt: several prompts in one request are not supported yet", "prompt")
        vocab = self.tokenizer.vocab_size
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise bad_request(f"prompt: token ids must be whole numbers from 0 to {vocab - 1}", "prompt")
        return list(ids)

    def _max_tokens(self, prompt_tokens: int, budget: int | None, default: int) -> int:
        room = self.max_model_len - prompt_tokens
        wanted = budget if budget is not None else max(1, min(default, room))
        if wanted > room:
            raise bad_request(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the messages, {wanted} in the completion). "
                "Please reduce the length of the messages or completion.",
                "messages" if default != DEFAULT_COMPLETION_TOKENS else "prompt",
                "context_length_exceeded",
            )
        return wanted

    # -- what is served, and whether ----------------------------------------------------------------------------------

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.config.model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "caravan",
            "max_model_len": self.max_model_len,
        }

    async def ready(self) -> Response:
        """200 if some replica has produced a token lately; otherwise 503 with every replica's reason."""
        now = time.time()
        replicas = []
        for status in await self.engine.replicas():
            state, reason = status.state, status.reason
            if now - status.updated_at > self.config.gateway.ready_max_age_s:
                state, reason = "stalled", f"has not been heard of for {now - status.updated_at:.0f} s"
            replicas.append({"replica": status.replica, "state": state, "reason": reason, "loaded": status.loaded})
        ready = any(replica["state"] == "ready" for replica in replicas)
        reason = "" if ready else "; ".join(str(r["reason"]) for r in replicas) or "no engine replica is running yet"
        body = {"ready": ready, "reason": reason, "replicas": replicas}
        return JSONResponse(body, 200 if ready else 503, headers={} if ready else {"Retry-After": "5"})


def create_gateway(
    config: AppConfig, engine: EngineClient, recorder: MetricsRecorder, *, echo_request_id: bool = True
) -> FastAPI:
    """The ASGI application. Raises `ValueError` if the checkpoint's tokenizer or template cannot be read.

    `echo_request_id` is False behind Ray Serve's proxy, which writes the X-Request-Id of every answer by itself.
    """
    gateway = Gateway(config, engine, recorder)
    app = FastAPI(title="Caravan", version=package_version(), docs_url=None, redoc_url=None)
    app.add_middleware(RequestId, echo=echo_request_id)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(CaravanError, _caravan_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)
    app.post("/v1/chat/completions")(gateway.chat)
    app.post("/v1/completions")(gateway.completion)
    app.get("/ready")(gateway.ready)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [gateway.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != config.model.name:
            raise unknown_model(name, config.model.name)
        return gateway.model_card()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def version_() -> dict[str, str]:
        return {"version": package_version()}

    return app


# -- small helpers ----------------------------------------------------------------------------------------------------


def sse(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def unknown_model(name: str, served: str) -> ApiError:
    shown = name if len(name) < 200 else name[:200] + "..."
    return ApiError(
        404, f"The model `{shown}` does not exist; this service has `{served}`", param="model", code="model_not_found"
    )


async def in_thread_if(condition: bool, work: Callable[[], list[int]]) -> list[int]:
    """Long work leaves the event loop to others."""
    return await asyncio.to_thread(work) if condition else work()


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


def package_version() -> str:
    try:
        return version("caravan")
    except PackageNotFoundError:
        return "unknown"


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

        async def send_with_id(message: Message) -> None:
            if self._echo and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _respond(error: ApiError) -> Response:
    return Response(
        json.dumps(error.body), status_code=error.status, headers=error.headers, media_type="application/json"
    )


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _respond(error)


async def _caravan_error(_: Request, error: Exception) -> Response:
    return _respond(from_engine(error))


async def _http_error(http: Request, error: Exception) -> Response:
    """Starlette's own: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
    message = what.get(error.status_code, str(error.detail))
    return _respond(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _internal_error(http: Request, error: Exception) -> Response:
    log.error("internal error", exc_info=error, extra={"request_id": http.scope.get("state", {}).get("request_id")})
    return _respond(from_engine(error))

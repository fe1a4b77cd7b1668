"""IBM watsonx.ai: /ml/v1/text/generation, its stream, tokenization, and the list of models its client asks for first.

Source: the watsonx.ai API reference. A bearer token is read only where this service asks for keys. `version`, a date,
is required as there; one form of the API is served, whatever the date.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from deployments.errors import ApiError, bad_request
from deployments.gateway.accounting import Usage
from deployments.gateway.exchange import Json, answer, request_id
from deployments.gateway.gateway import Gateway, Generation
from deployments.gateway.pieces import Piece, TokenLogprob, token_name
from deployments.gateway.prompts import Prompt
from deployments.routes.hosted.vendor import (
    Count,
    Seed,
    Share,
    StrictBody,
    Vendor,
    documented,
    json_error,
    only,
    sampling_params,
    stop_strings,
)
from deployments.routes.openai_protocol import Number, Whole, parse_body
from model.sampling_params import SamplingParams

DEFAULT_NEW_TOKENS = 20
MAX_STOPS = 6
SOFTWARE_VERSION = "5.1.0"
VERSION = {"name": "version", "in": "query", "required": True, "schema": {"type": "string", "example": "2023-05-29"}}
MAX_TOP_TOKENS = 5
CODES = {401: "authentication_token_not_valid", 404: "model_not_supported", 413: "request_too_large"}
CODES |= {429: "rate_limit_reached", 500: "internal_server_error", 503: "service_unavailable"}


class ReturnOptions(StrictBody):
    input_text: bool | None = None
    generated_tokens: bool | None = None
    input_tokens: bool | None = None
    token_logprobs: bool | None = None
    token_ranks: Annotated[Any, only(False)] = None
    top_n_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOP_TOKENS)] | None = None


class Parameters(StrictBody):
    """`TextGenParameters`."""

    decoding_method: Literal["greedy", "sample"] | None = None
    length_penalty: Annotated[Any, only()] = None
    max_new_tokens: Count | None = None
    min_new_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    prompt_variables: Annotated[Any, only()] = None
    random_seed: Seed | None = None
    repetition_penalty: Annotated[Number, Field(ge=1, le=2)] | None = None
    return_options: ReturnOptions | None = None
    include_stop_sequence: bool | None = None
    stop_sequences: Annotated[list[str] | None, stop_strings(MAX_STOPS)] = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    time_limit: Count | None = None  # milliseconds
    top_k: Annotated[Whole, Field(ge=1, le=100)] | None = None
    top_p: Share | None = None
    truncate_input_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None

    @property
    def options(self) -> ReturnOptions:
        return self.return_options or ReturnOptions()

    def sampling(self, max_tokens: int, stop_ids: frozenset[int]) -> SamplingParams:
        greedy = self.decoding_method == "greedy"
        shown = self.options.generated_tokens
        return sampling_params(
            max_tokens,
            stop_ids,
            seed=self.random_seed,
            temperature=0.0 if greedy else self.temperature,
            top_p=None if greedy else self.top_p,
            top_k=None if greedy else self.top_k,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_new_tokens,
            logprobs=(self.options.top_n_tokens or 0) if shown else None,
        )


class GenerationBody(StrictBody):
    """`TextGenRequest`. The ids of project and space mean nothing here."""

    model_id: str
    input: str
    parameters: Parameters | None = None
    project_id: str | None = None
    space_id: str | None = None
    moderations: Annotated[Any, only({})] = None


class TokenizationParameters(Parameters):
    """The client sends those of generation too."""

    return_tokens: bool | None = None


class TokenizationBody(StrictBody):
    model_id: str
    input: str
    parameters: TokenizationParameters | None = None
    project_id: str | None = None
    space_id: str | None = None


class Watsonx(Vendor):
    """The endpoints of one gateway."""

    name = "watsonx"

    async def generation(self, http: Request) -> Response:
        return await self._answer(http, stream=False)

    async def generation_stream(self, http: Request) -> Response:
        return await self._answer(http, stream=True)

    async def _answer(self, http: Request, stream: bool) -> Response:
        check_version(http)
        request = parse_body(GenerationBody, await self.body(http))
        self.gateway.bounds.check_name(request.model_id, "model_id")
        parameters = request.parameters or Parameters()
        prompt = await self.prompt(http, request.input, "input", parameters.truncate_input_tokens)
        max_tokens = self.gateway.bounds.max_tokens(
            prompt, parameters.max_new_tokens or DEFAULT_NEW_TOKENS, None, "input"
        )
        sampling = parameters.sampling(max_tokens, self.gateway.prompts.stop_ids(prompt))
        shows_stop = parameters.include_stop_sequence is not False
        generation = self.gateway.generate(self.request(http, prompt, sampling, parameters.stop_sequences, shows_stop))
        texts = self._texts(prompt) if parameters.options.input_tokens else None
        written = WatsonxFormat(request, sampling.seed, len(prompt.token_ids), texts, request_id(http))
        if parameters.time_limit is not None:
            generation = Generation(written.limited(generation.pieces, parameters.time_limit / 1000), generation.usage)
        return await answer(http, self.gateway, generation, written, stream)

    def _texts(self, prompt: Prompt) -> list[str]:
        tokenizer = self.gateway.tokenizer
        return [token_name(tokenizer, i).decode("utf-8", "replace") for i in prompt.token_ids]

    async def tokenization(self, http: Request) -> Json:
        check_version(http)
        request = parse_body(TokenizationBody, await self.body(http))
        self.gateway.bounds.check_name(request.model_id, "model_id")
        prompt = await self.prompt(http, request.input, "input")
        result: Json = {"token_count": len(prompt.token_ids)}
        if request.parameters is not None and request.parameters.return_tokens:
            result["tokens"] = self._texts(prompt)
        return {"model_id": request.model_id, "result": result}

    async def foundation_model_specs(self, http: Request) -> Json:
        check_version(http)
        longest = self.gateway.bounds.max_model_len
        limits = {"max_sequence_length": longest, "max_output_tokens": longest - 1}
        functions = [{"id": "text_generation"}]
        specs = [
            {"model_id": name, "label": name, "provider": "caravan", "functions": functions, "model_limits": limits}
            for name in self.gateway.bounds.names
        ]
        return {"total_count": len(specs), "limit": 100, "resources": specs}

    async def installation(self) -> Json:
        """What the client takes this service for: watsonx.ai software, whose requests need no cloud account."""
        return {"version": SOFTWARE_VERSION}

    async def scope(self, scope_id: str) -> Json:
        """The client wants to see its project or space before it asks for anything; here any name will do."""
        return {
            "metadata": {"id": scope_id, "guid": scope_id},
            "entity": {"name": scope_id, "storage": {"type": "none"}},
        }


class WatsonxFormat:
    """`TextGenResponse`; streamed, one event for every piece, counts running up."""

    def __init__(
        self, request: GenerationBody, seed: int, prompt_tokens: int, input_tokens: list[str] | None, trace: str
    ) -> None:
        self._parameters = request.parameters or Parameters()
        self._request = request
        self._seed = seed
        self._prompt_tokens = prompt_tokens
        self._input_tokens = input_tokens
        self._trace = trace
        self._events = 0
        self._ran_out = False  # of time

    async def limited(self, pieces: AsyncGenerator[Piece, None], seconds: float) -> AsyncGenerator[Piece, None]:
        """The pieces of that many seconds; then the request is cancelled and what there is is the answer."""
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces)
                yield piece
                if piece.finish_reason is not None:
                    return
        except TimeoutError:
            self._ran_out = True
            yield Piece(finish_reason="length")
        finally:
            await pieces.aclose()

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        result = self._of_prompt() | self._of_answer(pieces, usage)
        result["generated_text"] = self._shown_input() + result["generated_text"]
        if self._parameters.decoding_method != "greedy":
            result["seed"] = self._seed
        return self._response(result)

    def opening(self) -> bytes:
        """The first event counts the prompt and has no text of the answer yet."""
        nothing = {"generated_text": self._shown_input(), "generated_token_count": 0, "stop_reason": "not_finished"}
        return self._event(self._response(self._of_prompt() | nothing))

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        return self._event(self._response({"input_token_count": 0} | self._of_answer([piece], usage)))

    def closing(self, usage: Usage) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return self._event(error_body(error, self._trace), "error")

    def _shown_input(self) -> str:
        return self._request.input if self._parameters.options.input_text else ""

    def _of_prompt(self) -> Json:
        found: Json = {"input_token_count": self._prompt_tokens}
        if self._input_tokens is not None:
            found["input_tokens"] = [{"text": text} for text in self._input_tokens]
        return found

    def _of_answer(self, pieces: list[Piece], usage: Usage) -> Json:
        found: Json = {
            "generated_text": "".join(piece.text for piece in pieces),
            "generated_token_count": usage.completion_tokens,
            "stop_reason": self._stop_reason(pieces[-1]),
        }
        if self._parameters.options.generated_tokens:
            found["generated_tokens"] = [self._token(x) for piece in pieces for x in piece.logprobs]
        return found

    def _stop_reason(self, piece: Piece) -> str:
        if piece.finish_reason is None:
            return "not_finished"
        if piece.finish_reason == "length":
            return "time_limit" if self._ran_out else "max_tokens"
        return "stop_sequence" if piece.stop_string is not None else "eos_token"

    def _token(self, token: TokenLogprob) -> Json:
        options = self._parameters.options
        found: Json = {"text": token.token.decode("utf-8", "replace")}
        if options.token_logprobs:
            found["logprob"] = token.logprob
        if options.top_n_tokens:
            tops: list[Json] = [{"text": t.token.decode("utf-8", "replace")} for t in token.top]
            if options.token_logprobs:
                tops = [top | {"logprob": t.logprob} for top, t in zip(tops, token.top, strict=True)]
            found["top_tokens"] = tops
        return found

    def _response(self, result: Json) -> Json:
        return {"model_id": self._request.model_id, "created_at": now(), "results": [result]}

    def _event(self, body: Json, kind: str = "message") -> bytes:
        self._events += 1
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (self._events, kind.encode(), msgspec.json.encode(body))


def check_version(http: Request) -> None:
    version = http.query_params.get("version", "")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", version):
        raise bad_request("version: is required in the query, as a date like 2023-05-29", "version")


def now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def error_body(error: ApiError, trace: str) -> Json:
    found = error.body["error"]
    code = CODES.get(error.status) or found["code"] or "invalid_request_entity"
    return {"errors": [{"code": code, "message": found["message"]}], "trace": trace, "status_code": error.status}


def respond(error: ApiError, trace: str) -> Response:
    return json_error(error.status, error_body(error, trace), error.headers)


def router(gateway: Gateway) -> APIRouter:
    api = Watsonx(gateway)
    routes = APIRouter(tags=["watsonx.ai"])
    asked = {"model_id": gateway.config.model.name, "input": "Once upon a time"}
    body = documented(GenerationBody, asked | {"parameters": {"max_new_tokens": 20}}, VERSION)
    tokens = documented(TokenizationBody, asked, VERSION)
    routes.post("/ml/v1/text/generation", **body)(api.generation)
    routes.post("/ml/v1/text/generation_stream", **body)(api.generation_stream)
    routes.post("/ml/v1/text/tokenization", **tokens)(api.tokenization)
    routes.get("/ml/v1/foundation_model_specs", openapi_extra={"parameters": [VERSION]})(api.foundation_model_specs)
    routes.get("/ml/wml_services/v2/version")(api.installation)
    routes.get("/v2/projects/{scope_id}")(api.scope)
    routes.get("/v2/spaces/{scope_id}")(api.scope)
    return routes

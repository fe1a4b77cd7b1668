"""Hugging Face's text-generation-inference (TGI): /generate, /generate_stream, / and /info.

As its router and its `NextTokenChooser` have it: nothing is drawn unless sampling is asked for (a temperature of 1
alone does not), a stop string is part of the answer, an end token is shown in `tokens` but not in `generated_text`.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from deployments.errors import ApiError
from deployments.gateway.accounting import Usage
from deployments.gateway.constraints import make_constraint
from deployments.gateway.exchange import Json, answer, or_disconnect, sse, tenant
from deployments.gateway.gateway import Gateway
from deployments.gateway.pieces import Piece, TokenLogprob
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
from deployments.routes.openai_protocol import Number, parse_body
from deployments.version import package_version
from model.sampling_params import MAX_LOGPROBS, SamplingParams
from model.text.constraint import Constraint

DEFAULT_NEW_TOKENS = 100
MAX_STOPS = 4
EXAMPLE = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 20, "details": True}}


class Grammar(StrictBody):
    """What the answer must match."""

    type: Literal["json", "json_schema", "regex"]
    value: Any

    @property
    def schema(self) -> Any:
        """TGI's newer clients put the schema beside a name."""
        if self.type == "json_schema" and isinstance(self.value, dict) and "schema" in self.value:
            return self.value["schema"]
        return self.value


class Parameters(StrictBody):
    """`GenerateParameters` of TGI."""

    adapter_id: Annotated[Any, only()] = None
    best_of: Annotated[Any, only(1)] = None
    decoder_input_details: Annotated[Any, only(False)] = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    grammar: Grammar | None = None
    max_new_tokens: Count | None = DEFAULT_NEW_TOKENS  # null: as many as there is room for
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    return_full_text: bool | None = None
    seed: Seed | None = None
    stop: Annotated[list[str] | None, stop_strings(MAX_STOPS)] = None
    temperature: Annotated[Number, Field(gt=0, le=100)] | None = None
    top_k: Count | None = None
    top_n_tokens: Annotated[Count, Field(le=MAX_LOGPROBS)] | None = None
    top_p: Share | None = None
    truncate: Count | None = None
    typical_p: Annotated[Any, only(1, 1.0)] = None
    watermark: Annotated[Any, only(False)] = None

    @property
    def draws(self) -> bool:
        return bool(
            self.do_sample
            or self.temperature not in (None, 1)
            or self.top_k is not None
            or self.top_p not in (None, 1)
        )  # fmt: skip

    def sampling(self, max_tokens: int, stop_ids: frozenset[int], logprobs: int | None) -> SamplingParams:
        return sampling_params(
            max_tokens,
            stop_ids,
            seed=self.seed,
            temperature=(self.temperature or 1.0) if self.draws else 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logprobs=logprobs,
        )


class GenerateRequest(StrictBody):
    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


class TGI(Vendor):
    """The endpoints of one gateway."""

    name = "tgi"

    async def compatible(self, http: Request) -> Response:
        """POST /, for the clients of the hosted inference API: a list, or a stream if the body says so."""
        request = parse_body(GenerateRequest, await self.body(http))
        return await self.generate(http, request, bool(request.stream), as_list=True)

    async def generate_whole(self, http: Request) -> Response:
        return await self.generate(http, parse_body(GenerateRequest, await self.body(http)), False)

    async def generate_stream(self, http: Request) -> Response:
        return await self.generate(http, parse_body(GenerateRequest, await self.body(http)), True)

    async def generate(self, http: Request, request: GenerateRequest, stream: bool, as_list: bool = False) -> Response:
        parameters = request.parameters or Parameters()
        prompt = await self.prompt(http, request.inputs, "inputs", parameters.truncate)
        max_tokens = self.gateway.bounds.max_tokens(prompt, parameters.max_new_tokens, None, "inputs")
        wants_tokens = stream or bool(parameters.details)
        logprobs = (parameters.top_n_tokens or 0) if wants_tokens else None
        sampling = parameters.sampling(max_tokens, self.gateway.prompts.stop_ids(prompt), logprobs)
        if parameters.grammar is not None:
            sampling = sampling.constrained(await self._constraint(http, parameters.grammar, prompt))
        names = {i: name for name, i in self.gateway.tokenizer.control_tokens.items()}
        written = TGIFormat(request, sampling.seed if parameters.draws else None, names, as_list)
        generation = self.gateway.generate(self.request(http, prompt, sampling, parameters.stop))
        response = await answer(http, self.gateway, generation, written, stream)
        response.headers["x-prompt-tokens"] = str(len(prompt.token_ids))
        if not stream:
            response.headers["x-generated-tokens"] = str(generation.usage.completion_tokens)
        return response

    async def _constraint(self, http: Request, grammar: Grammar, prompt: Prompt) -> Constraint:
        param, kind = "parameters.grammar", "regex" if grammar.type == "regex" else "json_schema"
        found = make_constraint(param, kind, grammar.schema, self.gateway.prompts.stop_ids(prompt))
        await or_disconnect(http, self.gateway.constraints.accept(tenant(http), found, param))
        return found

    async def info(self) -> Json:
        config, longest = self.gateway.config, self.gateway.bounds.max_model_len
        return {
            "model_id": config.model.name,
            "model_sha": None,
            "model_dtype": f"torch.{config.model.dtype}",
            "model_device_type": config.pipeline.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": config.scheduler.max_num_seqs,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOPS,
            "max_input_length": longest - 1,
            "max_input_tokens": longest - 1,
            "max_total_tokens": longest,
            "max_batch_total_tokens": config.scheduler.max_num_batched_tokens,
            "max_client_batch_size": 1,
            "router": "caravan",
            "version": package_version(),
            "sha": None,
            "docker_label": None,
        }


class TGIFormat:
    """`GenerateResponse`, or a `StreamResponse` for every token."""

    def __init__(self, request: GenerateRequest, seed: int | None, names: dict[int, str], as_list: bool) -> None:
        self._parameters = request.parameters or Parameters()
        self._text = request.inputs if self._parameters.return_full_text else ""
        self._seed = seed
        self._names = names  # of control tokens, by id
        self._as_list = as_list
        self._sent = 0

    def whole(self, pieces: list[Piece], usage: Usage) -> Any:
        answer: Json = {"generated_text": self._text + "".join(piece.text for piece in pieces)}
        if self._parameters.details:
            found = [x for piece in pieces for x in _tokens(piece)]
            details = self._details(pieces[-1], len(found)) | {"prefill": [], "tokens": [self._token(x) for x in found]}
            if self._parameters.top_n_tokens is not None:
                details["top_tokens"] = [[self._alternative(t) for t in x.top] for x in found]
            answer["details"] = details
        return [answer] if self._as_list else answer

    def opening(self) -> bytes:
        return b""

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        self._text += piece.text
        events = []
        for token in _tokens(piece):
            self._sent += 1
            event: Json = {"index": self._sent, "token": self._token(token), "generated_text": None, "details": None}
            if self._parameters.top_n_tokens is not None:
                event["top_tokens"] = [self._alternative(t) for t in token.top]
            events.append(event)
        if piece.finish_reason is not None and events:
            details = self._details(piece, self._sent) | {"input_length": usage.prompt_tokens}
            events[-1] |= {"generated_text": self._text, "details": details}
        return b"".join(map(sse, events))

    def closing(self, usage: Usage) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        return sse(error_body(error))

    def _token(self, token: TokenLogprob) -> Json:
        name = self._names.get(token.token_id)
        text = token.text if name is None else name
        return {"id": token.token_id, "text": text, "logprob": token.logprob, "special": name is not None}

    def _alternative(self, token: TokenLogprob) -> Json:
        return self._token(replace(token, text=token.token.decode("utf-8", "replace")))

    def _details(self, last: Piece, generated_tokens: int) -> Json:
        reason = "stop_sequence" if last.stop_string is not None else "eos_token"
        return {
            "finish_reason": "length" if last.finish_reason == "length" else reason,
            "generated_tokens": generated_tokens,
            "seed": self._seed,
        }


def _tokens(piece: Piece) -> list[TokenLogprob]:
    """What a piece adds to `tokens`: here the token that ends an answer counts."""
    return [*piece.logprobs, piece.stop_token] if piece.stop_token is not None else piece.logprobs


def error_body(error: ApiError) -> Json:
    """{"error", "error_type"}; TGI's clients turn the type into an exception of their own."""
    kinds = {429: "overloaded", 503: "overloaded", 500: "incomplete_generation"}
    return {"error": error.body["error"]["message"], "error_type": kinds.get(error.status, "validation")}


def respond(error: ApiError, request_id: str) -> Response:
    """422 for what TGI calls a validation error."""
    status = 422 if error.status == 400 else error.status
    return json_error(status, error_body(error), error.headers)


def router(gateway: Gateway) -> APIRouter:
    api = TGI(gateway)
    routes = APIRouter(tags=["text-generation-inference"])
    body = documented(GenerateRequest, EXAMPLE)
    routes.post("/", summary="Generate, whole in a list or as a stream", **body)(api.compatible)
    routes.post("/generate", summary="Generate", **body)(api.generate_whole)
    routes.post("/generate_stream", summary="Generate, a token an event", **body)(api.generate_stream)
    routes.get("/info", summary="What is served, and its limits")(api.info)
    return routes

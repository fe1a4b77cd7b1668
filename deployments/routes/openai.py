"""OpenAI's API: completions, chat completions and models."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.errors import bad_request
from deployments.gateway.exchange import AnswerFormat, answer, or_disconnect, read_json, request_id, tenant
from deployments.gateway.gateway import Gateway
from deployments.gateway.prompts import Prompt
from deployments.gateway.request import GenerationRequest
from deployments.gateway.tenants import Tenant
from deployments.routes.openai_constraints import constraint_of
from deployments.routes.openai_examples import (
    CHAT_ANSWER,
    CHAT_EVENTS,
    CHAT_EXAMPLES,
    TEXT_ANSWER,
    TEXT_EVENTS,
    TEXT_EXAMPLES,
)
from deployments.routes.openai_formats import ChatFormat, CompletionFormat, Head
from deployments.routes.openai_protocol import ChatRequest, CompletionRequest, SamplingFields, parse
from deployments.routes.openapi import documented

Json = dict[str, Any]
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat may use the rest of the context


def router(gateway: Gateway) -> APIRouter:
    """The routes under /v1."""
    api = OpenAI(gateway)
    name = gateway.config.model.name
    routes = APIRouter(tags=["OpenAI"])
    chat = documented(ChatRequest, _named(name, CHAT_EXAMPLES), CHAT_ANSWER | {"model": name}, CHAT_EVENTS)
    routes.post("/v1/chat/completions", summary="Answer a chat", **chat)(api.chat)
    text = documented(CompletionRequest, _named(name, TEXT_EXAMPLES), TEXT_ANSWER | {"model": name}, TEXT_EVENTS)
    routes.post("/v1/completions", summary="Continue a text", **text)(api.completion)
    routes.get("/v1/models", summary="What is served")(api.models)
    routes.get("/v1/models/{name:path}", summary="One model")(api.model)
    return routes


def _named(name: str, examples: dict[str, Json]) -> dict[str, Json]:
    return {title: {"model": name, **example} for title, example in examples.items()}


class OpenAI:
    """The endpoints of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._name = gateway.config.model.name

    async def chat(self, http: Request) -> Response:
        request = parse(ChatRequest, await self._body(http))
        self._check(request)
        prompt = await self._gateway.prompts.chat(
            tenant(http), [message.as_template_input for message in request.messages]
        )
        max_tokens = self._gateway.bounds.max_tokens(prompt, request.budget, None, "messages")
        one = await self._one(http, "chat", request, prompt, max_tokens)
        answers = request.n or 1
        written = ChatFormat(self._head("chatcmpl", request), answers)
        return await self._answer(http, one.copies(answers), written, request)

    async def completion(self, http: Request) -> Response:
        request = parse(CompletionRequest, await self._body(http))
        self._check(request)
        prompts = await self._completion_prompts(tenant(http), request)
        answers: list[GenerationRequest] = []
        for prompt in prompts:
            max_tokens = self._gateway.bounds.max_tokens(prompt, request.budget, DEFAULT_COMPLETION_TOKENS)
            # The engine gives a prompt's logprobs with a first token, wanted or not; that one needs no room.
            one = await self._one(http, "completions", request, prompt, max(1, max_tokens))
            answers += one.copies(request.candidates)
        written = CompletionFormat(
            self._head("cmpl", request),
            [self._echo(request, i, prompt) for i, prompt in enumerate(prompts)],
            request.n or 1,
            request.candidates,
            request.logprobs is not None,
        )
        return await self._answer(http, answers, written, request)

    async def _one(
        self, http: Request, endpoint: str, request: SamplingFields, prompt: Prompt, max_tokens: int
    ) -> GenerationRequest:
        ends = self._gateway.prompts.stop_ids(prompt)
        sampling = request.sampling(max_tokens, ends)
        found = constraint_of(request, ends)
        if found is not None:
            param, constraint = found
            if request.min_tokens:
                raise bad_request(f"min_tokens: is not possible with {param}", "min_tokens")
            await or_disconnect(http, self._gateway.constraints.accept(tenant(http), constraint, param))
            sampling = sampling.constrained(constraint)
        return GenerationRequest(
            endpoint=endpoint,
            request_id=request_id(http),
            tenant=tenant(http),
            prompt=prompt,
            sampling=sampling,
            stops=request.stop,
            include_stop=bool(request.include_stop_str_in_output),
            prompt_only=isinstance(request, CompletionRequest) and request.prompt_only,
            priority=request.priority or 0,
        )

    async def _answer(
        self, http: Request, answers: list[GenerationRequest], written: AnswerFormat, request: SamplingFields
    ) -> Response:
        self._gateway.bounds.check_size(answers)
        return await answer(http, self._gateway, self._gateway.generate(*answers), written, bool(request.stream))

    async def _completion_prompts(self, whose: Tenant, request: CompletionRequest) -> list[Prompt]:
        """A string, token ids, or a list of either."""
        prompt = request.prompt
        if request.suffix:
            one = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
            return [await self._gateway.prompts.infill(whose, one, request.suffix)]
        several = isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt)
        parts = list(prompt) if several else [prompt]
        self._gateway.bounds.check_answers(len(parts) * request.candidates)
        return [await self._one_prompt(whose, part) for part in parts]

    async def _one_prompt(self, whose: Tenant, part: Any) -> Prompt:
        if isinstance(part, str):
            return await self._gateway.prompts.text(whose, part)
        if isinstance(part, list):
            return self._gateway.prompts.ids(part)
        raise bad_request("prompt: must be a string, token ids, or a list of either", "prompt")

    def _echo(self, request: CompletionRequest, index: int, prompt: Prompt) -> str:
        """The prompt's text, if it is to be shown."""
        if not request.echo:
            return ""
        given = request.prompt[index] if isinstance(request.prompt, list) else request.prompt
        return given if isinstance(given, str) else self._gateway.tokenizer.decode(prompt.token_ids)

    def _check(self, request: SamplingFields) -> None:
        self._gateway.bounds.check_name(request.model)
        self._gateway.bounds.check_token_ids(map(int, request.logit_bias or ()), "logit_bias")
        self._gateway.bounds.check_token_ids(request.stop_token_ids or (), "stop_token_ids")
        self._gateway.bounds.check_answers(request.n or 1)

    def _head(self, kind: str, request: SamplingFields) -> Head:
        return Head(
            response_id=f"{kind}-{secrets.token_hex(12)}",
            model=self._name,
            fingerprint=self._gateway.fingerprint,
            usage=request.wants_usage,
            continuous_usage=request.wants_continuous_usage,
        )

    async def _body(self, http: Request) -> Any:
        return await read_json(http, self._gateway.config.gateway.max_body_bytes)

    # -- models -------------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._gateway.bounds.check_name(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._gateway.created,
            "owned_by": "caravan",
            "max_model_len": self._gateway.bounds.max_model_len,
        }

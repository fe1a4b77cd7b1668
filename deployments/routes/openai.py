"""OpenAI's API: completions, chat completions and models."""

import secrets
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.errors import ApiError, bad_request
from deployments.exchange import AnswerFormat, answer, read_json, request_id
from deployments.formats import ChatFormat, CompletionFormat
from deployments.gateway import Gateway, GenerationRequest, Prompt
from deployments.protocol import ChatRequest, CompletionRequest, SamplingFields, parse
from model.sampling_params import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat may use the rest of the context


def router(gateway: Gateway) -> APIRouter:
    """The routes under /v1."""
    api = OpenAI(gateway)
    routes = APIRouter()
    routes.post("/v1/chat/completions")(api.chat)
    routes.post("/v1/completions")(api.completion)
    routes.get("/v1/models")(api.models)
    routes.get("/v1/models/{name:path}")(api.model)
    return routes


class OpenAI:
    """The endpoints of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._name = gateway.config.model.name

    async def chat(self, http: Request) -> Response:
        request = parse(ChatRequest, await self._body(http))
        self._check_model(request)
        prompt = await self._gateway.chat_prompt([message.as_template_input for message in request.messages])
        max_tokens = self._gateway.max_tokens(prompt, request.budget, None, "messages")
        written = ChatFormat(f"chatcmpl-{secrets.token_hex(12)}", self._name, request.wants_usage)
        return await self._answer(http, "chat", request, prompt, max_tokens, written)

    async def completion(self, http: Request) -> Response:
        request = parse(CompletionRequest, await self._body(http))
        self._check_model(request)
        prompt = await self._completion_prompt(request)
        max_tokens = self._gateway.max_tokens(prompt, request.budget, DEFAULT_COMPLETION_TOKENS)
        written = CompletionFormat(f"cmpl-{secrets.token_hex(12)}", self._name, request.wants_usage)
        return await self._answer(http, "completions", request, prompt, max_tokens, written)

    async def _answer(
        self,
        http: Request,
        endpoint: str,
        request: SamplingFields,
        prompt: Prompt,
        max_tokens: int,
        written: AnswerFormat,
    ) -> Response:
        generation = self._gateway.generate(
            GenerationRequest(
                endpoint=endpoint,
                request_id=request_id(http),
                prompt=prompt,
                sampling=self._sampling(request, prompt, max_tokens),
                stops=request.stop,
            )
        )
        return await answer(http, self._gateway, generation, written, bool(request.stream))

    async def _completion_prompt(self, request: CompletionRequest) -> Prompt:
        prompt = request.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if request.suffix:
            return await self._gateway.infill_prompt(prompt, request.suffix)
        if isinstance(prompt, str):
            return await self._gateway.text_prompt(prompt)
        if any(isinstance(i, str | list) for i in prompt):
            raise bad_request("prompt: several prompts in one request are not supported yet", "prompt")
        return self._gateway.ids_prompt(prompt)

    def _sampling(self, request: SamplingFields, prompt: Prompt, max_tokens: int) -> SamplingParams:
        for token_id in request.logit_bias or {}:
            if not 0 <= int(token_id) < self._gateway.tokenizer.vocab_size:
                raise bad_request(f"logit_bias: {token_id} is not a token id of this model", "logit_bias")
        return request.sampling(max_tokens, self._gateway.stop_ids(prompt))

    async def _body(self, http: Request) -> Any:
        return await read_json(http, self._gateway.config.gateway.max_body_bytes)

    def _check_model(self, request: SamplingFields) -> None:
        if request.model != self._name:
            raise unknown_model(request.model, self._name)

    # -- models -------------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        if name != self._name:
            raise unknown_model(name, self._name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._gateway.created,
            "owned_by": "caravan",
            "max_model_len": self._gateway.max_model_len,
        }


def unknown_model(name: str, served: str) -> ApiError:
    shown = name if len(name) < 200 else name[:200] + "..."
    return ApiError(
        404, f"The model `{shown}` does not exist; this service has `{served}`", param="model", code="model_not_found"
    )

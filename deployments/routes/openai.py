"""OpenAI's API: completions, chat completions and models."""

import secrets
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.adapters.names import Named
from deployments.errors import bad_request
from deployments.gateway.constraints import make_constraint
from deployments.gateway.exchange import AnswerFormat, answer, or_disconnect, read_json, request_id, tenant
from deployments.gateway.gateway import Gateway
from deployments.gateway.prompts import Chat, Prompt
from deployments.gateway.request import GenerationRequest
from deployments.gateway.tenants import Tenant
from deployments.routes.openai_constraints import as_format, constraint_of
from deployments.routes.openai_examples import (
    CHAT_ANSWER,
    CHAT_EVENTS,
    CHAT_EXAMPLES,
    RESPONSES_ANSWER,
    RESPONSES_EVENTS,
    RESPONSES_EXAMPLES,
    TEXT_ANSWER,
    TEXT_EVENTS,
    TEXT_EXAMPLES,
)
from deployments.routes.openai_formats import ChatFormat, CompletionFormat, Head
from deployments.routes.openai_protocol import ChatRequest, CompletionRequest, Sampling, SamplingFields, parse
from deployments.routes.openai_tools import ToolUse
from deployments.routes.openapi import documented
from deployments.routes.responses_format import ResponsesFormat
from deployments.routes.responses_protocol import ResponsesRequest, named_as_here
from model.text.constraint import Constraint
from model.text.tool_calls import structural_tag

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
    answers = documented(ResponsesRequest, _named(name, RESPONSES_EXAMPLES), RESPONSES_ANSWER, RESPONSES_EVENTS)
    routes.post("/v1/responses", summary="Answer a chat, by the Responses API", **answers)(api.respond)
    routes.get("/v1/models", summary="What is served")(api.models)
    routes.get("/v1/models/{name:path}", summary="One model")(api.model)
    return routes


def _named(name: str, examples: dict[str, Json]) -> dict[str, Json]:
    return {title: {"model": name, **example} for title, example in examples.items()}


BODIES: dict[str, type[Sampling]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}


class OpenAI:
    """The endpoints of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._name = gateway.config.model.name

    async def chat(self, http: Request) -> Response:
        request = parse(ChatRequest, await self._body(http))
        use = request.tool_use()
        adapter = await self._gateway.named(request.model)
        one = replace(await self.chat_request(http, "chat", request, use), adapter=adapter)
        answers = request.n or 1
        written = ChatFormat(self._head("chatcmpl", request, adapter), one.prompt.token_ids, answers, use)
        return await self._answer(http, one.copies(answers), written, request)

    async def respond(self, http: Request) -> Response:
        """The Responses API is the chat that asks the same, written in another way."""
        request = parse(ResponsesRequest, await self._body(http))
        with named_as_here():
            chat = request.as_chat()
            adapter = await self._gateway.named(request.model)
            one = await self.chat_request(http, "responses", chat, chat.tool_use())
        one = replace(one, adapter=adapter)
        written = ResponsesFormat(request, adapter.name if adapter else self._name)
        return await self._answer(http, [one], written, chat)

    async def chat_request(
        self, http: Request, endpoint: str, request: ChatRequest, use: ToolUse | None
    ) -> GenerationRequest:
        """What a chat asks for, with functions to call if there are any in `use`."""
        self._check(request)
        chat = Chat(
            messages=[message.as_template_input for message in request.messages],
            tools=use.listed if use is not None else (),
            instruction=use.instruction if use is not None else "",
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            variables=request.chat_template_kwargs or {},
        )
        prompt = self._cut(await self._gateway.prompts.chat(tenant(http), chat), request)
        max_tokens = self._gateway.bounds.max_tokens(prompt, request.budget, None, "messages")
        return await self._one(http, endpoint, request, prompt, max_tokens, use)

    async def completion(self, http: Request) -> Response:
        request = parse(CompletionRequest, await self._body(http))
        adapter = await self._gateway.named(request.model)
        self._check(request)
        prompts = await self._completion_prompts(tenant(http), request)
        answers: list[GenerationRequest] = []
        for prompt in prompts:
            max_tokens = self._gateway.bounds.max_tokens(prompt, request.budget, DEFAULT_COMPLETION_TOKENS)
            # The engine gives a prompt's logprobs with a first token, wanted or not; that one needs no room.
            one = await self._one(http, "completions", request, prompt, max(1, max_tokens))
            one = replace(one, adapter=adapter)
            answers += one.copies(request.candidates)
        written = CompletionFormat(
            self._head("cmpl", request, adapter),
            [prompt.token_ids for prompt in prompts],
            [self._echo(request, i, prompt) for i, prompt in enumerate(prompts)],
            request.n or 1,
            request.candidates,
            request.logprobs is not None,
        )
        return await self._answer(http, answers, written, request)

    async def _one(
        self,
        http: Request,
        endpoint: str,
        request: SamplingFields,
        prompt: Prompt,
        max_tokens: int,
        use: ToolUse | None = None,
    ) -> GenerationRequest:
        ends = self._gateway.prompts.stop_ids(prompt)
        sampling = request.with_defaults(self._gateway.sampling_defaults).sampling(max_tokens, ends)
        found = await or_disconnect(http, self._constraint(tenant(http), request, ends, use))
        if found is not None:
            param, constraint = found
            if request.min_tokens:
                raise bad_request(f"min_tokens: is not possible with {param}", "min_tokens")
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
            cache_salt=request.cache_salt or "",
            calls=self._gateway.prompts.call_syntax if use is not None else None,
            control_tokens=request.skip_special_tokens is False,
        )

    async def _constraint(
        self, whose: Tenant, request: SamplingFields, ends: frozenset[int], use: ToolUse | None
    ) -> tuple[str, Constraint] | None:
        """What the answer must match, by the field that says so; calls of functions, and what may come instead."""
        found = constraint_of(request, ends)
        if found is not None:
            await self._gateway.constraints.accept(whose, found[1], found[0])
        if use is None:
            return found
        syntax = self._gateway.prompts.call_syntax
        instead: Json | Literal["text"] | None = (
            None if use.required else "text" if found is None else as_format(found[1])
        )
        tag = structural_tag(syntax, use.functions, most=use.most if syntax.several else 1, answer=instead)
        constraint = make_constraint("tools", "structural_tag", tag, ends)
        await self._gateway.constraints.accept(whose, constraint, "tools")
        return "tools", constraint

    def _cut(self, prompt: Prompt, request: SamplingFields) -> Prompt:
        """A prompt of at most as many tokens as the client says, the last ones unless it says otherwise."""
        most = request.truncate_prompt_tokens
        if most is None:
            return prompt
        most = most if most > 0 else max(1, self._gateway.bounds.max_model_len - (request.budget or 1))
        ids = prompt.token_ids
        return replace(prompt, token_ids=ids[:most] if request.truncation_side == "right" else ids[-most:])

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
        return [self._cut(await self._one_prompt(whose, part, request), request) for part in parts]

    async def _one_prompt(self, whose: Tenant, part: Any, request: CompletionRequest) -> Prompt:
        if isinstance(part, str):
            special = bool(request.parse_special)
            add_bos = request.add_special_tokens is not False
            ids = await self._gateway.prompts.encode(whose, part, add_bos=add_bos, parse_special=special)
            return self._gateway.prompts.ids(ids)
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
        self._gateway.bounds.check_token_ids(map(int, request.logit_bias or ()), "logit_bias")
        self._gateway.bounds.check_token_ids(request.stop_token_ids or (), "stop_token_ids")
        self._gateway.bounds.check_answers(request.n or 1)

    def _head(self, kind: str, request: SamplingFields, adapter: Named | None) -> Head:
        return Head(
            response_id=f"{kind}-{secrets.token_hex(12)}",
            model=adapter.name if adapter is not None else self._name,
            fingerprint=self._gateway.fingerprint_of(adapter),
            usage=request.wants_usage,
            continuous_usage=request.wants_continuous_usage,
            token_ids=bool(request.return_token_ids),
            ids_as_tokens=bool(request.return_tokens_as_token_ids),
        )

    async def _body(self, http: Request) -> Any:
        return await read_json(http, self._gateway.config.gateway.max_body_bytes)

    # -- models -------------------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        adapters = [self._card(name) for name in await self._gateway.adapters.names()]
        return {"object": "list", "data": [self._card(), *adapters]}

    async def model(self, name: str) -> dict[str, Any]:
        adapter = await self._gateway.named(name)
        return self._card(adapter.name if adapter is not None else None)

    def _card(self, adapter: str | None = None) -> dict[str, Any]:
        """Of the model, or of an adapter of it."""
        return {
            "id": adapter or self._name,
            "object": "model",
            "created": self._gateway.created,
            "owned_by": "caravan",
            "root": adapter or self._name,
            "parent": self._name if adapter is not None else None,
            "max_model_len": self._gateway.bounds.max_model_len,
            "sampling_defaults": self._gateway.sampling_defaults,
        }

"""Text to token ids and back, and the prompt that a chat becomes: what the model really sees."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, WithJsonSchema

from deployments.errors import bad_request
from deployments.gateway.exchange import Json, read_json, tenant
from deployments.gateway.gateway import Gateway
from deployments.gateway.pieces import token_name
from deployments.gateway.prompts import Chat
from deployments.gateway.tenants import Tenant
from deployments.routes.openai_protocol import Body, ChatMessage, parse_body
from deployments.routes.openai_tools import Tools, tool_use
from deployments.routes.openapi import documented


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None  # names of control tokens are those tokens
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Any], WithJsonSchema({"type": "array", "items": {"type": "integer"}})]


def router(gateway: Gateway) -> APIRouter:
    """POST /tokenize and /detokenize."""
    routes = APIRouter(tags=["tokens"])
    limit = gateway.config.gateway.max_body_bytes

    examples: dict[str, Json] = {
        "a text": {"prompt": "Hello, world"},
        "a chat": {"messages": [{"role": "user", "content": "Hello"}], "return_token_strs": True},
    }
    answer = {"count": 2, "max_model_len": gateway.bounds.max_model_len, "tokens": [22172, 3186]}

    @routes.post("/tokenize", summary="Token ids of a text or a chat", **documented(TokenizeRequest, examples, answer))
    async def tokenize(http: Request) -> Response:
        request = parse_body(TokenizeRequest, await read_json(http, limit))
        await gateway.named(request.model)
        ids = await _ids(gateway, tenant(http), request)
        return await written(http, len(ids), lambda: answer_of(request, ids))

    @functools.cache
    def name(token_id: int) -> bytes:
        return token_name(gateway.tokenizer, token_id)

    def answer_of(request: TokenizeRequest, ids: list[int]) -> Json:
        answer: Json = {"count": len(ids), "max_model_len": gateway.bounds.max_model_len, "tokens": ids}
        if request.messages is not None:
            answer["prompt"] = b"".join(map(name, ids)).decode("utf-8", "replace")
        if request.return_token_strs:
            answer["token_strs"] = [name(i).decode("utf-8", "replace") for i in ids]
        return answer

    async def written(http: Request, size: int, answer: Callable[[], Json]) -> Response:
        """A long answer is made and written where it holds nobody up."""
        body = await gateway.prompts.worked_out(tenant(http), size, lambda: msgspec.json.encode(answer()))
        return Response(body, media_type="application/json")

    backwards = documented(DetokenizeRequest, {"ids": {"tokens": [22172, 3186]}}, {"prompt": "Hello, world"})

    @routes.post("/detokenize", summary="The text of token ids", **backwards)
    async def detokenize(http: Request) -> Response:
        request = parse_body(DetokenizeRequest, await read_json(http, limit))
        await gateway.named(request.model)
        ids = gateway.prompts.ids(request.tokens, "tokens").token_ids if request.tokens else []
        return await written(http, len(ids), lambda: {"prompt": gateway.tokenizer.decode(ids)})

    @routes.get("/tokenizer_info", summary="Names of the tokens that begin and end a text, and the chat template")
    async def tokenizer_info() -> Json:
        return _info(gateway)

    return routes


def _info(gateway: Gateway) -> Json:
    """As vLLM tells it to clients that have no files of the model, lm-eval for one."""
    template, vocab_size = gateway.prompts.template, gateway.tokenizer.vocab_size
    bos, eos = template.ends if template is not None else ("", "")
    return {
        "bos_token": bos or None,
        "eos_token": eos or None,
        "pad_token": None,
        "chat_template": template.source if template is not None else None,
        "vocab_size": vocab_size,
        "model_max_length": gateway.bounds.max_model_len,
    }


async def _ids(gateway: Gateway, whose: Tenant, request: TokenizeRequest) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("prompt: send either prompt or messages", "prompt")
    if request.messages is not None:
        use = tool_use(request.tools, None, None)
        chat = Chat(
            messages=[m.as_template_input for m in request.messages],
            tools=use.listed if use is not None else (),
            instruction=use.instruction if use is not None else "",
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final_message=bool(request.continue_final_message),
            variables=request.chat_template_kwargs or {},
        )
        return (await gateway.prompts.chat(whose, chat)).token_ids
    assert request.prompt is not None
    add_bos, names = request.add_special_tokens is not False, gateway.tokenizer.control_tokens
    special = request.parse_special or (not add_bos and request.parse_special is None and request.prompt in names)
    return await gateway.prompts.encode(whose, request.prompt, add_bos=add_bos, parse_special=bool(special))

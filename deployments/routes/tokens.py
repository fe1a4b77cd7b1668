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
from deployments.gateway.tenants import Tenant
from deployments.routes.openai_protocol import Body, ChatMessage, parse_body
from deployments.routes.openapi import documented


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
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
        gateway.bounds.check_name(request.model)
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
        gateway.bounds.check_name(request.model)
        ids = gateway.prompts.ids(request.tokens, "tokens").token_ids if request.tokens else []
        return await written(http, len(ids), lambda: {"prompt": gateway.tokenizer.decode(ids)})

    return routes


async def _ids(gateway: Gateway, whose: Tenant, request: TokenizeRequest) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise bad_request("prompt: send either prompt or messages", "prompt")
    if request.messages is not None:
        return (await gateway.prompts.chat(whose, [m.as_template_input for m in request.messages])).token_ids
    assert request.prompt is not None
    add_bos = request.add_special_tokens is not False
    return await gateway.prompts.encode(whose, request.prompt, add_bos=add_bos)

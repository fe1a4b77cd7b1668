"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's words: for operators."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field, StrictStr

from deployments.errors import ApiError
from deployments.gateway.exchange import read_json, tenant
from deployments.gateway.gateway import Gateway
from deployments.routes.openai_protocol import Body, parse_body

LIMIT = 65_536  # bytes of such a body


class LoadRequest(Body):
    """What vLLM takes."""

    lora_name: StrictStr = Field(min_length=1, max_length=200)
    lora_path: StrictStr = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadRequest(Body):
    """The same; an id of ours does not exist."""

    lora_name: StrictStr = Field(min_length=1, max_length=200)
    lora_int_id: int | None = None


def router(gateway: Gateway) -> APIRouter:
    routes = APIRouter(tags=["adapters"])

    @routes.post("/v1/load_lora_adapter", summary="Name an adapter, for operators")
    async def load(http: Request) -> Response:
        _check(http)
        body: Any = await read_json(http, LIMIT)
        request = parse_body(LoadRequest, body)
        await gateway.adapters.load(request.lora_name, request.lora_path, request.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", summary="Forget such a name, for operators")
    async def unload(http: Request) -> Response:
        _check(http)
        request = parse_body(UnloadRequest, await read_json(http, LIMIT))
        await gateway.adapters.unload(request.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    return routes


def _check(http: Request) -> None:
    """Paths of the nodes are nobody's affair who has no operator's key; without keys there is none."""
    if not tenant(http).operator:
        raise ApiError(403, "adapters are loaded with an operator's key: `operator: true` in auth.keys_file")

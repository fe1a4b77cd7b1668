"""Amazon Bedrock with the body of its Llama models: /model/{id}/invoke and /model/{id}/invoke-with-response-stream.

Source: Bedrock's user guide, "Meta Llama models", and the API reference of InvokeModel. Signatures are not looked at;
where this service asks for keys, a key goes as a Bedrock API key does (AWS_BEARER_TOKEN_BEDROCK).
"""

import base64
import time
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from deployments.errors import ApiError
from deployments.gateway.accounting import Usage
from deployments.gateway.exchange import Json, answer
from deployments.gateway.gateway import Gateway
from deployments.gateway.pieces import Piece
from deployments.routes.hosted import aws
from deployments.routes.hosted.vendor import StrictBody, Vendor, documented, only, sampling_params
from deployments.routes.openai_protocol import Number, Whole, parse_body

DEFAULT_GEN_LEN, MAX_GEN_LEN = 512, 2048
DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 0.5, 0.9
KINDS = {
    400: "ValidationException",
    401: "AccessDeniedException",
    403: "AccessDeniedException",
    404: "ResourceNotFoundException",
    408: "ModelTimeoutException",
    413: "ValidationException",
    429: "ThrottlingException",
    503: "ServiceUnavailableException",
}


class InvokeBody(StrictBody):
    prompt: str
    max_gen_len: Annotated[Whole, Field(ge=1, le=MAX_GEN_LEN)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    images: Annotated[Any, only([])] = None


class Bedrock(Vendor):
    """The endpoints of one gateway."""

    name = "bedrock"

    async def invoke(self, http: Request, model: str) -> Response:
        return await self._answer(http, model, stream=False)

    async def invoke_with_response_stream(self, http: Request, model: str) -> Response:
        return await self._answer(http, model, stream=True)

    async def _answer(self, http: Request, model: str, stream: bool) -> Response:
        self.gateway.bounds.check_name(model, "modelId")
        body = parse_body(InvokeBody, await self.body(http))
        prompt = await self.prompt(http, body.prompt, "prompt")
        # The default is a limit, not a wish: a shorter room for it is no error.
        default = min(DEFAULT_GEN_LEN, max(1, self.gateway.bounds.max_model_len - len(prompt.token_ids)))
        sampling = sampling_params(
            self.gateway.bounds.max_tokens(prompt, body.max_gen_len or default, None),
            self.gateway.prompts.stop_ids(prompt),
            seed=None,
            temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
            top_p=DEFAULT_TOP_P if body.top_p is None else body.top_p or 1.0,  # 0 turns it off, says the guide
        )
        generation = self.gateway.generate(self.request(http, prompt, sampling))
        written = BedrockFormat()
        response = await answer(http, self.gateway, generation, written, stream)
        response.headers.update(written.headers(generation.usage, stream))
        return response


class BedrockFormat:
    """{"generation", "prompt_token_count", "generation_token_count", "stop_reason"}, whole or in chunks."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._told = False  # whether the count of the prompt's tokens was sent

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        return {
            "generation": "".join(piece.text for piece in pieces),
            "prompt_token_count": usage.prompt_tokens,
            "generation_token_count": usage.completion_tokens,
            "stop_reason": pieces[-1].finish_reason,
        }

    def headers(self, usage: Usage, stream: bool) -> dict[str, str]:
        if stream:
            return {"Content-Type": aws.EVENT_STREAM, "X-Amzn-Bedrock-Content-Type": "application/json"}
        return {
            "X-Amzn-Bedrock-Input-Token-Count": str(usage.prompt_tokens),
            "X-Amzn-Bedrock-Output-Token-Count": str(usage.completion_tokens),
            "X-Amzn-Bedrock-Invocation-Latency": str(self._milliseconds(time.monotonic())),
        }

    def opening(self) -> bytes:
        return b""

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        body: Json = {
            "generation": piece.text,
            "prompt_token_count": None if self._told else usage.prompt_tokens,
            "generation_token_count": usage.completion_tokens,
            "stop_reason": piece.finish_reason,
        }
        self._told = True
        if piece.finish_reason is not None:
            body["amazon-bedrock-invocationMetrics"] = {
                "inputTokenCount": usage.prompt_tokens,
                "outputTokenCount": usage.completion_tokens,
                "invocationLatency": self._milliseconds(time.monotonic()),
                "firstByteLatency": self._milliseconds(usage.record.first_token),
            }
        payload = {"bytes": base64.b64encode(msgspec.json.encode(body)).decode()}
        return aws.event("chunk", msgspec.json.encode(payload), "application/json")

    def closing(self, usage: Usage) -> bytes:
        return b""

    def broken(self, error: ApiError) -> bytes:
        kind = KINDS.get(error.status, "internalServerException")
        return aws.exception(kind[:1].lower() + kind[1:], {"message": error.body["error"]["message"]})

    def _milliseconds(self, until: float) -> int:
        return max(0, round((until - self._started) * 1000))


def respond(error: ApiError, request_id: str) -> Response:
    kind = KINDS.get(error.status, "InternalServerException")
    return aws.error(error.status, kind, {"message": error.body["error"]["message"]}, error.headers)


def router(gateway: Gateway) -> APIRouter:
    api = Bedrock(gateway)
    routes = APIRouter(tags=["Bedrock"])
    body = documented(InvokeBody, {"prompt": "Once upon a time", "max_gen_len": 20, "temperature": 0.5})
    routes.post("/model/{model:path}/invoke", **body)(api.invoke)
    routes.post("/model/{model:path}/invoke-with-response-stream", **body)(api.invoke_with_response_stream)
    return routes

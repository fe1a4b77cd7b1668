"""Amazon SageMaker: what its container answers (/invocations, /ping), and what its runtime client asks for.

Bodies are those of JumpStart's Llama 2: {"inputs": text, "parameters": {...}} as for TGI, which those containers run,
or {"inputs": [dialog, ...]}, each of messages with role and content, as the first containers had it: Meta's own
`chat_completion`, with its defaults. The runtime's paths carry an endpoint's name, which here is the model's. Nobody
looks at signatures, nor at the header by which a caller accepts the licence.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from deployments.errors import ApiError
from deployments.gateway.exchange import Json, or_disconnect, tenant
from deployments.gateway.gateway import Gateway, Generation
from deployments.gateway.prompts import Chat
from deployments.routes.hosted import aws
from deployments.routes.hosted.tgi import EXAMPLE, TGI, GenerateRequest
from deployments.routes.hosted.tgi import respond as respond_as_tgi
from deployments.routes.hosted.vendor import Count, StrictBody, documented, only, sampling_params
from deployments.routes.openai_protocol import Number, parse_body

DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 0.6, 0.9  # of chat_completion in Meta's generation.py
MAX_DIALOGS = 32


class Message(StrictBody):
    role: Literal["system", "user", "assistant"]
    content: str


class DialogParameters(StrictBody):
    max_new_tokens: Count | None = None  # as many as there is room for
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    return_full_text: Annotated[Any, only(False)] = None


class DialogRequest(StrictBody):
    inputs: Annotated[list[Annotated[list[Message], Field(min_length=1)]], Field(min_length=1, max_length=MAX_DIALOGS)]
    parameters: DialogParameters | None = None
    stream: Annotated[Any, only(False)] = None


class SageMaker(TGI):
    """The endpoints of one gateway."""

    name = "sagemaker"

    async def ping(self) -> Response:
        return Response(status_code=200)

    async def invocations(self, http: Request) -> Response:
        body = await self.body(http)
        if isinstance(body, dict) and isinstance(body.get("inputs"), list):
            return await self._dialogs(http, parse_body(DialogRequest, body))
        request = parse_body(GenerateRequest, body)
        return await self.generate(http, request, bool(request.stream), as_list=True)

    async def invoke_endpoint(self, http: Request, endpoint: str) -> Response:
        self.gateway.bounds.check_name(endpoint, "EndpointName")
        response = await self.invocations(http)
        response.headers["x-Amzn-Invoked-Production-Variant"] = "AllTraffic"
        return response

    async def invoke_endpoint_with_response_stream(self, http: Request, endpoint: str) -> Response:
        """The container's answer, whatever it is, in the payloads of an event stream."""
        response = await self.invoke_endpoint(http, endpoint)
        response.headers["X-Amzn-SageMaker-Content-Type"] = response.headers["Content-Type"]
        if isinstance(response, StreamingResponse):
            response.body_iterator = _payload_parts(response.body_iterator)
        else:
            response.body = _payload_part(bytes(response.body))
            response.headers["Content-Length"] = str(len(response.body))
        response.headers["Content-Type"] = aws.EVENT_STREAM
        return response

    async def _dialogs(self, http: Request, request: DialogRequest) -> Response:
        self.gateway.bounds.check_answers(len(request.inputs))
        parameters = request.parameters or DialogParameters()
        temperature = DEFAULT_TEMPERATURE if parameters.temperature is None else parameters.temperature
        top_p = DEFAULT_TOP_P if parameters.top_p is None else parameters.top_p
        requests = []
        for dialog in request.inputs:
            dialog_as_chat = Chat(messages=[message.model_dump() for message in dialog])
            prompt = await self.gateway.prompts.chat(tenant(http), dialog_as_chat)
            max_tokens = self.gateway.bounds.max_tokens(prompt, parameters.max_new_tokens, None, "inputs")
            stop_ids = self.gateway.prompts.stop_ids(prompt)
            sampling = sampling_params(max_tokens, stop_ids, seed=None, temperature=temperature, top_p=top_p)
            requests.append(self.request(http, prompt, sampling))
        self.gateway.bounds.check_size(requests)
        texts = await or_disconnect(http, _texts(self.gateway.generate(*requests), len(requests)))
        answers = [{"generation": {"role": "assistant", "content": text}} for text in texts]
        return Response(msgspec.json.encode(answers), media_type="application/json")


async def _texts(generation: Generation, answers: int) -> list[str]:
    """The whole text of every answer."""
    texts = [""] * answers
    try:
        async for piece in generation.pieces:
            texts[piece.index] += piece.text
    finally:
        await generation.pieces.aclose()
    return texts


def _payload_part(data: bytes) -> bytes:
    return aws.event("PayloadPart", data, "application/octet-stream")


async def _payload_parts(parts: Any) -> AsyncIterator[bytes]:
    async for part in parts:
        yield _payload_part(part)


def respond(error: ApiError, request_id: str) -> Response:
    """What the container refuses reaches the client as a ModelError; what concerns the endpoint, by its own name."""
    status, message = error.status, error.body["error"]["message"]
    if error.body["error"]["code"] == "model_not_found":
        return aws.error(400, "ValidationError", {"Message": message}, error.headers)
    if status in (429, 503):
        kind = "ThrottlingException" if status == 429 else "ServiceUnavailable"
        return aws.error(status, kind, {"Message": message}, error.headers)
    if status in (401, 403):
        return aws.error(403, "AccessDeniedException", {"Message": message}, error.headers)
    original = respond_as_tgi(error, request_id)
    body: Json = {
        "Message": f"Received error ({original.status_code}) from the model: {message}",
        "OriginalStatusCode": original.status_code,
        "OriginalMessage": bytes(original.body).decode(),
        "LogStreamArn": "",
    }
    return aws.error(424, "ModelError", body, error.headers)


def container(gateway: Gateway) -> APIRouter:
    api = SageMaker(gateway)
    routes = APIRouter(tags=["SageMaker"])
    routes.post("/invocations", **documented(GenerateRequest, EXAMPLE))(api.invocations)
    routes.get("/ping")(api.ping)
    return routes


def runtime(gateway: Gateway) -> APIRouter:
    api = SageMaker(gateway)
    routes = APIRouter(tags=["SageMaker"])
    body, streamed = documented(GenerateRequest, EXAMPLE), api.invoke_endpoint_with_response_stream
    routes.post("/endpoints/{endpoint}/invocations", **body)(api.invoke_endpoint)
    routes.post("/endpoints/{endpoint}/invocations-response-stream", **body)(streamed)
    return routes

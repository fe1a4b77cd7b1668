"""What the drop-in routes share: strict bodies, and prompts that hold control tokens.

They are for code that was written for a hosted Llama 2 and moves here by a change of address. What a vendor's parameter
means and this service cannot do is refused by name; null means "not given". A prompt is the caller's whole prompt, as
it is there: names of control tokens in it are control tokens.
"""

import secrets
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import Request
from fastapi.responses import Response
from pydantic import AfterValidator, ConfigDict, Field

from deployments.errors import ApiError, bad_request
from deployments.gateway.exchange import read_json, request_id, tenant
from deployments.gateway.gateway import Gateway
from deployments.gateway.prompts import Prompt
from deployments.gateway.request import GenerationRequest
from deployments.routes.openai_protocol import Body, Number, Whole
from deployments.routes.openapi import inlined
from model.sampling_params import SamplingParams

Respond = Callable[[ApiError, str], Response]  # an error and the request's id, as a vendor writes it
MAX_STOP_LENGTH = 1000  # characters


class StrictBody(Body):
    """A vendor's request body. An unknown field is an error: what it asks for could not be honoured."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def only(*harmless: Any) -> Any:
    """For a parameter that this service does not have, with the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise ValueError("is not supported by this service with this value")
        return value

    return AfterValidator(check)


def stop_strings(most: int) -> Any:
    """For a list of at most `most` stop strings."""

    def check(value: list[str] | None) -> list[str]:
        stops = value or []
        if len(stops) > most or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
            raise ValueError(f"must be up to {most} strings of 1 to {MAX_STOP_LENGTH} characters")
        return stops

    return AfterValidator(check)


Count = Annotated[Whole, Field(ge=1, lt=2**31)]
Seed = Annotated[Whole, Field(ge=0, lt=2**64)]
Share = Annotated[Number, Field(gt=0, le=1)]  # of probability


def documented(body: type[StrictBody], example: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a route: its body with an example, and parameters of its query, in the OpenAPI document."""
    content = {"application/json": {"schema": inlined(body.model_json_schema()), "example": example}}
    found: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    if parameters:
        found["parameters"] = list(parameters)
    return {"openapi_extra": found}


class Vendor:
    """One vendor's way to ask a gateway. `name` stands in metrics and logs."""

    name: str

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def body(self, http: Request) -> Any:
        return await read_json(http, self.gateway.config.gateway.max_body_bytes)

    async def prompt(self, http: Request, text: str, param: str, truncate: int | None = None) -> Prompt:
        """The caller's whole prompt; `truncate` keeps that many tokens, the last ones."""
        return await self.gateway.prompts.whole_text(tenant(http), text, param, truncate)

    def request(
        self,
        http: Request,
        prompt: Prompt,
        sampling: SamplingParams,
        stops: list[str] | None = None,
        include_stop: bool = True,
    ) -> GenerationRequest:
        """Hosted services show the stop string that ends an answer."""
        return GenerationRequest(
            endpoint=self.name,
            request_id=request_id(http),
            tenant=tenant(http),
            prompt=prompt,
            sampling=sampling,
            stops=stops or [],
            include_stop=include_stop,
        )


def sampling_params(max_tokens: int, stop_ids: frozenset[int], *, seed: int | None, **given: Any) -> SamplingParams:
    """What is None keeps its default. A request without a seed gets one, so that it can be resumed elsewhere.

    Raises `ApiError` for what the engine does not take.
    """
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if seed is None else seed,
            stop_token_ids=tuple(sorted(stop_ids)),
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        raise bad_request(str(error)) from None


def json_error(status: int, body: Any, headers: dict[str, str]) -> Response:
    return Response(msgspec.json.encode(body), status, headers=headers, media_type="application/json")

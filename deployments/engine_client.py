"""How a gateway speaks to the engines."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.errors import CaravanError, EngineStopped
from cluster.sequence import Request, TokenEvent
from deployments import status
from deployments.status import ReplicaStatus

_encode_request = msgspec.msgpack.Encoder().encode
_decode_events = msgspec.msgpack.Decoder(list[TokenEvent]).decode


class EngineClient(Protocol):
    """What the gateway needs; tests give it scripted tokens through the same door."""

    def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        """Tokens as they come. Closing it cancels the request. Raises `RequestRejected` or `EngineStopped`."""
        ...

    async def replicas(self) -> list[ReplicaStatus]:
        """What the engine replicas say of themselves."""
        ...


class ServeEngineClient:
    """Through a Serve handle: Serve picks the replica (see router.py) and carries tokens and cancellation."""

    def __init__(self, handle: DeploymentHandle[Any], app: str) -> None:
        self._generate: Any = handle.options(method_name="generate", stream=True)
        self._app = app

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        response = self._generate.remote(_encode_request(request))
        finished = False
        try:
            async for payload in response:
                events = _decode_events(payload)
                finished = events[-1].finish_reason is not None
                yield events
            if not finished:
                raise EngineStopped("the engine ended the stream early")
        except RayTaskError as error:
            if isinstance(error.cause, CaravanError):
                raise error.cause from None
            raise EngineStopped(f"the engine failed: {type(error.cause).__name__}") from error
        except (RayActorError, DeploymentUnavailableError, BackPressureError, RequestCancelledError) as error:
            raise EngineStopped(f"the engine went away: {type(error).__name__}") from error
        finally:
            if not finished:
                response.cancel()

    async def replicas(self) -> list[ReplicaStatus]:
        return await asyncio.to_thread(status.read, self._app)

"""How a gateway speaks to the engines."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.errors import CaravanError, EngineStopped
from cluster.sequence import Request, TokenEvent
from deployments import status
from deployments.status import ReplicaStatus
from deployments.token_link import Inbox, TokenReceiver

LAST_TOKENS_S = 5.0  # how much later than the end of its call a request's last tokens may come

_encode_request = msgspec.msgpack.Encoder().encode


class MetricsRecorder(Protocol):
    """What a gateway needs of ops.metrics.Recorder."""

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...


class EngineClient(Protocol):
    """What the gateway needs; tests give it scripted tokens through the same door."""

    def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        """Tokens as they come. Closing it cancels the request. Raises `RequestRejected` or `EngineStopped`."""
        ...

    async def replicas(self) -> list[ReplicaStatus]:
        """What the engine replicas say of themselves."""
        ...


class ServeEngineClient:
    """Through a Serve handle, which picks the replica (see router.py); tokens come back by the token link."""

    def __init__(self, handle: DeploymentHandle[Any], app: str) -> None:
        self._generate: Any = handle.options(method_name="generate")
        self._app = app
        self._receiver: TokenReceiver | None = None
        self._calls: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        if self._receiver is None:
            self._receiver = TokenReceiver(ray.util.get_node_ip_address())
        inbox = self._receiver.open(request.request_id)
        response = self._generate.remote(_encode_request(request), msgspec.structs.astuple(self._receiver.address))
        call = asyncio.create_task(self._end(response, inbox))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        finished = False
        try:
            while not finished:
                events = await inbox.next()
                finished = events[-1].finish_reason is not None
                yield events
        finally:
            self._receiver.close(request.request_id)
            if not finished:
                response.cancel()

    @staticmethod
    async def _end(response: Any, inbox: Inbox) -> None:
        """Wait for the end of the request's call, and make its stream end too if it has not yet."""
        try:
            await response
            await asyncio.sleep(LAST_TOKENS_S)
            inbox.fail(EngineStopped("the engine ended the stream early"))
        except RayTaskError as error:
            cause = error.cause
            failed = (
                cause
                if isinstance(cause, CaravanError)
                else EngineStopped(f"the engine failed: {type(cause).__name__}")
            )
            inbox.fail(failed)
        except (RayActorError, DeploymentUnavailableError, BackPressureError, RequestCancelledError) as error:
            inbox.fail(EngineStopped(f"the engine went away: {type(error).__name__}"))

    async def replicas(self) -> list[ReplicaStatus]:
        return await asyncio.to_thread(status.read, self._app)

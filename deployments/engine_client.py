"""How a gateway speaks to the engines."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Protocol

import msgspec
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.errors import CaravanError, EngineStopped
from cluster.sequence import Request, TokenEvent
from deployments import status
from deployments.assignments import ASSIGNMENTS
from deployments.status import ReplicaStatus
from deployments.token_link import Inbox, TokenReceiver

WATCH_PERIOD_S = 0.5  # how often silent engines are looked for
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
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        receiver = self._receiver = self._receiver or self._open_receiver()
        name = request.request_id
        inbox = receiver.open(name)
        ASSIGNMENTS.open(name, inbox, asyncio.get_running_loop())
        response = self._generate.remote(name, _encode_request(request), msgspec.structs.astuple(receiver.address))
        self._keep(self._end(response, inbox))
        finished = False
        try:
            while not finished:
                events = await inbox.next()
                finished = events[-1].finish_reason is not None
                yield events
        finally:
            ASSIGNMENTS.close(name)
            receiver.close(name)
            if not finished:
                response.cancel()

    def _open_receiver(self) -> TokenReceiver:
        self._keep(self._watch())
        return TokenReceiver(ray.util.get_node_ip_address(), ASSIGNMENTS.heard)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _watch() -> None:
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            ASSIGNMENTS.fail_silent()

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

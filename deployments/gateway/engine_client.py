"""How a gateway speaks to the engines."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, Protocol

import grpc  # type: ignore[import-untyped]
import msgspec
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.errors import CaravanError, EngineStopped
from cluster.scheduling.prefix import Chain
from cluster.scheduling.sequence import AdapterRef, Request, TokenEvent
from deployments import logs
from deployments.adapters.names import AdapterClient
from deployments.engine import adapter_board, board
from deployments.engine.board import ReplicaStatus
from deployments.engine.token_link import Inbox, TokenReceiver
from deployments.metrics import MetricsRecorder
from deployments.routing.assignments import ASSIGNMENTS
from deployments.routing.gateway_load import GatewayLoad
from deployments.routing.outlook import OUTLOOK, Prompt

log = logging.getLogger(__name__)

HELD_LOOK_S = 0.05  # how often a request that is held looks for an engine
CALL_S, CALL_AGAIN_S = 2.0, 20.0  # how long an engine is called that does not run, and how soon again
WATCH_PERIOD_S = 0.5  # how often silent engines are looked for
LEARN_PERIOD_S = 1.0  # how often engines' digests are read
BOARD_S = 1.0  # how long a look at the board may take
LAST_TOKENS_S = 5.0  # how much later than the end of its call a request's last tokens may come

# How a call ends whose replica is gone, goes, or was told to stop.
_GONE = (
    RayActorError, DeploymentUnavailableError, BackPressureError, RequestCancelledError, grpc.RpcError,
    asyncio.CancelledError,
)  # fmt: skip


_encode_request = msgspec.msgpack.Encoder().encode


class EngineClient(AdapterClient, Protocol):
    """What the gateway needs; tests give it scripted tokens through the same door."""

    def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        """Tokens as they come. Closing it cancels the request. Raises `RequestRejected` or `EngineStopped`."""
        ...

    async def replicas(self) -> list[ReplicaStatus]:
        """What the engine replicas say of themselves."""
        ...

    async def reset_cache(self) -> None:
        """Have all engines forget the keys and values that they have cached."""
        ...


class ServeEngineClient:
    """Through a Serve handle, which picks the replica (see router.py); tokens come back by the token link.

    Its calls go over gRPC, not as calls of an actor: at the end of such a call an actor waits, with its only event
    loop, until the caller has taken note. One gateway that hung would keep an engine from answering everybody else, its
    health check among them, and Serve would replace it.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        app: str,
        block_size: int,
        recorder: MetricsRecorder,
        load: GatewayLoad,
    ) -> None:
        self._awake: Any = handle.options(method_name="awake", _by_reference=False)
        self._waking: asyncio.Task[None] | None = None
        self._load = load
        self._generate: Any = handle.options(method_name="generate", stream=True, _by_reference=False)
        self._load_adapter: Any = handle.options(method_name="load_adapter", _by_reference=False)
        self._app = app
        self._block_size = block_size
        self._recorder = recorder
        self._receiver: TokenReceiver | None = None
        self._board: list[ReplicaStatus] = []
        self._reader = board.Reader(app)
        self._reading: asyncio.Task[list[ReplicaStatus]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        receiver = self._receiver = self._receiver or self._open_receiver()
        name = request.request_id
        if not ASSIGNMENTS.running:
            await self._await_engine(request)
        inbox = receiver.open(name)
        ASSIGNMENTS.open(name, inbox, asyncio.get_running_loop(), self._prompt(request))
        response = self._generate.remote(name, _encode_request(request), msgspec.structs.astuple(receiver.address))
        self._keep(self._end(response, inbox))
        finished = False
        try:
            while not finished:
                events = await inbox.next()
                if replica := ASSIGNMENTS.replica_of(name):
                    logs.bind(replica=replica)
                finished = events[-1].finish_reason is not None
                yield events
        finally:
            ASSIGNMENTS.close(name)
            receiver.close(name)
            if not finished:
                response.cancel()

    def _prompt(self, request: Request) -> Prompt:
        token_ids = [*request.token_ids, *request.output_ids]
        shorts = Chain(request.chain_root).shorts(token_ids, self._block_size)
        return Prompt(len(token_ids), self._block_size, shorts)

    async def _await_engine(self, request: Request) -> None:
        """Until Serve routes to one. Where none runs for want of work, Serve starts one when it is called."""
        with self._load.holding(request.request_id, len(request.token_ids)):
            while not ASSIGNMENTS.running:
                if self._waking is None or self._waking.done():
                    self._waking = asyncio.create_task(self._wake())
                await asyncio.sleep(HELD_LOOK_S)

    async def _wake(self) -> None:
        """Call an engine, but do not insist: while a call waits Serve starts one engine and asks no policy for more."""
        response = self._awake.remote()
        try:
            async with asyncio.timeout(CALL_S):
                await response
        except TimeoutError:
            response.cancel()
        except (*_GONE, RayTaskError) as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            log.info("no engine answers yet: %s", type(error).__name__)
        await asyncio.sleep(CALL_AGAIN_S if not ASSIGNMENTS.running else 0.0)

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """By one engine, whichever is routed to; the others read it when they are asked for it."""
        try:
            await self._load_adapter.remote(digest=adapter.digest, path=adapter.path)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, CaravanError) else EngineStopped("the engine failed")) from error
        except _GONE as error:
            raise EngineStopped(f"the engine went away: {type(error).__name__}") from error

    async def named_adapters(self) -> Mapping[str, AdapterRef]:
        return await asyncio.to_thread(adapter_board.read, self._app)

    async def name_adapters(self, named: Mapping[str, AdapterRef]) -> None:
        await asyncio.to_thread(adapter_board.write, self._app, dict(named))

    def _open_receiver(self) -> TokenReceiver:
        self._keep(self._watch())
        self._keep(self._learn())
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

    async def _learn(self) -> None:
        """What engines hold, for the router; and tell of its decisions."""
        while True:
            try:
                OUTLOOK.hold(await asyncio.to_thread(board.read_digests, self._app, ASSIGNMENTS.running or ()))
            except Exception as error:  # the control plane is away: what was known still holds
                log.info("what engines hold could not be read: %s", error)
            for reason, count in OUTLOOK.take_decisions().items():
                self._recorder.inc("routed_total", count, reason=reason)
            await asyncio.sleep(LEARN_PERIOD_S)

    @staticmethod
    async def _end(response: Any, inbox: Inbox) -> None:
        """Wait for the end of the request's call, and make its stream end too if it has not yet."""
        try:
            async for _ in response:
                pass
            await asyncio.sleep(LAST_TOKENS_S)
            inbox.fail(EngineStopped("the engine ended the stream early"))
        except (RayTaskError, CaravanError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error  # the former shows where it was raised
            known = isinstance(cause, CaravanError)
            inbox.fail(cause if known else EngineStopped(f"the engine failed: {type(cause).__name__}"))
        except _GONE as error:
            inbox.fail(EngineStopped(f"the engine went away: {type(error).__name__}"))

    async def reset_cache(self) -> None:
        await asyncio.wait_for(asyncio.to_thread(board.order_reset, self._app), BOARD_S)

    async def replicas(self) -> list[ReplicaStatus]:
        """As the board says, which is kept by the cluster's control plane: while that is away, as it last said."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(asyncio.to_thread(self._reader.look))
        await asyncio.wait({self._reading}, timeout=BOARD_S)
        if self._reading.done() and self._reading.exception() is None:
            self._board = self._reading.result()
        return [_as_routed(replica) for replica in self._board]


def _as_routed(replica: ReplicaStatus) -> ReplicaStatus:
    """What the router and the token link know is newer than the board."""
    running = ASSIGNMENTS.running
    if replica.state == "ready" and running is not None and replica.replica not in running:
        return msgspec.structs.replace(replica, state="failed", reason="is gone, about to go, or not routed to yet")
    if replica.state == "ready" and ASSIGNMENTS.is_doubtful(replica.replica):
        return msgspec.structs.replace(replica, state="stalled", reason="has fallen silent, or rebuilds its pipeline")
    return replica

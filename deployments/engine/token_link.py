"""How tokens get from an engine to the gateways: one message per step and gateway, over ZMQ.

A Serve call carries each request, its cancellation, its end and the engine's death. Carrying its tokens too would cost
about a millisecond of Python for each of them; here a step costs one message to every gateway that has a request in it.

Every gateway binds a PULL socket on its node's cluster address and sends that address, with the key to talk to it,
along with each request; engines connect to it. The key travels through Ray only, the traffic is encrypted (CURVE), and
events of a request that the gateway does not have open (ids are 96 random bits) are dropped.
"""

import asyncio
import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import msgspec
import zmq
import zmq.asyncio

from cluster.errors import CaravanError
from cluster.scheduling.sequence import TokenEvent
from cluster.transport import bracketed

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64_000_000  # far above a step's events with all their logprobs
MAX_BACKLOG = 1000  # messages to a gateway that does not read; then it counts as gone
MAX_LINKS = 64  # gateways an engine stays connected to; the longest silent one is dropped first
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 2_000, 8_000


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """One message: what an engine has for a gateway, or nothing but that it lives."""

    sender: str  # the engine's replica
    events: list[TokenEvent]
    ready: bool = True  # False: its pipeline is being rebuilt


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Tokens).decode


class ReplyAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a gateway wants its tokens."""

    endpoint: str
    server_key: str  # Z85, public


class GatewayLost(Exception):
    """The gateway at this address does not take tokens any more."""


class Inbox:
    """The events of one request that its stream has not taken yet."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._error: CaravanError | None = None
        self._changed = asyncio.Event()

    def push(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._changed.set()

    def fail(self, error: CaravanError) -> None:
        self._error = error
        self._changed.set()

    async def next(self) -> list[TokenEvent]:
        """All events since the last call, at least one. Raises what `fail` was given once no event is left."""
        await self._changed.wait()
        if self._events:
            events, self._events = self._events, []
            if self._error is None:
                self._changed.clear()
            return events
        assert self._error is not None
        raise self._error


class TokenReceiver:
    """A gateway's end. Lives in the event loop that made it. `on_message` is told which engine has spoken."""

    def __init__(self, host: str, on_message: Callable[[str, bool], None] = lambda sender, ready: None) -> None:
        self._on_message = on_message
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        public, secret = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # what came is read at once and kept per request
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
        port = self._socket.bind_to_random_port(f"tcp://{bracketed(host)}")
        self.address = ReplyAddress(f"tcp://{bracketed(host)}:{port}", public.decode("ascii"))
        self._inboxes: dict[str, Inbox] = {}
        self._task = asyncio.get_running_loop().create_task(self._run())

    def open(self, request_id: str) -> Inbox:
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    def close(self, request_id: str) -> None:
        """Whatever still comes for this request is dropped."""
        self._inboxes.pop(request_id, None)

    async def _run(self) -> None:
        while True:
            payload = await self._socket.recv()
            try:
                tokens = _decode(payload)
                self._on_message(tokens.sender, tokens.ready)
                deliver(tokens.events, self._inboxes)
            except msgspec.DecodeError as error:
                log.warning("a message on the token link is not one of ours (%s); dropped", error)

    async def aclose(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._context.destroy(linger=0)


def deliver(events: list[TokenEvent], inboxes: Mapping[str, Inbox]) -> None:
    """Each event to its request; clients may have left."""
    for event in events:
        inbox = inboxes.get(event.request_id)
        if inbox is not None:
            inbox.push(event)


class TokenSender:
    """An engine's end. Safe from any thread; nothing here waits."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._links: OrderedDict[ReplyAddress, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = OrderedDict()

    def send(self, address: ReplyAddress, events: list[TokenEvent]) -> None:
        """Raises `GatewayLost` if the gateway has closed the link, or reads nothing any more."""
        with self._lock:
            self._send(address, Tokens(self._name, events))

    def beat(self, addresses: Iterable[ReplyAddress], ready: bool) -> None:
        """Tell these gateways, and all that are connected, that the engine lives, and whether it is `ready`."""
        with self._lock:
            for address in {*addresses, *self._links}:
                with contextlib.suppress(GatewayLost):  # found out again when there is something to say
                    self._send(address, Tokens(self._name, [], ready))

    def _send(self, address: ReplyAddress, tokens: Tokens) -> None:
        link, monitor = self._links.get(address) or self._connect(address)
        self._links.move_to_end(address)
        if monitor.poll(0):  # the only event it reports: the connection broke
            self._drop(address)
            raise GatewayLost(f"the gateway at {address.endpoint} is gone")
        try:
            link.send(_encode(tokens), zmq.NOBLOCK)
        except zmq.Again:
            self._drop(address)
            raise GatewayLost(f"the gateway at {address.endpoint} has not read {MAX_BACKLOG} messages") from None

    def _connect(self, address: ReplyAddress) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        if len(self._links) >= MAX_LINKS:
            self._drop(next(iter(self._links)))
        link = self._context.socket(zmq.PUSH)
        link.curve_serverkey = address.server_key.encode("ascii")
        link.curve_publickey, link.curve_secretkey = zmq.curve_keypair()
        link.setsockopt(zmq.SNDHWM, MAX_BACKLOG)
        link.setsockopt(zmq.LINGER, 5_000)
        link.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        link.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        if "[" in address.endpoint:
            link.setsockopt(zmq.IPV6, 1)
        monitor: zmq.Socket[bytes] = link.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        link.connect(address.endpoint)
        self._links[address] = link, monitor
        return self._links[address]

    def _drop(self, address: ReplyAddress) -> None:
        link, _ = self._links.pop(address)
        link.disable_monitor()
        link.close()

    def close(self) -> None:
        """Send what is still queued, for at most the linger time."""
        with self._lock:
            for address in list(self._links):
                self._drop(address)
        self._context.term()

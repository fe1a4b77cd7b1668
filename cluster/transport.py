"""How stages are reached: small control messages over ZMQ, hidden states over torch.distributed.

Control: the engine binds one ROUTER on the node's cluster address; every stage connects a DEALER. Both ends are
CURVE-authenticated with keys made for this pipeline and handed out through Ray, so nobody else can speak or listen.
Messages are msgpack with a fixed schema (msgspec), never pickle.

Data: one process group per pair of neighbours, so that traffic of one pair never waits for another's.
"""

import contextlib
import math
import os
import socket
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from model.batch import (
    Batch,
    Copied,
    Copies,
    LateMasks,
    SampledTokens,
    StageTiming,
    StepOutput,
    decode_array,
    encode_array,
)


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """A stage's first message: it listens, so no batch can be lost."""

    epoch: int
    stage: int


class StepOrder(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """To all stages: what to compute, and how long the whole step may take."""

    batch: Batch
    timeout_s: float


class LoadAdapter(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    """To all stages: read this adapter beside the steps, and say when that is done; let go of others."""

    digest: str
    path: str
    drop: list[str]


class AdapterLoaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """A stage has its part of an adapter in its host's memory, or cannot have it."""

    stage: int
    digest: str
    error: str | None


FromStage = Ready | StepOutput | StageTiming | Copied | AdapterLoaded
ToStage = StepOrder | SampledTokens | LateMasks | Copies | LoadAdapter
STOP = b""  # to a stage: leave the loop

encode = msgspec.msgpack.Encoder(enc_hook=encode_array).encode
_order_decoder: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage, dec_hook=decode_array)
_reply_decoder: msgspec.msgpack.Decoder[FromStage] = msgspec.msgpack.Decoder(FromStage)


@dataclass(frozen=True, slots=True)
class ControlAddress:
    """All a stage needs to reach its engine."""

    endpoint: str
    server_key: bytes
    public_key: bytes
    secret_key: bytes


class StopRequested(Exception):
    """The engine wants this stage to leave its loop."""


class Wakeup:
    """Ends a wait from any thread. Calls that nobody has waited for yet count as one, and none of them blocks."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """To be polled: readable once it is set."""
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def __del__(self) -> None:
        os.close(self._fd)  # nobody is left who could set it


class Control(ABC):
    """The engine's end of the control channel: one message to all stages at once, replies of all in one queue."""

    def __init__(self, num_stages: int) -> None:
        self._last = num_stages - 1

    def send(self, order: StepOrder) -> None:
        """To all stages; what only the sampler reads (masks are large) goes to the last one alone.

        Raises `zmq.ZMQError` if one is not connected.
        """
        whole = brief = encode(order)
        if self._last and (len(order.batch.draws) or order.batch.prompt_rows):
            brief = encode(msgspec.structs.replace(order, batch=order.batch.brief()))
        for stage in range(self._last):
            self._put(stage, brief)
        self._put(self._last, whole)

    def stop(self) -> None:
        """To all stages that are connected: leave the loop."""
        for stage in range(self._last + 1):
            with contextlib.suppress(zmq.ZMQError):
                self._put(stage, STOP)

    def send_tokens(self, tokens: SampledTokens) -> None:
        """To the first stage. Raises `zmq.ZMQError` if it is not connected."""
        self._put(0, encode(tokens))

    def send_masks(self, masks: LateMasks) -> None:
        """To the last stage. Raises `zmq.ZMQError` if it is not connected."""
        self._put(self._last, encode(masks))

    def send_copies(self, copies: Copies) -> None:
        """To all stages. Raises `zmq.ZMQError` if one is not connected."""
        payload = encode(copies)
        for stage in range(self._last + 1):
            self._put(stage, payload)

    def send_adapter(self, order: LoadAdapter) -> None:
        """To all stages. Raises `zmq.ZMQError` if one is not connected."""
        for stage in range(self._last + 1):
            self._put(stage, encode(order))

    def receive(self, timeout: float | None) -> FromStage | None:
        """The next reply, or None after a wakeup or `timeout` seconds. Raises `msgspec.DecodeError` on nonsense."""
        if (reply := self._take(timeout)) is None:
            return None
        identity, payload = reply
        message = _reply_decoder.decode(payload)
        sender = self._last if isinstance(message, StepOutput) else message.stage
        if identity != identity_of(sender):
            raise msgspec.ValidationError(f"{identity!r} speaks as stage {sender}")
        return message

    @abstractmethod
    def _put(self, stage: int, payload: bytes) -> None: ...

    @abstractmethod
    def _take(self, timeout: float | None) -> tuple[bytes, bytes] | None:
        """Who says what."""

    @abstractmethod
    def close(self) -> None: ...


class ControlServer(Control):
    """Between processes. `wakeup` ends a `receive`."""

    def __init__(self, host: str, num_stages: int, wakeup: Wakeup) -> None:
        super().__init__(num_stages)
        self._wakeup = wakeup
        self._context = zmq.Context()
        self._keys = [zmq.curve_keypair() for _ in range(num_stages)]
        self._auth = ThreadAuthenticator(self._context)
        self._auth.start()
        self._auth.configure_curve_callback("*", credentials_provider=_Allowed({public for public, _ in self._keys}))
        self._server_public, server_secret = zmq.curve_keypair()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.curve_server = True
        self._router.curve_publickey, self._router.curve_secretkey = self._server_public, server_secret
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown stage is an error, not a lost message
        if ":" in host:
            self._router.setsockopt(zmq.IPV6, 1)
        port = self._router.bind_to_random_port(f"tcp://{bracketed(host)}")
        self._endpoint = f"tcp://{bracketed(host)}:{port}"
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(wakeup, zmq.POLLIN)

    def address(self, stage: int) -> ControlAddress:
        """What stage number `stage` connects with."""
        public, secret = self._keys[stage]
        return ControlAddress(self._endpoint, self._server_public, public, secret)

    def _put(self, stage: int, payload: bytes) -> None:
        self._router.send_multipart([identity_of(stage), payload], zmq.NOBLOCK)

    def _take(self, timeout: float | None) -> tuple[bytes, bytes] | None:
        ready = dict(self._poller.poll(None if timeout is None else math.ceil(timeout * 1000)))
        if self._wakeup.fileno() in ready:
            self._wakeup.clear()
        if self._router not in ready:
            return None
        identity, payload = self._router.recv_multipart()
        return identity, payload

    def close(self) -> None:
        self._auth.stop()
        self._context.destroy(linger=0)


class StageChannel(ABC):
    """A stage's end of the control channel."""

    def receive(self, wait: bool = True) -> ToStage | None:
        """The next order; None if there is none yet and `wait` is False. Raises `StopRequested`."""
        if (payload := self._take(wait)) is None:
            return None
        if payload == STOP:
            raise StopRequested
        return _order_decoder.decode(payload)

    def send(self, message: FromStage) -> None:
        self._put(encode(message))

    @abstractmethod
    def _put(self, payload: bytes) -> None: ...

    @abstractmethod
    def _take(self, wait: bool) -> bytes | None: ...


class ControlClient(StageChannel):
    """Of a stage with a process of its own."""

    def __init__(self, address: ControlAddress, stage: int) -> None:
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.IDENTITY, identity_of(stage))
        self._dealer.setsockopt(zmq.LINGER, 1000)
        if "[" in address.endpoint:
            self._dealer.setsockopt(zmq.IPV6, 1)
        self._dealer.curve_serverkey = address.server_key
        self._dealer.curve_publickey, self._dealer.curve_secretkey = address.public_key, address.secret_key
        self._dealer.connect(address.endpoint)

    def _put(self, payload: bytes) -> None:
        self._dealer.send(payload)

    def _take(self, wait: bool) -> bytes | None:
        try:
            return self._dealer.recv(0 if wait else zmq.NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        self._context.destroy(linger=1000)


class _Allowed:
    """ZAP credentials: only the keys of this pipeline's stages."""

    def __init__(self, keys: set[bytes]) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return zmq.utils.z85.encode(key) in self._keys if len(key) == 32 else key in self._keys


def identity_of(stage: int) -> bytes:
    """What a stage is called on the control channel."""
    return b"stage-%d" % stage


def bracketed(host: str) -> str:
    """An IPv6 address in brackets, as URLs want it."""
    return f"[{host}]" if ":" in host else host


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address. Raises `ValueError` naming the address if none has."""
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == address:
                return name
        except ValueError:
            continue  # it has no IPv4 address
    raise ValueError(f"no network interface of this node has the address {address}: set pipeline.network_interface")


def interface_address(interface: str) -> str:
    """IPv4 address of a network interface. Raises `ValueError` naming it if it has none."""
    import fcntl

    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"pipeline.network_interface: {interface} has no IPv4 address here; this node has {names}"
            ) from error
    return socket.inet_ntoa(packed[20:24])

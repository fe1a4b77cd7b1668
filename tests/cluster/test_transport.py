"""Control messages and hidden states between real sockets: who is let in, what is refused, when waiting ends."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import psutil
import pytest
import torch
import zmq

from cluster.errors import LinkBroken
from cluster.stages.gloo_link import GlooLink
from cluster.stages.link import DOWNSTREAM, UPSTREAM
from cluster.stages.rendezvous import Rendezvous, join
from cluster.transport import (
    ControlAddress,
    ControlClient,
    ControlServer,
    Ready,
    StepOrder,
    StopRequested,
    Wakeup,
    encode,
    interface_address,
)
from model.batch import (
    SAMPLED,
    Batch,
    LateMasks,
    PromptRow,
    Rules,
    SampledTokens,
    StageTiming,
    StepOutput,
    TokenLogprobs,
)
from tests.conftest import ints

HOST = "127.0.0.1"


def batch(step_id: int = 0) -> Batch:
    rules = Rules(
        9, 2**64 - 1, 0.7, 5, 0.9, 0.1, 3, {9: -1.5}, (2,), 40, True, 1.1, 0.2, 0.3, ints(5, 7), ints(5, 5)
    )  # fmt: skip
    arrays = (np.array(x, np.int32) for x in ([1, 2, 3, SAMPLED], [3, 1], [0, 17], [5, 9], [1, 2], [4, 6, 7]))
    row = ints(1), ints(0), [rules], {0: b"\x05\xff"}, [0], [PromptRow(0, 7, 3)]
    return Batch(2, step_id, *arrays, step_id - 1, *row)


@pytest.fixture
def server() -> Iterator[ControlServer]:
    server = ControlServer(HOST, 2, Wakeup())
    yield server
    server.close()


def ready(server: ControlServer, client: ControlClient, stage: int) -> None:
    client.send(Ready(0, stage))
    assert server.receive(5.0) == Ready(0, stage)


def test_messages_arrive_as_they_were_sent(server: ControlServer) -> None:
    clients = [ControlClient(server.address(i), i) for i in range(2)]
    try:
        for stage, client in enumerate(clients):
            ready(server, client, stage)
        server.send(StepOrder(batch(), 2.5))
        for client in clients:
            order = client.receive()
            assert isinstance(order, StepOrder)
            assert order.timeout_s == 2.5
            received = order.batch
            for field in Batch.__struct_fields__:
                found, expected = getattr(received, field), getattr(batch(), field)
                if client is clients[0] and field in ("draws", "rules", "masks", "awaited", "prompt_rows"):
                    assert len(found) == 0  # only the last stage samples
                elif field == "rules":
                    assert encode(found) == encode(expected)
                else:
                    assert np.array_equal(found, expected)
        for message in (
            StepOutput(2, 5, [1, 2], {1: TokenLogprobs(-0.5, [(3, -1.0)])}),
            StageTiming(2, 5, 1, 1.0, 2.0, 0.5, 0.25),
        ):
            clients[1].send(message)
            assert server.receive(5.0) == message
        server.send_tokens(SampledTokens(5, [1, 2]))
        assert clients[0].receive() == SampledTokens(5, [1, 2])
        assert clients[1].receive(wait=False) is None
        server.send_masks(LateMasks(2, 5, {0: b"\x07"}))
        assert clients[1].receive() == LateMasks(2, 5, {0: b"\x07"})
        assert clients[0].receive(wait=False) is None
        server.stop()
        for client in clients:
            with pytest.raises(StopRequested):
                client.receive()
    finally:
        for client in clients:
            client.close()


def test_waiting_ends_by_timeout_or_wake(server: ControlServer) -> None:
    started = time.monotonic()
    assert server.receive(0.05) is None
    threading.Timer(0.1, server._wakeup.set).start()
    assert server.receive(30.0) is None
    assert time.monotonic() - started < 10


def test_a_stage_that_is_not_there_is_an_error(server: ControlServer) -> None:
    with pytest.raises(zmq.ZMQError):
        server.send(StepOrder(batch(), 2.5))
    server.stop()  # which is no error


def wrong_keys(address: ControlAddress) -> list[ControlAddress]:
    public, secret = zmq.curve_keypair()
    other_server, _ = zmq.curve_keypair()
    return [
        dataclasses.replace(address, public_key=public, secret_key=secret),  # a key that was never handed out
        dataclasses.replace(address, server_key=other_server),  # somebody else's server
    ]


def test_strangers_are_not_heard(server: ControlServer) -> None:
    for address in wrong_keys(server.address(0)):
        client = ControlClient(address, 0)
        client.send(Ready(0, 0))
        assert server.receive(0.3) is None
        client.close()
    plain = zmq.Context()
    socket = plain.socket(zmq.DEALER)  # no CURVE at all
    socket.setsockopt(zmq.IDENTITY, b"stage-0")
    socket.connect(server.address(0).endpoint)
    socket.send(b"\x00" * 100)
    assert server.receive(0.3) is None
    plain.destroy(linger=0)


def test_nonsense_from_a_stage_is_refused(server: ControlServer) -> None:
    client = ControlClient(server.address(0), 0)
    try:
        ready(server, client, 0)
        client._dealer.send(b"\xc1 no msgpack")
        with pytest.raises(msgspec.DecodeError):
            server.receive(5.0)
        client.send(Ready(0, 1))  # speaks as another stage
        with pytest.raises(msgspec.ValidationError, match="speaks as"):
            server.receive(5.0)
    finally:
        client.close()


def test_an_unknown_interface_is_named() -> None:
    assert interface_address("lo") == "127.0.0.1"
    with pytest.raises(ValueError, match="no-such-0"):
        interface_address("no-such-0")


def linked(timeout_s: float) -> tuple[GlooLink, GlooLink]:
    rendezvous = Rendezvous(HOST, 5.0)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(lambda: GlooLink(join(rendezvous.address, 5.0), DOWNSTREAM, HOST, "key", timeout_s))
        return GlooLink(rendezvous.store, UPSTREAM, HOST, "key", timeout_s), receiving.result(timeout=20)


def test_hidden_states_arrive_in_order() -> None:
    up, down = linked(5.0)
    sent = [torch.randn(n, 8).to(dtype) for n, dtype in ((1, torch.float32), (500, torch.float32), (3, torch.bfloat16))]
    received = []
    reader = threading.Thread(target=lambda: received.extend(down.receive(torch.empty_like(x), 5.0) for x in sent))
    reader.start()
    for hidden in sent:
        up.send(hidden, 5.0)
    up.flush(5.0)
    reader.join(timeout=10)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


def test_a_silent_neighbour_is_an_error_after_the_deadline() -> None:
    _up, down = linked(5.0)
    started = time.monotonic()
    with pytest.raises(LinkBroken, match="receiving from the stage before"):
        down.receive(torch.empty(2, 8), 0.3)
    assert time.monotonic() - started < 10


def test_a_neighbour_that_goes_is_an_error_at_once() -> None:
    up, down = linked(60.0)
    threading.Timer(0.2, up.close).start()
    started = time.monotonic()
    with pytest.raises(LinkBroken):
        down.receive(torch.empty(2, 8), 60.0)
    assert time.monotonic() - started < 30


def test_a_stranger_without_the_key_is_not_linked() -> None:
    rendezvous = Rendezvous(HOST, 1.0)
    with ThreadPoolExecutor(1) as pool:
        stranger = pool.submit(lambda: GlooLink(join(rendezvous.address, 1.0), DOWNSTREAM, HOST, "guess", 1.0))
        with pytest.raises(LinkBroken):
            GlooLink(rendezvous.store, UPSTREAM, HOST, "key", 1.0)
        with pytest.raises(LinkBroken):
            stranger.result(timeout=20)


def test_nobody_at_the_meeting_point_is_an_error_after_the_deadline() -> None:
    rendezvous = Rendezvous(HOST, 0.5)
    with pytest.raises(LinkBroken):
        GlooLink(rendezvous.store, UPSTREAM, HOST, "key", 0.5)
    host, port = rendezvous.address
    del rendezvous
    with pytest.raises(LinkBroken, match=f"{HOST}:"):
        join((host, port), 0.5)


def test_neighbours_meet_at_one_address_of_the_node_only() -> None:
    rendezvous = Rendezvous(HOST, 5.0)
    listening = {
        (c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN
    }
    assert [ip for ip, port in listening if port == rendezvous.address[1]] == [HOST]
    del rendezvous

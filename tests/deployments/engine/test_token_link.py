"""The token link, over real sockets."""

import asyncio
import subprocess
import sys
import time

import pytest
import zmq

from cluster.errors import EngineStopped
from cluster.scheduling.sequence import TokenEvent
from deployments.engine.token_link import MAX_BACKLOG, GatewayLost, Inbox, ReplyAddress, TokenReceiver, TokenSender

HOST = "127.0.0.1"


def test_every_event_reaches_its_request_in_order_from_several_engines() -> None:
    async def main() -> None:
        receiver = TokenReceiver(HOST)
        engines = [TokenSender() for _ in range(3)]
        inboxes = {f"r{n}": receiver.open(f"r{n}") for n in range(3)}
        for token in range(500):
            for n, engine in enumerate(engines):
                engine.send(receiver.address, [TokenEvent(f"r{n}", token), TokenEvent("nobody", 0)])
        for name, inbox in inboxes.items():
            got: list[int] = []
            while len(got) < 500:
                events = await inbox.next()
                assert {event.request_id for event in events} == {name}
                got += [event.token_id for event in events]
            assert got == list(range(500))
        for engine in engines:
            engine.close()
        await receiver.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_inbox_gives_its_events_before_its_error() -> None:
    async def main() -> None:
        inbox = Inbox()
        inbox.push(TokenEvent("r", 1))
        inbox.fail(EngineStopped("it went away"))
        assert [event.token_id for event in await inbox.next()] == [1]
        with pytest.raises(EngineStopped, match="went away"):
            await inbox.next()

    asyncio.run(asyncio.wait_for(main(), 5))


def test_what_is_not_ours_is_dropped_and_a_stranger_gets_nothing_in() -> None:
    async def main() -> None:
        receiver = TokenReceiver(HOST)
        inbox = receiver.open("r")
        context = zmq.Context()
        plain = context.socket(zmq.PUSH)  # knows the port, not the key
        plain.connect(receiver.address.endpoint)
        plain.send(b"\x91\x92\xa1r\x07", zmq.NOBLOCK)  # [["r", 7]]
        wrong = TokenSender()
        wrong.send(ReplyAddress(receiver.address.endpoint, zmq.curve_keypair()[0].decode()), [TokenEvent("r", 8)])
        nonsense = context.socket(zmq.PUSH)  # knows the key, speaks nonsense
        nonsense.curve_serverkey = receiver.address.server_key.encode()
        nonsense.curve_publickey, nonsense.curve_secretkey = zmq.curve_keypair()
        nonsense.connect(receiver.address.endpoint)
        nonsense.send(b"\xff\x00 nonsense")
        await asyncio.sleep(0.5)
        engine = TokenSender()
        engine.send(receiver.address, [TokenEvent("r", 9)])
        assert [event.token_id for event in await inbox.next()] == [9]
        context.destroy(linger=0)
        engine.close()
        await receiver.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_engine_learns_that_a_gateway_died() -> None:
    script = (
        "import asyncio, sys\n"
        "from deployments.engine.token_link import TokenReceiver\n"
        "async def main():\n"
        "    receiver = TokenReceiver('127.0.0.1')\n"
        "    inbox = receiver.open('r')\n"
        "    print(receiver.address.endpoint, receiver.address.server_key, flush=True)\n"
        "    await inbox.next()\n"
        "    print('got it', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    gateway = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    endpoint, key = gateway.stdout.readline().split()
    engine = TokenSender()
    engine.send(ReplyAddress(endpoint, key), [TokenEvent("r", 1)])
    assert gateway.stdout.readline() == "got it\n"
    gateway.kill()
    gateway.wait()
    deadline = time.monotonic() + 10

    def go_on() -> None:
        while time.monotonic() < deadline:
            engine.send(ReplyAddress(endpoint, key), [TokenEvent("r", 2)])
            time.sleep(0.01)

    with pytest.raises(GatewayLost, match="is gone"):
        go_on()


def test_an_engine_does_not_wait_for_a_gateway_that_is_not_there() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        port = socket.bind_to_random_port(f"tcp://{HOST}")
        socket.unbind(f"tcp://{HOST}:{port}")
    engine = TokenSender()
    address = ReplyAddress(f"tcp://{HOST}:{port}", zmq.curve_keypair()[0].decode())
    for _ in range(MAX_BACKLOG):
        engine.send(address, [TokenEvent("r", 1)])
    with pytest.raises(GatewayLost, match=f"not read {MAX_BACKLOG}"):
        engine.send(address, [TokenEvent("r", 1)])


def test_gateways_hear_that_an_engine_lives_and_whether_it_is_ready() -> None:
    async def main() -> None:
        heard: list[tuple[str, bool]] = []
        receiver = TokenReceiver(HOST, lambda sender, ready: heard.append((sender, ready)))
        engine = TokenSender("engine-a")
        inbox = receiver.open("r")
        engine.beat([receiver.address], ready=False)  # a request waits there, no token came yet
        engine.beat([], ready=True)  # from now on it is connected
        engine.send(receiver.address, [TokenEvent("r", 1)])
        await inbox.next()
        assert heard == [("engine-a", False), ("engine-a", True), ("engine-a", True)]
        engine.close()
        await receiver.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))

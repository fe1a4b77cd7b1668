"""Clients that abuse HTTP, against the gateway in a real uvicorn: others are served, memory stays, nothing hangs."""

import asyncio
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from ops.local import free_port
from tests.deployments.gateway.test_tenants import Guarded

ROOT = Path(__file__).parents[2]
BODY = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 3}).encode()
STREAM = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 200, "stream": True, "logprobs": 1}).encode()


class Server:
    """The process, and raw connections to it."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.port, self.process = port, process
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, *parts: bytes) -> bytes:
        """All that comes back until the server closes, or says nothing for a second."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            return self.read(connection)

    @staticmethod
    def read(connection: socket.socket) -> bytes:
        connection.settimeout(1.5)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
        return found

    def megabytes(self) -> float:
        return self.process.memory_info().rss / 1e6

    def check_others(self) -> None:
        """Whatever somebody does: another client gets its answer, soon."""
        started = time.monotonic()
        response = self.http.post("/v1/completions", content=BODY)
        assert response.status_code == 200, response.text
        assert time.monotonic() - started < 5

    def open_streams(self) -> int:
        return int(self.http.get("/open").json())

    def eventually_idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.open_streams():
            assert time.monotonic() < deadline, "a stream whose client is gone still runs"
            time.sleep(0.05)


def head(*lines: str, path: str = "/v1/completions", method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def post(body: bytes = BODY, *lines: str) -> bytes:
    return head(f"Content-Length: {len(body)}", *lines) + body


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "tests.deployments.uvicorn_server", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        server = Server(port, psutil.Process(process.pid))
        server.check_others()
        yield server
        server.check_others()
    finally:
        process.kill()
        process.wait()


def test_a_body_that_dawdles_is_given_up(server: Server) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(50)]
        for connection in slow:
            connection.sendall(head("Content-Length: 100") + b"{")
        server.check_others()
        started = time.monotonic()
        assert statuses(server.read(slow[0])) == [408]
        assert time.monotonic() - started < 5
        assert statuses(server.read(slow[-1])) == [408]


def test_clients_that_do_not_read_hold_nobody_up(server: Server) -> None:
    before = server.megabytes()
    with ExitStack() as stack:
        for _ in range(30):
            connection = stack.enter_context(server.connect())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(post(STREAM))
        time.sleep(0.2)
        for _ in range(3):
            server.check_others()
        server.eventually_idle()
        assert server.megabytes() - before < 60
    server.eventually_idle()


def test_a_reset_in_the_middle_of_a_stream_frees_it(server: Server) -> None:
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(post(STREAM))
            connection.recv(100)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.1)
    started = time.monotonic()
    server.eventually_idle()
    assert time.monotonic() - started < 3


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    answer = server.send(post() + head(path="/health", method="GET") + post())
    assert statuses(answer) == [200, 200, 200]
    assert answer.index(b"text_completion") < answer.index(b'"ok"')


SMUGGLED = head(path="/health", method="GET")


@pytest.mark.parametrize(
    "request_",
    [
        head(f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + SMUGGLED,
        head("Transfer-Encoding: chunked", f"Content-Length: {len(BODY)}") + b"0\r\n\r\n" + SMUGGLED,
        head("Content-Length: 5", f"Content-Length: {len(BODY)}") + BODY + SMUGGLED,
        head("Content-Length: 5, 6") + BODY + SMUGGLED,
        head("Content-Length: -1") + BODY + SMUGGLED,
        head("Content-Length: 1e3") + BODY + SMUGGLED,
        head("Transfer-Encoding: chunked") + b"5\r\nhelloXX0\r\n\r\n" + SMUGGLED,
        head("Transfer-Encoding: chunked") + b"zz\r\n" + SMUGGLED,
        head("Transfer-Encoding: xchunked") + BODY + SMUGGLED,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(2000),
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
    ],
    ids=[
        "CL+TE", "TE+CL", "two CL", "CL list", "CL -1", "CL 1e3", "bad chunk end", "bad chunk size", "unknown TE",
        "TLS", "zeros", "HTTP/9.9",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(server: Server, request_: bytes) -> None:
    answer = server.send(request_)
    assert 200 not in statuses(answer), "nothing of it was taken for a request"
    assert len(statuses(answer)) <= 1
    server.check_others()


def test_a_request_of_http_0_9_is_answered_once_and_closed(server: Server) -> None:
    started = time.monotonic()
    assert statuses(server.send(b"GET /health\r\n\r\n" + SMUGGLED)) == [200]
    assert time.monotonic() - started < 1


def test_long_headers(server: Server) -> None:
    before = server.megabytes()
    assert statuses(server.send(head("X: " + "x" * 70_000, "Content-Length: 0"))) in ([431], [400])
    many = [f"X-{i}: {'y' * 50}" for i in range(10_000)]
    assert statuses(server.send(head(*many, "Content-Length: 0"))) in ([431], [400])
    assert statuses(server.send(post(BODY, "X: " + "x" * 30_000))) == [200]
    assert server.megabytes() - before < 40


def test_a_body_of_100_megabytes(server: Server) -> None:
    before = server.megabytes()
    with server.connect() as connection:
        connection.sendall(head("Content-Length: 100000000"))
        assert statuses(server.read(connection)) == [413], "at once, from the header"
    sent = 0
    with server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        try:
            while sent < 100_000_000:
                connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
        except OSError:
            pass
        answer = server.read(connection)
    assert sent < 100_000_000, "the connection is closed once the limit is passed"
    assert statuses(answer) in ([413], []), "a client that goes on sending may find the connection reset instead"
    assert server.megabytes() - before < 40
    response = server.http.post("/v1/completions", content=b"x" * 1_000_001)
    assert response.json()["error"]["code"] == "request_too_large"


def test_many_bodies_at_once_stay_within_the_memory_for_bodies(server: Server) -> None:
    before = server.megabytes()
    with ExitStack() as stack:
        connections = [stack.enter_context(server.connect()) for _ in range(60)]
        for connection in connections:
            connection.sendall(head("Content-Length: 999999") + bytes(900_000))
        answers = [statuses(server.read(connection)) for connection in connections[-3:]]
        assert [503] in answers or [408] in answers
        assert server.megabytes() - before < 120
    server.check_others()


def test_compressed_bodies_are_refused(server: Server) -> None:
    import gzip

    bomb = gzip.compress(bytes(50_000_000))
    response = server.http.post("/v1/completions", content=bomb, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET"),
        ("/ready", "GET"), ("/tokenize", "POST"),
    ],
)  # fmt: skip
def test_other_methods_are_405_with_those_that_there_are(server: Server, path: str, allowed: str) -> None:
    for method in ("OPTIONS", "PUT", "DELETE", "PATCH", "TRACE") + ("HEAD",) * (allowed == "POST"):
        response = server.http.request(method, path)
        assert (response.status_code, response.headers.get("allow")) == (405, allowed), method


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/version", "/tokenizer_info"])
def test_head_is_get_without_its_body_and_a_slash_at_the_end_is_none(server: Server, path: str) -> None:
    got, slash, asked = server.http.get(path), server.http.get(f"{path}/"), server.http.head(path)
    assert (slash.status_code, slash.content) == (got.status_code, got.content)
    assert (asked.status_code, asked.content) == (got.status_code, b"")
    assert asked.headers["content-length"] == str(len(got.content))


def test_expect_continue(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head(f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(BODY)
        assert statuses(server.read(connection)) == [200]


def test_five_thousand_idle_connections(server: Server) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8000)), hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 5200:
        pytest.skip("this machine does not allow 5,000 open files")
    before = server.megabytes()
    with ExitStack() as stack:
        for i in range(5000):
            connection = stack.enter_context(server.connect())
            if i % 2:
                connection.sendall(b"POST /v1/comple")  # half a request line
        for _ in range(3):
            server.check_others()
        assert server.megabytes() - before < 150
    server.check_others()


# -- the gateway alone, where a real connection would take too long ---------------------------------------------------


def test_a_client_that_never_reads_loses_its_stream() -> None:
    async def test() -> None:
        service = Guarded(gateway={"write_timeout_s": 0.2, "resume_attempts": 0})
        service.engine.pause.clear()
        sent = iter([{"type": "http.request", "body": STREAM, "more_body": False}])

        async def receive() -> dict[str, object]:
            for message in sent:
                return message
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: object) -> None:
            await asyncio.Event().wait()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip
        with pytest.raises(BaseException):  # noqa: B017 the server closes the connection, whatever it is
            await asyncio.wait_for(service.app(scope, receive, send), 5)
        assert service.engine.open == 0

    asyncio.run(test())


def test_a_request_that_takes_too_long_ends_with_an_error() -> None:
    async def test() -> None:
        service = Guarded(gateway={"request_timeout_s": 0.3, "resume_attempts": 0})
        service.engine.pause.clear()
        response = await service.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")
        assert response.headers["x-should-retry"] == "false"
        text = (await service.chat(stream=True)).text
        assert '"code":"request_timeout"' in text
        assert "[DONE]" not in text
        assert service.engine.open == 0
        many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 1500
        assert (await service.chat(messages=many)).status_code == 400

    asyncio.run(test())

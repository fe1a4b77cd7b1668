"""A whole cluster on this machine: a private Ray head, the real `serve deploy`, and a clean end.

`python -m ops.local` keeps serving until Ctrl-C (`make serve`); `python -m ops.demo` shows what the service does and
leaves (`make demo`). Nothing of it touches another Ray on the machine: own directory, own ports, own token.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deployments.check import check_file
from ops.chat_client import ChatFailed
from ops.interrupt import end_on_signals
from ops.processes import living_processes

console = Console()
BIN = Path(sys.executable).parent
# As modules: where packages were unpacked beside a Python, not installed into it, there are no scripts.
RAY, SERVE = [sys.executable, "-m", "ray.scripts.scripts"], [sys.executable, "-m", "ray.serve.scripts"]
START_TIMEOUT_S, READY_TIMEOUT_S, STOP_TIMEOUT_S, KILL_AFTER_S = 90, 300, 60, 8
CONFIG = Path("ray_config.yaml")
METRICS_PORT = 8080


class LocalError(Exception):
    """Something on this machine is in the way; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Head:
    """A running Ray head node."""

    process: "subprocess.Popen[bytes]"
    directory: Path
    dashboard: str
    metrics: str
    environment: dict[str, str]

    def serve(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """The `serve` command line against this head."""
        command = [*SERVE, *arguments, "--address", self.dashboard]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)


def free_port(preferred: int = 0) -> int:
    """`preferred` if nobody listens there, else any free port of this machine."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise LocalError("this machine has no free port")


def free_low_ports(count: int) -> list[int]:
    """Free ports below the range in which Ray puts its workers, for the parts that do not choose one themselves.

    Any of them, for another cluster may look at the same moment.
    """
    ports = random.sample(range(6380, 7000), 620)
    found = list(islice((port for port in ports if free_port(port) == port), count))
    if len(found) < count:
        raise LocalError("this machine has too few free ports between 6380 and 7000")
    return found


def check_http_port(config: Path) -> str:
    """The service's address from the configuration. Raises `LocalError` if its port is taken."""
    options = yaml.safe_load(config.read_text("utf-8")).get("http_options") or {}
    host, port = options.get("host", "127.0.0.1"), int(options.get("port", 8000))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LocalError(
                f"port {port} on {host} is in use ({error.strerror}): stop what listens there, "
                f"or set another http_options.port in {config}"
            ) from error
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


@contextmanager
def ray_head(num_cpus: int) -> Iterator[Head]:
    """Start a private head; on leaving, end it with all its processes."""
    directory = Path(tempfile.mkdtemp(prefix="cv", dir="/tmp"))  # short: unix socket paths have 107 characters
    dashboard, client, metrics = *free_low_ports(2), free_port(METRICS_PORT)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # Else SIGTERM waits for the node to drain, which it cannot while its GCS ends too. Serve was shut down before.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_metrics_report_interval_ms": "1000",  # the default of 10 s makes a live view look dead
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
    }
    command = [
        *RAY, "start", "--head", "--block", "--num-cpus", str(num_cpus), "--temp-dir", str(directory),
        "--port", "0", "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1",
        "--dashboard-port", str(dashboard), "--metrics-export-port", str(metrics),
        "--ray-client-server-port", str(client),
        "--include-dashboard", "true", "--dashboard-agent-listen-port", str(free_port()),
        "--min-worker-port", "20000", "--max-worker-port", "29999", "--object-store-memory", "200000000",
    ]  # fmt: skip
    log = (directory / "head.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    head = Head(process, directory, f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics", environment)
    try:
        _await_dashboard(head)
        yield head
    finally:
        _stop_head(head)


def _await_dashboard(head: Head) -> None:
    headers = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if head.process.poll() is not None:
            words = (head.directory / "head.log").read_text(errors="replace").strip().splitlines()
            raise LocalError("Ray did not start: " + (words[-1] if words else f"exit status {head.process.returncode}"))
        try:
            if httpx.get(f"{head.dashboard}/api/version", headers=headers, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise LocalError(f"Ray did not start within {START_TIMEOUT_S} s; its words are in {head.directory}/head.log")


def session_processes(head: Head) -> list[int]:
    """Living processes of this head, its own included.

    They share its process session: names and environments tell nothing, for Ray's workers overwrite theirs.
    """
    return [process.pid for process in living_processes() if process.session == head.process.pid]


def _stop_head(head: Head) -> None:
    """SIGTERM to the head's process group, then SIGKILL to whatever of its session is left."""
    started = time.monotonic()
    with suppress(ProcessLookupError):
        os.killpg(head.process.pid, signal.SIGTERM)
    while (left := session_processes(head)) and time.monotonic() < started + STOP_TIMEOUT_S:
        if time.monotonic() > started + KILL_AFTER_S:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        head.process.poll()  # reap it
        time.sleep(0.2)
    head.process.poll()
    if left:
        console.print(f"[red]these processes would not end: {left}; logs are in {head.directory}[/red]")
    else:
        console.print("Stopped: no process of the session is left.")
        shutil.rmtree(head.directory, ignore_errors=True)


def await_ready(head: Head, url: str, pipelines: int = 1) -> None:
    """Wait until so many are ready, with a bar of the weights loaded. Raises `LocalError` if the deployment fails."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=1.0)
        checked = 0.0
        while time.monotonic() < deadline:
            state = _ready_state(url)
            ready = sum(r["state"] == "ready" for r in state.get("replicas", []))
            if ready >= pipelines:
                progress.update(task, completed=1.0, description="ready")
                return
            loaded = max((float(r["loaded"]) for r in state.get("replicas", [])), default=0.0)
            description = str(state.get("reason") or "starting the gateway")[:100]
            progress.update(task, completed=loaded, description=description)
            if time.monotonic() - checked > 5:
                checked = time.monotonic()
                _raise_if_failed(head)
            time.sleep(0.3)
    raise LocalError(f"the service was not ready within {READY_TIMEOUT_S} s: {_ready_state(url).get('reason')}")


def _live_page(url: str) -> str:
    """Where it is, if the configuration switches it on."""
    try:
        return f"; a live page at {url}/live" if httpx.get(f"{url}/live", timeout=5).status_code == 200 else ""
    except httpx.HTTPError:
        return ""


def _ready_state(url: str) -> dict[str, Any]:
    try:
        body = httpx.get(f"{url}/ready", timeout=2).json()
        return body if isinstance(body, dict) else {}
    except (httpx.HTTPError, ValueError):
        return {}


def _raise_if_failed(head: Head) -> None:
    status = yaml.safe_load(head.serve("status").stdout) or {}
    for name, application in (status.get("applications") or {}).items():
        if application.get("status") == "DEPLOY_FAILED":
            details = "\n".join(
                str(d.get("message")) for d in (application.get("deployments") or {}).values() if d.get("message")
            )
            raise LocalError(f"application {name} could not be deployed: {application.get('message')}\n{details}")


def main(
    config: Annotated[Path, typer.Option(help="the Serve configuration to deploy")] = CONFIG,
    num_cpus: Annotated[int, typer.Option(help="CPUs that Ray may hand out")] = 2,
    host: Annotated[str, typer.Option(help="listen here, not where the configuration says")] = "",
) -> None:
    """Serve a configuration on this machine: a private Ray head, `serve deploy`, and a clean end."""
    with tempfile.TemporaryDirectory(prefix="cv") as directory:
        run(_listening_on(host, config, Path(directory)) if host else config, num_cpus, _serve_until_interrupted)


def _listening_on(host: str, config: Path, directory: Path) -> Path:
    """The configuration once more, with another `http_options.host`."""
    content = yaml.safe_load(config.read_text("utf-8"))
    content["http_options"] = {**(content.get("http_options") or {}), "host": host}
    changed = directory / config.name
    changed.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return changed


def run(config: Path, num_cpus: int, once_ready: Callable[[Head, str], None]) -> None:
    """A command: deploy, do `once_ready` with the head and the service's address, and stop all of it."""
    end_on_signals()
    try:
        problems = check_file(config)
        if problems:
            raise LocalError("\n".join(problems))
        url = check_http_port(config)
        _deploy(config, num_cpus, url, once_ready)
    except (LocalError, ChatFailed) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted.")


def _deploy(config: Path, num_cpus: int, url: str, once_ready: Callable[[Head, str], None]) -> None:
    console.print("Starting a private Ray head on this machine ...")
    with ray_head(num_cpus) as head:
        console.print(f"Deploying {config} (serve deploy {config} --address {head.dashboard}) ...")
        deployed = head.serve("deploy", str(config))
        if deployed.returncode:
            raise LocalError(f"serve deploy failed:\n{deployed.stderr.strip()}")
        try:
            await_ready(head, url)
            console.print(f"Serving at {url}; metrics at {head.metrics}{_live_page(url)}")
            once_ready(head, url)
        finally:
            console.print("Stopping: serve shutdown, then the Ray head ...")
            head.serve("shutdown", "-y")


def _serve_until_interrupted(head: Head, url: str) -> None:
    console.print(f"Try: caravan chat --url {url}    or: caravan top --metrics {head.metrics}")
    console.print("Ctrl-C stops it.")
    while head.process.poll() is None:
        time.sleep(0.5)
    raise LocalError("Ray ended by itself")


if __name__ == "__main__":
    typer.run(main)

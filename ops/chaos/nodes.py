"""The nodes of a Ray cluster on this machine, each a `ray start` of its own that can die without the others.

Every node has its own process session, directory and ports; on request its own network namespace and address too, and a
small file system that can be filled. The head keeps what it knows on disk, so that it can die and come back.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from ops.chaos.namespaces import Namespace, Network
from ops.local import RAY, SERVE, LocalError, free_low_ports, free_port
from ops.processes import living_processes

BIN = Path(sys.executable).parent
START_TIMEOUT_S, STOP_TIMEOUT_S = 90.0, 20.0
WORKER_PORTS = 500  # a node's share of the ports for worker processes
DISK_BYTES = 300_000_000  # a node's file system, where it is to be filled

# How long Ray waits. A dead node is noticed after FAILURE_THRESHOLD missed checks, each PERIOD after the answer to the
# last one or TIMEOUT without it: about 1.5 s if its machine refuses connections, 9 s if it is silent. With
# Ray's defaults it takes 65 s. Shorter ones take a node for dead that is only busy.
PATIENCE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_agent_register_timeout_ms": "120000",  # on a busy machine a node's agent takes its time to start
    # A replica takes no new calls while it tries to tell a caller that died the end of a call, one call after another.
    "RAY_core_worker_rpc_server_reconnect_timeout_base_s": "0",
    "RAY_grpc_client_check_connection_status_interval_milliseconds": "100",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",  # how long nodes live on without a head; 60 s by default
}
# A proxy is replaced after three missed checks: 3 s. With Serve's defaults it takes 30 s.
PROXY_CHECKS = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "3"}


@dataclass(frozen=True, slots=True)
class Process:
    """A living process of a node."""

    pid: int
    title: str
    node: str

    def is_a(self, word: str) -> bool:
        return word in self.title


@dataclass(slots=True)
class Node:
    """One `ray start`."""

    name: str
    address: str
    directory: Path
    command: list[str]
    environment: dict[str, str]
    space: Namespace | None
    first: bool = False  # whether it gets the cores before all others
    process: "subprocess.Popen[bytes] | None" = None
    sessions: list[int] = field(default_factory=list)  # of all its lives

    def start(self) -> None:
        # A head that comes back finds this and its surviving workers, and would refuse to start beside itself.
        (self.directory / "ray_current_cluster").unlink(missing_ok=True)
        with (self.directory.parent / f"{self.name}.log").open("ab") as log:
            prefix = self.space.prefix if self.space else []
            self.process = subprocess.Popen(
                [*prefix, *self.command], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.sessions.append(self.process.pid)
        if self.first and os.geteuid() == 0:
            # Linux shares cores between sessions before it looks at niceness (sched(7), autogroup).
            with suppress(OSError):
                Path(f"/proc/{self.process.pid}/autogroup").write_text("-10")

    def drain(self) -> None:
        """As before it is switched off: Ray moves what runs here elsewhere, then the node ends by itself."""
        assert self.process is not None
        self.process.terminate()

    def kill(self) -> None:
        """All its processes at once, as when the machine loses power."""
        for found in living([self]):
            with suppress(ProcessLookupError):
                os.kill(found.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    @property
    def logs(self) -> Path:
        return self.directory / "session_latest" / "logs"


def living(nodes: list[Node]) -> list[Process]:
    """The processes of these nodes: they share the session of the `ray start` that they come from."""
    owners = {session: node.name for node in nodes for session in node.sessions}
    found = []
    for process in living_processes():
        if process.session in owners:
            with suppress(OSError):  # it ended just now
                title = (
                    Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
                found.append(Process(process.pid, title.strip(), owners[process.session]))
    return found


class Nodes:
    """A head and its workers. Leave the context to end and remove all of it."""

    def __init__(self, network: Network | None = None, small_disks: bool = False, haproxy: bool = False) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cv", dir="/tmp"))  # short: unix sockets have 107 characters
        self.network = network
        self._small_disks = small_disks
        self._head_ports = (6379, 8265, 10001) if network else tuple(free_low_ports(3))
        self.environment = {
            **os.environ,
            **PATIENCE,
            **PROXY_CHECKS,
            **(self._haproxy_files() if haproxy else {}),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(self.directory / "gcs"),
            "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
        }
        self.all: list[Node] = []
        self.metrics: list[str] = []  # one address per node

    def _haproxy_files(self) -> dict[str, str]:
        """HAProxy's files and ports, of this cluster alone."""
        base = "RAY_SERVE_HAPROXY_"
        files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "server-state"}
        ports = {"METRICS_PORT": str(free_port()), "STATS_PORT": str(free_port())}
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            f"{base}SERVER_STATE_BASE": str(self.directory / "haproxy"),
            **{base + name: str(self.directory / "haproxy" / file) for name, file in files.items()},
            **{base + name: port for name, port in ports.items()},
        }

    @property
    def head(self) -> Node:
        return self.all[0]

    @property
    def workers(self) -> list[Node]:
        return self.all[1:]

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{self._head_ports[1]}"

    @property
    def headers(self) -> dict[str, str]:
        """What the dashboard's API wants to see."""
        return {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}

    def start_head(self, cpus: int, resources: Mapping[str, float]) -> None:
        port, dashboard, client = self._head_ports
        node = self._add("head", cpus, resources)
        # A head alone has a machine of its own: what computes must not keep it from coming up in time. With gateways on
        # it, whose imports are seconds of work, it would be the one that keeps all others waiting.
        node.first = not resources
        node.command += [
            "--head", "--port", str(port), "--dashboard-host", node.address, "--dashboard-port", str(dashboard),
            "--ray-client-server-port", str(client), "--include-dashboard", "true",
        ]  # fmt: skip
        node.start()
        self.await_head()

    def add_worker(self, cpus: int, resources: Mapping[str, float], setup: str = "") -> Node:
        """`setup`: shell commands that come before `ray start` and hold for all of the node: limits, mounts."""
        node = self._add(f"worker-{len(self.all)}", cpus, resources)
        if setup:
            node.command = ["sh", "-ec", f'{setup}\nexec "$@"', "sh", *node.command]
        node.command += ["--address", f"{self.head.address}:{self._head_ports[0]}"]
        node.start()
        return node

    def _add(self, name: str, cpus: int, resources: Mapping[str, float]) -> Node:
        index = len(self.all)
        space = self.network.spaces[index] if self.network else None
        address = space.address if space else "127.0.0.1"
        directory = self.directory / name
        directory.mkdir()
        if self._small_disks:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
            if subprocess.run(mount, capture_output=True).returncode:
                raise LocalError("a disk that can be filled is a tmpfs, and mounting one needs root")
        metrics, agent = (8080, 52365) if space else (free_port(), free_port())
        first = 20000 if space else 20000 + WORKER_PORTS * index
        command = [
            *RAY, "start", "--block", "--num-cpus", str(cpus), "--temp-dir", str(directory),
            "--node-ip-address", address, "--metrics-export-port", str(metrics),
            "--dashboard-agent-listen-port", str(agent), "--resources", json.dumps(dict(resources)),
            "--min-worker-port", str(first), "--max-worker-port", str(first + WORKER_PORTS - 1),
            "--object-store-memory", "80000000",
        ]  # fmt: skip
        node = Node(name, address, directory, command, self.environment, space)
        self.metrics.append(f"http://{address}:{metrics}/metrics")
        self.all.append(node)
        return node

    def await_head(self) -> None:
        """Until the head answers. Raises `LocalError` with its last words if it ends instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            process = self.head.process
            if process is None or process.poll() is not None:
                words = (self.directory / "head.log").read_text(errors="replace").strip().splitlines()
                raise LocalError("Ray did not start: " + (words[-1] if words else "it said nothing"))
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.dashboard}/api/version", headers=self.headers, timeout=2).status_code == 200:
                    return
            time.sleep(0.2)
        raise LocalError(f"Ray did not start within {START_TIMEOUT_S:g} s; its words are in {self.directory}/head.log")

    def supervise(self) -> None:
        """Start again what ended by itself, as an init system does: a head may miss its own deadlines at a start."""
        for node in self.all:
            if node.process is not None and node.process.poll() is not None:
                node.kill()  # what is left of it holds its ports
                node.start()

    def serve(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """The `serve` command line against this head."""
        command = [*SERVE, *arguments, "--address", self.dashboard]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def processes(self, word: str = "") -> list[Process]:
        return [found for found in living(self.all) if found.is_a(word)]

    def node_of(self, process: Process) -> Node:
        return next(node for node in self.all if node.name == process.node)

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End everything, at once: told to end together, the nodes would wait for each other."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while living(self.all) and time.monotonic() < deadline:
            for node in reversed(self.all):
                node.kill()
            time.sleep(0.05)
        self._remove()

    def copy_logs(self, to: Path) -> None:
        """Everything that was logged, before it is removed."""
        for node in self.all:
            for logs in node.directory.glob("session_2*/logs"):
                shutil.copytree(
                    logs, to / node.name / logs.parent.name, dirs_exist_ok=True, ignore_dangling_symlinks=True
                )
            shutil.copy(self.directory / f"{node.name}.log", to)

    def _remove(self) -> None:
        for node in self.all if self._small_disks else ():
            subprocess.run(["umount", "--lazy", str(node.directory)], capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)

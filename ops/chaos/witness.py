"""What can be seen from outside of a cluster in trouble: its processes, what it says of itself, and what it logs."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from ops.chaos.nodes import Node, Nodes, Process
from ops.watch.top import scrape

# Kind of process -> a word of its title.
KINDS = {
    "stage": "ray::StageActor",
    "engine": "ray::ServeReplica:caravan:Engine",
    "gateway": "ray::ServeReplica:caravan:Gateway",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
    "haproxy": "haproxy -",
    "gcs": "gcs_server",
    "raylet": "raylet/raylet",
}
OURS = ("stage", "engine", "gateway")
MOVED = re.compile(r"lost its engine|moves on after")
PLACED = re.compile(r"stage (\d+) \(pid (\d+) on .*\): layers .* started and loaded in ([0-9.]+) s")
FINISHED = "request finished"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of our own packages' logs."""

    time: float  # unix seconds
    level: str
    logger: str
    message: str
    pid: int
    fields: dict[str, Any]


@dataclass(slots=True)
class Logs:
    """Follows the error streams of all workers of all nodes, in which our packages log."""

    nodes: Nodes
    lines: list[Line] = field(default_factory=list)
    _read: dict[Path, int] = field(default_factory=dict)

    def follow(self) -> None:
        """Take what is new."""
        fresh: list[Line] = []
        for node in self.nodes.all:
            for file in self._files(node):
                fresh += self._rest(file)
        self.lines += sorted(fresh, key=lambda line: line.time)

    @staticmethod
    def _files(node: Node) -> Iterator[Path]:
        # Every session that the node had: a head that comes back begins a new directory.
        for pattern in ("session_2*/logs/worker-*.err", "session_2*/logs/serve/replica_*.log"):
            yield from node.directory.glob(pattern)

    def _rest(self, file: Path) -> Iterator[Line]:
        with suppress(OSError), file.open("rb") as stream:
            stream.seek(self._read.get(file, 0))
            text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(whole)
            pid = int(digits.group(1)) if (digits := re.search(r"-(\d+)\.err$", file.name)) else 0
            for line in whole.splitlines():
                found = parse_line(line, pid)
                if found is not None:
                    yield found

    def since(self, start: float, until: float = float("inf")) -> list[Line]:
        return [line for line in self.lines if start <= line.time <= until]

    def first_notice(self, start: float) -> Line | None:
        """The first time that one of our processes says that something is wrong."""
        return next((line for line in self.since(start) if line.level in ("WARNING", "ERROR", "CRITICAL")), None)

    def finished_requests(self) -> set[str]:
        """Ids of the requests whose gateway lived to see their end."""
        return {str(line.fields["request_id"]) for line in self.lines if line.message == FINISHED}

    def stays(self) -> dict[str, list["Stay"]]:
        """On which replicas each request was, by its id, in order."""
        found: dict[str, list[Stay]] = {}
        for line in self.lines:
            moved = bool(MOVED.search(line.message))
            if "request_id" in line.fields and (moved or line.message == FINISHED):
                stay = Stay(str(line.fields.get("replica", "")), line.time, moved, line.pid)
                found.setdefault(str(line.fields["request_id"]), []).append(stay)
        return found

    def stages_of(self, engine_pid: int) -> dict[int, int]:
        """Stage number -> pid, as the engine last said."""
        found = (PLACED.search(line.message) for line in self.lines if line.pid == engine_pid)
        return {int(match.group(1)): int(match.group(2)) for match in found if match}

    def replica_of(self, engine_pid: int) -> str:
        """Its id in Serve; empty if it has said nothing yet."""
        said = (line.fields.get("replica") for line in self.lines if line.pid == engine_pid)
        return str(next((replica for replica in said if replica), ""))

    def stage_start(self, start: float, until: float) -> float | None:
        """The longest that a stage took to start and load, of those that came up in this time."""
        found = (PLACED.search(line.message) for line in self.since(start, until))
        return max((float(match.group(3)) for match in found if match), default=None)


@dataclass(frozen=True, slots=True)
class Stay:
    """A request's time on one replica, which began where the stay before ended."""

    replica: str
    until: float  # unix seconds
    moved: bool  # it went on elsewhere, or the request was finished
    gateway: int = 0  # pid of the one that said so


def parse_line(text: bytes, pid: int) -> Line | None:
    """One of our lines (see deployments/logs.py), or None."""
    if not text.startswith(b'{"time"'):
        return None
    try:
        entry = json.loads(text)
        stamp = datetime.strptime(entry.pop("time"), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
        head = (entry.pop("level"), entry.pop("logger"), entry.pop("message"))
    except (ValueError, KeyError):
        return None
    return Line(stamp.timestamp(), *head, pid, entry)


@dataclass(frozen=True, slots=True)
class Ready:
    """What /ready said."""

    answered: bool
    ready: bool = False
    states: tuple[str, ...] = ()  # of the replicas
    reason: str = ""

    @property
    def serving(self) -> int:
        return self.states.count("ready")


def ask_ready(url: str, timeout: float = 2.0) -> Ready:
    try:
        body = httpx.get(f"{url}/ready", timeout=timeout).json()
        states = tuple(str(replica["state"]) for replica in body["replicas"])
        return Ready(True, bool(body["ready"]), states, str(body["reason"]))
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return Ready(False)


def census(processes: Sequence[Process]) -> Counter[str]:
    """How many processes there are of each kind."""
    return Counter(kind for found in processes for kind, word in KINDS.items() if found.is_a(word))


def of_kind(processes: Sequence[Process], kind: str) -> list[Process]:
    return [found for found in processes if found.is_a(KINDS[kind])]


def placement_groups(nodes: Nodes) -> int | None:
    """Placement groups that hold or want resources; None if the head does not say."""
    try:
        url = f"{nodes.dashboard}/api/v0/placement_groups"
        answer = httpx.get(url, headers=nodes.headers, timeout=10).json()
        groups = answer["data"]["result"]["result"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return sum(1 for group in groups if group["state"] != "REMOVED")


def kv_blocks_in_use(nodes: Nodes) -> float:
    """Of the replicas that report now."""
    total = 0.0
    for url in nodes.metrics:
        with suppress(httpx.HTTPError):  # of a node that is dead
            total += sum(value for (name, _), value in scrape(url).items() if name == "kv_blocks_used")
    return total


def listening_ports(processes: Sequence[Process]) -> int:
    """TCP ports on which our own processes (gateways, engines, stages) listen."""
    count = 0
    for found in processes:
        if any(found.is_a(KINDS[kind]) for kind in OURS):
            with suppress(OSError):
                count += len(_listening_sockets(found.pid) & _sockets(found.pid))
    return count


def _listening_sockets(pid: int) -> set[str]:
    """Inodes of listening sockets in the network that the process sees."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A":  # LISTEN
                found.add(parts[9])
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = str(descriptor.readlink())
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def await_true(condition: Any, timeout: float, period: float = 0.2) -> float | None:
    """Seconds until `condition()` held, or None if it never did."""
    started = time.monotonic()
    while time.monotonic() - started < timeout:
        if condition():
            return time.monotonic() - started
        time.sleep(period)
    return None

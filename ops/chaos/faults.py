"""What can be broken, and how: every fault picks its victim with the given randomness and says what it did."""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ops.chaos.namespaces import Link
from ops.chaos.nodes import DISK_BYTES, Node, Process
from ops.chaos.service import Service
from ops.chaos.witness import census, of_kind

SLOW_LINK = Link(loss=0.05, delay_s=0.1)


class NoVictim(Exception):
    """This fault cannot be made here and now; the message says why."""


@dataclass(slots=True)
class Fault:
    """One fault that was made. `undo` ends what does not end by itself."""

    kind: str
    target: str
    at: float = field(default_factory=time.time)  # unix seconds
    undo: Callable[[], None] | None = None
    victims: Sequence[int] = ()  # pids that must be gone before all is well again
    stopped: int = 0  # pid that does nothing until `undo`, unless it is ended before
    pipelines: frozenset[str] = frozenset()  # replicas that it hits
    gateway: int = 0  # pid of one whose streams it hits
    kept: Sequence[int] = ()  # pids that it may not cost
    cuts_clients: str = ""  # url whose connections it breaks, or "gateway": those of one gateway


Injector = Callable[[Service, random.Random], Fault]


def pick(service: Service, kind: str, rng: random.Random) -> Process:
    """A random living process of this kind."""
    processes = service.nodes.processes()
    found = sorted(of_kind(processes, kind), key=lambda process: process.pid)
    if kind == "stage":  # no spare: nobody would notice
        service.logs.follow()
        at_work = {pid for e in of_kind(processes, "engine") for pid in service.logs.stages_of(e.pid).values()}
        found = [stage for stage in found if stage.pid in at_work]
    if not found:
        raise NoVictim(f"no {kind} is running")
    return rng.choice(found)


def _signal(victim: Process, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(victim.pid, number)


def kill(kind: str, cuts_clients: str = "") -> Injector:
    """kill -9 of a random process of this kind."""

    def inject(service: Service, rng: random.Random) -> Fault:
        victim = pick(service, kind, rng)
        url = _url_of(service, victim) if cuts_clients == "url" else cuts_clients
        hit = service.pipelines_with({victim.pid})
        at = time.time()
        _signal(victim, signal.SIGKILL)
        where = f"pid {victim.pid} on {victim.node}"
        return Fault(kind, where, at, victims=[victim.pid], pipelines=hit, cuts_clients=url)

    return inject


def _url_of(service: Service, victim: Process) -> str:
    address = next(node.address for node in service.nodes.all if node.name == victim.node)
    return next((url for url in service.doors if f"//{address}:" in url), service.doors[0])


def stop(kind: str) -> Injector:
    """SIGSTOP: the process is there, its connections are open, and it does nothing."""

    def inject(service: Service, rng: random.Random) -> Fault:
        victim = pick(service, kind, rng)
        hit = service.pipelines_with({victim.pid})
        at = time.time()
        _signal(victim, signal.SIGSTOP)
        target = f"pid {victim.pid} on {victim.node}"
        go_on = lambda: _signal(victim, signal.SIGCONT)  # noqa: E731
        return Fault(f"{kind}-stop", target, at, go_on, stopped=victim.pid, pipelines=hit)

    return inject


def stop_gateway(service: Service, rng: random.Random) -> Fault:
    """SIGSTOP of a gateway: its streams pause, those of others do not, and nothing that computes is replaced."""
    victim = pick(service, "gateway", rng)
    kept = [p.pid for kind in ("engine", "stage") for p in of_kind(service.nodes.processes(), kind)]
    at = time.time()
    _signal(victim, signal.SIGSTOP)
    target = f"pid {victim.pid} on {victim.node}"
    go_on = lambda: _signal(victim, signal.SIGCONT)  # noqa: E731
    return Fault("gateway-stop", target, at, go_on, stopped=victim.pid, gateway=victim.pid, kept=kept)


def kill_node(service: Service, rng: random.Random) -> Fault:
    """All processes of a worker node that carries a part of a pipeline; its machine is replaced at once."""
    victim, pids = _carrier(service, rng)
    hit = service.pipelines_with(pids)
    at = time.time()
    victim.kill()
    victim.start()  # an empty machine takes its place
    return Fault("node", victim.name, at, victims=[*pids], pipelines=hit)


def drain_node(service: Service, rng: random.Random) -> Fault:
    """SIGTERM to such a node; its machine is replaced once it has ended."""
    victim, pids = _carrier(service, rng)
    hit = service.pipelines_with(pids)
    at = time.time()
    victim.drain()
    return Fault("drain", victim.name, at, victims=[*pids], pipelines=hit)


def _carrier(service: Service, rng: random.Random) -> tuple[Node, set[int]]:
    """A random worker node that carries a part of a pipeline and no gateway, and its processes."""
    carriers = {p.node for kind in ("engine", "stage") for p in of_kind(service.nodes.processes(), kind)}
    fronts = {p.node for p in of_kind(service.nodes.processes(), "gateway")}
    found = rng.choice([n for n in service.nodes.workers if n.name in carriers - fronts] or _none("node to spare"))
    return found, {p.pid for p in service.nodes.processes() if p.node == found.name}


def _none(what: str) -> list[Node]:
    raise NoVictim(f"there is no {what}")


def kill_head(service: Service, rng: random.Random) -> Fault:
    """The head with the GCS, the dashboard and Serve's controller; it comes back after 2 s at the same address."""
    head = service.nodes.head
    pids = [p.pid for p in service.nodes.processes() if p.node == head.name]
    at = time.time()
    head.kill()
    time.sleep(2)
    head.start()
    url = "" if service.setting.gateways_on_workers else service.urls[0]
    return Fault("head", head.name, at, victims=pids, cuts_clients=url)


def _two_stages(service: Service, rng: random.Random) -> tuple[Node, Node, frozenset[str]]:
    """The nodes of the two stages of a random pipeline, and the pipelines that have their stages on both."""
    service.logs.follow()
    alive = {p.pid: p for p in of_kind(service.nodes.processes(), "stage")}
    for engine in rng.sample(engines := of_kind(service.nodes.processes(), "engine"), len(engines)):
        pids = service.logs.stages_of(engine.pid)
        nodes = [service.nodes.node_of(alive[pid]) for pid in pids.values() if pid in alive]
        if len(nodes) == 2 and nodes[0] is not nodes[1]:
            on = [{p.pid for p in alive.values() if p.node == node.name} for node in nodes]
            return nodes[0], nodes[1], service.pipelines_with(on[0]) & service.pipelines_with(on[1])
    raise NoVictim("no pipeline has its stages on two nodes")


def impair(kind: str, link: Link) -> Injector:
    """Spoil the network between the nodes of two stages."""

    def inject(service: Service, rng: random.Random) -> Fault:
        network = service.nodes.network
        if network is None:
            raise NoVictim("only hosts with namespaces have a network to spoil: --hosts namespaces")
        one, two, hit = _two_stages(service, rng)
        assert one.space is not None
        assert two.space is not None
        a, b = one.space.port, two.space.port
        at = time.time()
        network.set_link(a, b, link)
        return Fault(kind, f"{one.name} - {two.name}", at, lambda: network.heal(a, b), pipelines=hit)

    return inject


def fill_disk(service: Service, rng: random.Random) -> Fault:
    """The file system with the logs and sockets of a node that carries a pipeline."""
    if not service.setting.small_disks:
        raise NoVictim("only hosts with small disks have one to fill: --small-disks")
    node = service.nodes.node_of(pick(service, "engine", rng))
    filler = node.directory / "filler"
    at = time.time()
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // 1_000_000 + 2):
            file.write(bytes(1_000_000))
    return Fault("disk-full", node.name, at, lambda: filler.unlink(missing_ok=True))


def roll_out(service: Service, rng: random.Random) -> Fault:
    """`serve deploy` of a changed configuration: every replica is replaced."""
    gateway = service.config["applications"][0]["args"]["gateway"]
    gateway["max_body_bytes"] = gateway.get("max_body_bytes", 8_000_000) + 1
    pids = [p.pid for kind in ("engine", "gateway") for p in of_kind(service.nodes.processes(), kind)]
    at = time.time()
    service.deploy()
    return Fault("rollout", "serve deploy of a changed configuration", at, victims=pids)


def scale(service: Service, rng: random.Random) -> Fault:
    """One pipeline more, or one less, in turn."""
    engine = next(d for d in service.config["applications"][0]["deployments"] if d["name"] == "Engine")
    count = 1 if census(service.nodes.processes())["engine"] > 1 else 2
    engine["autoscaling_config"] = {"min_replicas": count, "max_replicas": count}
    at = time.time()
    service.deploy()
    return Fault("scale", f"to {count} pipelines", at)


INJECTORS: dict[str, Injector] = {
    "stage": kill("stage"),
    "engine": kill("engine"),
    "node": kill_node,
    "drain": drain_node,
    "stage-stop": stop("stage"),
    "engine-stop": stop("engine"),
    "gateway-stop": stop_gateway,
    "partition": impair("partition", Link(loss=1.0)),
    "slow-link": impair("slow-link", SLOW_LINK),
    "disk-full": fill_disk,
    "gateway": kill("gateway", cuts_clients="gateway"),
    "controller": kill("controller"),
    "proxy": kill("proxy", cuts_clients="url"),
    "haproxy": kill("haproxy", cuts_clients="url"),
    "head": kill_head,
    "rollout": roll_out,
    "scale": scale,
}

"""From what nodes say of themselves to what is wrong, each with its remedy. Pure: knows no cluster."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.stages.gpu_guard import OWN_BYTES
from ops.preflight.facts import NodeFacts
from ops.preflight.links import LinkFigures

Check = Literal[
    "node", "interface", "version", "gpu", "memory", "limit", "shm", "port", "weights", "clock", "link", "place"
]  # in the order in which they are shown
OURS = ("ray::ProxyActor", "ray::HAProxy", "haproxy")  # who may hold Serve's ports: the service as it runs now


@dataclass(frozen=True, slots=True)
class Needs:
    """What a configuration asks of every node that gets one of its stages."""

    gpus: int = 0  # of one stage
    gpu_bytes: int = 0  # of one of them, for weights and the least cache
    host_bytes: int = 0  # of one stage on a CPU
    open_files: int = 8192  # a connection for every stream, and those between all processes
    processes: int = 4096
    shm_bytes: int = 512_000_000  # Ray's object store and NCCL; a container gets 64 MB unless it is asked for more
    skew_s: float = 0.5  # between clocks: logs and metrics of several nodes are read side by side
    round_trip_s: float = 0.005
    bytes_per_s: float = 0.0  # between stages


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    check: Check
    node: str  # its address; two for a link; empty for the cluster
    problem: str
    remedy: str


def judge_nodes(facts: Mapping[str, NodeFacts], needs: Needs, ports: Mapping[int, str]) -> Iterator[Finding]:
    """Each node by itself, then all beside each other; the first one is the head, which is right when opinions tie."""
    for node, own in facts.items():
        yield from _interface(node, own, alone=len(facts) == 1)
        yield from _gpus(node, own, needs)
        yield from _limits(node, own, needs)
        yield from _ports(node, own, ports)
        yield from _weights(node, own)
    yield from _versions(facts)
    yield from _odd_ones(
        "interface", {node: str(own.mtu) for node, own in facts.items() if own.mtu and own.interface != "lo"},
        "its interface's MTU is {mine}, elsewhere {theirs}: large packets vanish",
        "ip link set dev INTERFACE mtu {theirs}",
    )  # fmt: skip
    yield from _contents(facts)


def _interface(node: str, own: NodeFacts, alone: bool) -> Iterator[Finding]:
    if own.interface_problem:
        yield Finding(
            "interface", node, own.interface_problem,
            "name one that every node has in pipeline.network_interface, or leave it out; "
            "start Ray with --node-ip-address",
        )  # fmt: skip
    elif own.interface == "lo" and not alone:
        yield Finding(
            "interface", node, f"stages would use {own.address}, which other nodes cannot reach",
            "start Ray there with --node-ip-address and the node's address in the cluster's network",
        )  # fmt: skip


def _gpus(node: str, own: NodeFacts, needs: Needs) -> Iterator[Finding]:
    if needs.gpus == 0:
        return
    if not own.gpus:
        return  # a node for gateways; whether there is a place for all stages is asked of Ray
    for gpu in own.gpus:
        holders = [holder for holder in own.gpu_holders if holder.gpu_uuid == gpu.uuid]
        is_serving = bool(holders) and all(holder.name.startswith("ray::") for holder in holders)
        if gpu.used_mb * 2**20 > OWN_BYTES and not is_serving:
            names = ", ".join(map(str, holders)) or "a process that is not visible from there"
            yield Finding(
                "gpu", node, f"{gpu.name} {gpu.uuid[:12]} is not free: {gpu.used_mb:,} MB are held by {names}",
                "end it, or keep Ray off this GPU (CUDA_VISIBLE_DEVICES before ray start)",
            )  # fmt: skip
        if gpu.total_mb * 2**20 < needs.gpu_bytes:
            yield Finding(
                "gpu", node, f"{gpu.name} has {gpu.total_mb * 2**20 / 1e9:.0f} GB, "
                f"a stage needs {needs.gpu_bytes / 1e9:.0f} GB of each of its GPUs",
                "more stages, model.quantization: fp8, or larger GPUs",
            )  # fmt: skip


def _limits(node: str, own: NodeFacts, needs: Needs) -> Iterator[Finding]:
    if own.memory_bytes < needs.host_bytes:
        yield Finding(
            "memory", node, f"{own.memory_bytes / 1e9:.1f} GB of memory are free, a stage needs "
            f"{needs.host_bytes / 1e9:.1f} GB", "end what holds it, lower cache.memory_gb, or use more stages",
        )  # fmt: skip
    if own.open_files < needs.open_files:
        yield Finding(
            "limit", node, f"a process may open {own.open_files} files, {needs.open_files} are needed",
            "ulimit -n 65536 before ray start (LimitNOFILE= of a systemd unit, --ulimit nofile= of a container)",
        )  # fmt: skip
    if own.processes < needs.processes:
        yield Finding(
            "limit", node, f"its user may have {own.processes} threads, {needs.processes} are needed",
            "ulimit -u 65536 before ray start (LimitNPROC= of a systemd unit)",
        )  # fmt: skip
    if own.shm_bytes < needs.shm_bytes:
        yield Finding(
            "shm", node, f"/dev/shm has {own.shm_bytes / 1e6:.0f} MB, {needs.shm_bytes / 1e6:.0f} MB are needed",
            "--shm-size of a container, an emptyDir with medium: Memory at /dev/shm in Kubernetes, "
            "or mount -o remount,size=8G /dev/shm",
        )  # fmt: skip


def _ports(node: str, own: NodeFacts, ports: Mapping[int, str]) -> Iterator[Finding]:
    for port, who in own.taken_ports.items():
        if not any(name in who for name in OURS):
            yield Finding(
                "port", node, f"port {port}, for {ports[port]}, is taken by {who}", "end it, or choose another port"
            )


def _weights(node: str, own: NodeFacts) -> Iterator[Finding]:
    if own.weights.problem:
        yield Finding("weights", node, own.weights.problem, "put the checkpoint there, as it is on the other nodes")
    for stage, why in own.weights.missing.items():
        yield Finding(
            "weights", node, f"stage {stage}: {why}", "copy the file there: Ray may put any stage on any node"
        )


def _versions(facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    for name in dict.fromkeys(name for own in facts.values() for name in own.versions):
        yield from _odd_ones(
            "version", {node: own.versions[name] for node, own in facts.items() if name in own.versions},
            name + " is {mine}, elsewhere {theirs}", "install what requirements.lock says, the same on every node",
        )  # fmt: skip


def _contents(facts: Mapping[str, NodeFacts]) -> Iterator[Finding]:
    """Files that several nodes have are the same."""
    told = {node for node, own in facts.items() if own.weights.problem or own.weights.missing}
    for name in dict.fromkeys(name for own in facts.values() for name in own.weights.digests):
        held = {node: own.weights.digests[name] for node, own in facts.items() if name in own.weights.digests}
        for found in _odd_ones(
            "weights", held, name + " is not what other nodes have", "copy it again from a sound node"
        ):
            if found.node not in told:
                yield found


def _odd_ones(check: Check, said: Mapping[str, str], problem: str, remedy: str) -> Iterator[Finding]:
    """The nodes that differ from most, or from the first where there is no most."""
    counts = Counter(said.values())
    if len(counts) < 2:
        return
    usual = max(counts, key=lambda value: counts[value])  # the first of equals, and dictionaries keep their order
    for node, value in said.items():
        if value != usual:
            words = {"mine": value, "theirs": usual}
            yield Finding(check, node, problem.format(**words), remedy.format(**words))


def judge_clocks(offsets: Mapping[str, tuple[float, float]], needs: Needs) -> Iterator[Finding]:
    """`offsets`: seconds that a node's clock is ahead, and how far from the truth that may be."""
    middle = sorted(offset for offset, _ in offsets.values())[(len(offsets) - 1) // 2] if offsets else 0.0
    for node, (offset, doubt) in offsets.items():
        if abs(offset - middle) - doubt > needs.skew_s:
            yield Finding(
                "clock", node, f"its clock is {abs(offset - middle):.1f} s {'ahead' if offset > middle else 'behind'}",
                "let chrony or systemd-timesyncd set it",
            )  # fmt: skip


def judge_link(ends: tuple[str, str], figures: LinkFigures | str, needs: Needs) -> Iterator[Finding]:
    """Between two nodes."""
    between = " - ".join(ends)
    if isinstance(figures, str):
        yield Finding(
            "link", between, f"stages cannot reach each other: {figures}",
            "open all TCP ports between the nodes of the cluster (ops/SECURITY.md lists them)",
        )  # fmt: skip
        return
    if figures.round_trip_s > needs.round_trip_s:
        yield Finding(
            "link", between, f"a round trip takes {1e3 * figures.round_trip_s:.1f} ms by {figures.kind}, at most "
            f"{1e3 * needs.round_trip_s:g} ms are good for a pipeline",
            "put stages into one network; every token of a stream waits for it once a stage",
        )  # fmt: skip
    if figures.bytes_per_s < needs.bytes_per_s:
        yield Finding(
            "link", between, f"{8 * figures.bytes_per_s / 1e9:.2f} Gbit/s by {figures.kind}, the batches of this "
            f"configuration want {8 * needs.bytes_per_s / 1e9:.2f}",
            "a faster interface in pipeline.network_interface, or fewer stages",
        )  # fmt: skip


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    order = list(Check.__args__)  # type: ignore[attr-defined]
    return sorted(findings, key=lambda found: (order.index(found.check), found.node))

"""What one node says of itself: gathered there, judged elsewhere (`checks.py`)."""

import hashlib
import os
import platform
import resource
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.stages.gpu_guard import Holder, holders
from cluster.transport import interface_address
from deployments.fingerprint import code_digest, samples
from model.config import split_layers
from model.weights import MANIFEST, SHAPE, open_checkpoint, read_config, resolve_path
from ops.sockets import LISTENING, sockets

# What stages, engines and gateways exchange, or compute with: another version of it is another answer, or none.
PACKAGES = ("ray", "torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "pyzmq", "msgspec", "xgrammar")
GPU_QUERY = (
    "nvidia-smi",
    "--query-gpu=uuid,name,memory.total,memory.used,driver_version",
    "--format=csv,noheader,nounits",
)
READ_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Question:
    """What every node is asked."""

    model_path: str | None  # None: weights are made up
    stages: int
    split: list[int] | None
    checksums: bool  # read all weights, or samples of them
    ports: Mapping[int, str]  # port -> what is to listen there
    interface: str | None  # the configuration's


@dataclass(frozen=True, slots=True)
class Gpu:
    """One, as nvidia-smi sees it."""

    uuid: str
    name: str
    total_mb: int
    used_mb: int
    driver: str


@dataclass(frozen=True, slots=True)
class Weights:
    """The checkpoint on this node."""

    problem: str | None = None  # that concerns all of it
    missing: Mapping[int, str] = field(default_factory=dict)  # stage -> why its weights cannot be read here
    digests: Mapping[str, str] = field(default_factory=dict)  # file -> of its content, or of samples of it


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Everything that `checks.py` judges of one node."""

    interface: str | None  # that carries traffic between stages
    address: str | None  # of it
    interface_problem: str | None
    mtu: int
    versions: Mapping[str, str]
    gpus: Sequence[Gpu]
    gpu_holders: Sequence[Holder]
    memory_bytes: int  # that processes may still take
    shm_bytes: int
    open_files: int
    processes: int
    taken_ports: Mapping[int, str]  # port -> by whom
    weights: Weights


def gather(node_address: str, question: Question) -> NodeFacts:
    """All of them, of the node whose address in Ray is `node_address`."""
    interface, address, problem = _interface(node_address, question.interface)
    gpus = _gpus()
    shm = os.statvfs("/dev/shm")
    return NodeFacts(
        interface=interface,
        address=address,
        interface_problem=problem,
        mtu=_mtu(interface),
        versions={**_versions(), **({"GPU driver": gpus[0].driver} if gpus else {})},
        gpus=gpus,
        gpu_holders=holders() if gpus else [],
        memory_bytes=_available_bytes(),
        shm_bytes=shm.f_frsize * shm.f_blocks,
        open_files=_limit(resource.RLIMIT_NOFILE),
        processes=_limit(resource.RLIMIT_NPROC),
        taken_ports={port: who for port in question.ports if (who := _listener(port)) is not None},
        weights=_weights(question),
    )


def _interface(node_address: str, wanted: str | None) -> tuple[str | None, str | None, str | None]:
    """Name and address of the one that stages use here, or why there is none."""
    if wanted is not None:
        try:
            return wanted, interface_address(wanted), None
        except ValueError as error:
            return None, None, str(error)
    for _, name in socket.if_nameindex():
        with suppress(ValueError):
            if interface_address(name) == node_address:
                return name, node_address, None
    return None, node_address, f"no interface has the address {node_address} by which Ray knows this node"


def _mtu(interface: str | None) -> int:
    try:
        return int(Path(f"/sys/class/net/{interface}/mtu").read_text())
    except OSError:
        return 0


def _versions() -> dict[str, str]:
    import torch

    found = {"Python": platform.python_version(), "CUDA of torch": str(torch.version.cuda or "none")}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "caravan": code_digest()[:12]}


def _gpus() -> list[Gpu]:
    try:
        done = subprocess.run(GPU_QUERY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(done.stdout)


def parse_gpus(listing: str) -> list[Gpu]:
    """nvidia-smi's lines `uuid, name, MiB, MiB, driver`."""
    found = []
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and parts[2].isdigit() and parts[3].isdigit():
            found.append(Gpu(parts[0], parts[1], int(parts[2]), int(parts[3]), parts[4]))
    return found


def _available_bytes() -> int:
    """Of the machine, or of the container if that gets less."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def _limit(kind: int) -> int:
    """The hard one, to which Ray raises its own; a large number if there is none."""
    _, hard = resource.getrlimit(kind)
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def _listener(port: int) -> str | None:
    """Who listens on a TCP port of this node; None if nobody does."""
    inodes = set(sockets(port, LISTENING))
    if not inodes:
        return None
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with suppress(OSError):
                for descriptor in (process / "fd").iterdir():
                    with suppress(OSError):
                        if os.readlink(descriptor).removeprefix("socket:[").rstrip("]") in inodes:
                            title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                            return f"pid {process.name} ({title.strip()[:60]})"
    return "a process of somebody else"


def _weights(question: Question) -> Weights:
    if question.model_path is None or question.model_path.startswith(SHAPE):
        return Weights()
    try:
        path = resolve_path(question.model_path)
        parts = split_layers(read_config(path), question.stages, question.split)
        checkpoint = open_checkpoint(path)
    except (ValueError, OSError) as error:
        return Weights(problem=str(error))
    missing = {}
    for i, part in enumerate(parts):
        names = part.tensor_names(checkpoint.config)
        try:
            checkpoint.nbytes(names)
            if question.checksums and (path / MANIFEST).is_file():
                for _ in checkpoint.tensors(names):  # each is compared with its sha256 as it is read
                    pass
        except (ValueError, OSError) as error:
            missing[i] = str(error)
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    return Weights(missing=missing, digests={f.name: _digest(f, question.checksums) for f in files})


def _digest(file: Path, whole: bool) -> str:
    digest = hashlib.sha256()
    if whole:
        with file.open("rb") as opened:
            while part := opened.read(READ_BYTES):
                digest.update(part)
    else:
        for part in samples(file):
            digest.update(part)
    return digest.hexdigest()[:16]


def clock() -> float:
    """Of this node, in seconds since 1970."""
    return time.time()

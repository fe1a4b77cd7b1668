"""What `system_fingerprint` says: equal seeds give equal answers as long as it stays the same."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cluster
import model
from cluster.config import EngineConfig
from deployments.config import AppConfig
from model.weights import SHAPE, resolve_path

SAMPLES, SAMPLE_BYTES = 32, 65_536  # of each file: reading all of 140 GB at every start would not do

LIBRARIES = ("torch", "triton", "tokenizers", "sentencepiece", "xgrammar")  # that compute, or say what a text is
CHANGES_NO_TOKEN = {
    "model": {
        "path", "name", "aliases", "adapters", "adapter_dir", "max_loaded_adapters", "max_adapter_rank",
        "max_host_adapters",
    },  # of the path, what is there counts
    "pipeline": {
        "step_timeout_s", "hang_timeout_s", "recovery_attempts", "spare", "start_timeout_s", "link",
        "network_interface",
    },
    "cache": {"memory_gb", "memory_fraction"},
    "scheduler": {"max_num_seqs", "policy"},
    "speculation": {"proposer", "tokens"},
}  # fmt: skip


def fingerprint(config: AppConfig) -> str:
    """A hash of the weights, of the code that computes, and of how the model is laid out.

    A key of the engine's configuration counts unless it is known to change no token: block sizes, chunks and threads
    decide in which order numbers are added.
    Of each weight file its size and samples of its content count, not its name or date: it is the same on every node.
    """
    layout = config.model_dump(mode="json", include=set(EngineConfig.model_fields), exclude=CHANGES_NO_TOKEN)
    parts = [json.dumps(layout, sort_keys=True), *_libraries(), code_digest(), _weights(config.model.path)]
    return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def with_adapter(base: str, digest: str) -> str:
    """The same of answers that an adapter has a part in."""
    return "fp_" + hashlib.sha256(f"{base} {digest}".encode()).hexdigest()[:12]


def _libraries() -> Iterator[str]:
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


@cache
def code_digest() -> str:
    """Of the packages that decide what is computed."""
    digest = hashlib.sha256()
    for package in (model, cluster):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def _weights(path: str) -> str:
    found = resolve_path(path)
    if str(found).startswith(SHAPE):
        return path
    files = [found]
    if (found / "manifest.json").is_file():  # holds every tensor's checksum; a node has only some of the files
        files = [found / "manifest.json"]
    elif found.is_dir():
        files = sorted(f for f in found.iterdir() if f.is_file())
    digest = hashlib.sha256()
    for file in files:
        for part in samples(file):
            digest.update(part)
    return digest.hexdigest()


def samples(file: Path) -> Iterator[bytes]:
    """The size, and pieces from everywhere in the file."""
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as opened:
        for i in range(SAMPLES):
            opened.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            yield opened.read(SAMPLE_BYTES)

"""What `system_fingerprint` says: equal seeds give equal answers as long as it stays the same."""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import cluster
import model
from deployments.config import AppConfig
from model.weights import SHAPE, resolve_path

SAMPLES, SAMPLE_BYTES = 32, 65_536  # of each file: reading all of 140 GB at every start would not do


def fingerprint(config: AppConfig) -> str:
    """A hash of the weights, of the code that computes, and of how the model is laid out.

    Of each weight file its size and samples of its content count, not its name or date: it is the same on every node.
    """
    pipeline = config.pipeline
    layout = {
        "model": config.model.model_dump(exclude={"path", "name"}),
        "pipeline": {"stages": pipeline.stages, "split": pipeline.split, "device": pipeline.device},
    }
    parts = [json.dumps(layout, sort_keys=True), _code(), _weights(config.model.path)]
    return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


@cache
def _code() -> str:
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
        for part in _samples(file):
            digest.update(part)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """The size, and pieces from everywhere in the file."""
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as opened:
        for i in range(SAMPLES):
            opened.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            yield opened.read(SAMPLE_BYTES)

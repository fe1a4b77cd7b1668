"""Where stages may run: what Ray is asked for, what is refused before it is asked, and a cluster that obeys."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.config import read_model
from cluster.sizing import GPU_BYTES, smallest_that_fits, stage_sizes
from deployments.check import check_file
from deployments.config import parse_app_config
from deployments.placement import bundles, first_stage, options
from ops.chaos.nodes import Nodes


def args(**sections: dict[str, Any]) -> dict[str, Any]:
    model = {"path": "shape:llama-2-70b", "name": "test", "load_format": "dummy"}
    given = {"pipeline": {"stages": 2}, **sections}
    return {**given, "model": {**model, **given.get("model", {})}}


def problems(tmp_path: Path, arguments: dict[str, Any], override: dict[str, Any] | None = None, gpu: str = "") -> str:
    application = {"name": "caravan", "import_path": "deployments.app:build", "args": arguments}
    if override is not None:
        application["deployments"] = [{"name": "Engine", **override}]
    file = tmp_path / "service.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    return "\n".join(check_file(file, gpu=gpu or None))


def test_what_ray_is_asked_for() -> None:
    plain = parse_app_config(args())
    assert bundles(plain) == [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert "placement_group_bundle_label_selector" not in options(plain)
    chosen = {"accelerator_type": "H200", "node_labels": {"pool": "chat"}, "placement": "SPREAD"}
    asked = options(parse_app_config(args(resources=chosen)))
    assert asked["placement_group_bundles"][1] == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H200": 0.001}
    assert asked["placement_group_bundle_label_selector"] == [{}, {"pool": "chat"}, {"pool": "chat"}]
    assert asked["placement_group_strategy"] == "SPREAD"
    whole_nodes = parse_app_config(
        args(pipeline={"stages": 2, "tensor_parallel": 8}, resources={"placement": "STRICT_SPREAD", "engine_cpus": 2.0})
    )
    # The engine is in the first stage's bundle: else it would want a node of its own.
    assert bundles(whole_nodes) == [{"CPU": 3.0, "GPU": 8.0}, {"CPU": 1.0, "GPU": 8.0}]
    assert (first_stage(whole_nodes), options(whole_nodes)["ray_actor_options"]) == (0, {"num_cpus": 0})


@pytest.mark.parametrize(
    ("stages", "gpu", "quantization", "said"),
    [
        (
            1,
            "H200",
            "none",
            ["an H200 has 151", "pipeline.stages: 2 or pipeline.stages: 1 with model.quantization"],
        ),
        (2, "H200", "none", []),
        (1, "H200", "fp8", []),
        (1, "A100-40G", "none", ["pipeline.stages: 4 or pipeline.stages: 2 with"]),
        (2, "L4", "fp8", ["an L4 has 24", "What fits: pipeline.stages: 4"]),
        (1, "", "none", []),  # a B300 would do
    ],
)
def test_arithmetic(stages: int, gpu: str, quantization: str, said: list[str], tmp_path: Path) -> None:
    arguments = args(model={"quantization": quantization}, pipeline={"stages": stages})
    for given in ({"gpu": gpu}, {}):
        if not given:  # the configuration itself says which GPU
            arguments["resources"] = {"accelerator_type": gpu} if gpu else {}
        found = problems(tmp_path, arguments, **given)
        assert all(words in found for words in said), found
        assert bool(said) == bool(found)


def test_what_is_said_to_fit_does(tmp_path: Path) -> None:
    for gpu, size in GPU_BYTES.items():
        config = parse_app_config(args())
        stages = smallest_that_fits(config, read_model(config.model), size)
        assert stages is not None
        assert problems(tmp_path, args(pipeline={"stages": stages}), gpu=gpu) == ""
        if stages > 1:
            assert "What fits" in problems(tmp_path, args(pipeline={"stages": stages - 1}), gpu=gpu)


@pytest.mark.parametrize(
    ("quantization", "stages", "fraction", "measured"),
    [("none", 2, 0.92, 400_544), ("fp8", 1, 0.92, 209_920), ("fp8", 2, 0.92, 613_000)],
)
def test_room_in_the_cache_is_what_an_h200_had(quantization: str, stages: int, fraction: float, measured: int) -> None:
    """kv_tokens of ops/results/gpu-70b-*-2026-11-28.json: 5 % either way."""
    config = parse_app_config(
        args(
            model={"quantization": quantization}, pipeline={"stages": stages}, cache={"memory_fraction": fraction},
            scheduler={"max_num_seqs": 512, "max_num_batched_tokens": 512},
        )
    )  # fmt: skip
    rooms = [size.kv_tokens(GPU_BYTES["H200"], fraction) for size in stage_sizes(config, read_model(config.model))]
    assert min(rooms) == pytest.approx(measured, rel=0.05)


def test_overrides_that_break_placement_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, args(), {"placement_group_bundles": [{"CPU": 1}] + [{"CPU": 1, "GPU": 1}] * 2}) == ""
    few = problems(tmp_path, args(), {"placement_group_bundles": [{"CPU": 1}, {"CPU": 1, "GPU": 1}]})
    assert "deployments[0].placement_group_bundles: has 2 bundles, 3 are needed" in few
    poor = problems(tmp_path, args(), {"placement_group_bundles": [{"CPU": 1}, {"CPU": 1}, {"CPU": 1, "GPU": 1}]})
    assert "placement_group_bundles[1]: has 0 GPUs, stage 0 needs 1" in poor


def test_a_checkpoint_that_is_elsewhere(tmp_path: Path) -> None:
    arguments = args(model={"path": "/nowhere/llama", "load_format": "auto"})
    assert "there is no /nowhere/llama" in problems(tmp_path, arguments)
    assert check_file(tmp_path / "service.yaml", files=False) == []
    arguments["pipeline"]["stagse"] = 2
    problems(tmp_path, arguments)
    assert "stagse" in check_file(tmp_path / "service.yaml", files=False)[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_puts_each_stage_on_a_node_of_its_own_with_the_label(tmp_path: Path) -> None:
    port = 8123
    arguments = {
        "model": {"path": "shape:test-1m", "name": "test", "load_format": "dummy", "dtype": "float32"},
        "pipeline": {"stages": 2, "device": "cpu"},
        "cache": {"memory_gb": 0.05},
        "resources": {
            "gateway_cpus": 0.1, "engine_cpus": 0.2, "stage_cpus": 0.4, "placement": "STRICT_SPREAD",
            "node_labels": {"pool": "chat"},
        },
    }  # fmt: skip
    application = {"name": "caravan", "route_prefix": "/", "import_path": "deployments.app:build", "args": arguments}
    file = tmp_path / "service.yaml"
    options_ = {"host": "127.0.0.1", "port": port}
    file.write_text(yaml.safe_dump({"http_options": options_, "applications": [application]}))
    assert check_file(file) == []
    with Nodes() as nodes:
        nodes.start_head(2, {})
        nodes.add_worker(2, {})  # without the label: no stage may be here
        for _ in range(2):
            worker = nodes.add_worker(2, {})
            worker.kill()
            worker.command += ["--labels", "pool=chat"]
            worker.start()
        assert nodes.serve("deploy", str(file)).returncode == 0
        deadline = time.monotonic() + 240
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert time.monotonic() < deadline, nodes.serve("status").stdout
            time.sleep(1)
        stages = [nodes.node_of(found).name for found in nodes.processes("StageActor")]
    assert sorted(stages) == ["worker-2", "worker-3"]


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False

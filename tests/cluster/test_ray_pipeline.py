"""Real Ray actors, real processes, real sockets."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.config import CacheArgs, EngineConfig, ModelArgs, PipelineArgs, SchedulerArgs
from cluster.engine import Engine
from cluster.launch import launch_engine
from cluster.ray_pipeline import RayPipeline
from tests import golden
from tests.conftest import Collector, request

pytestmark = pytest.mark.usefixtures("ray_cluster")


def engine_config(stages: int, **changes: object) -> EngineConfig:
    return EngineConfig(
        model=ModelArgs(path=golden.MODEL, name="smollm2", dtype="float32", max_model_len=2048),
        pipeline=PipelineArgs(stages=stages, device="cpu", step_timeout_s=60.0),
        cache=CacheArgs(memory_gb=0.1),
        scheduler=SchedulerArgs(max_num_seqs=32, max_num_batched_tokens=512),
    )


def launch(stages: int) -> tuple[Engine, Collector, object]:
    group = placement_group([{"CPU": 0.1}, *[{"CPU": 0.3}] * stages])
    ray.get(group.ready(), timeout=60)
    collector = Collector()
    return launch_engine(engine_config(stages), group, 1, collector), collector, group


@pytest.fixture(scope="module")
def two_stages(ray_cluster: None) -> Iterator[tuple[Engine, Collector]]:
    engine, collector, group = launch(2)
    pids = [report.pid for report in pipeline(engine).stages]
    yield engine, collector
    engine.close()
    engine.scheduler.check()
    remove_placement_group(group)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "stage processes outlived the engine"


def pipeline(engine: Engine) -> RayPipeline:
    assert isinstance(engine.pipeline, RayPipeline)
    return engine.pipeline


def test_sixteen_at_once_give_the_golden_tokens(two_stages: tuple[Engine, Collector]) -> None:
    engine, collector = two_stages
    wanted = {f"g{i}": pair for i, pair in enumerate(golden.load()[:16])}
    for name, (prompt, tokens) in wanted.items():
        engine.add(request(name, prompt, max_tokens=len(tokens)))
    assert collector.wait(list(wanted)) == {name: tokens for name, (_, tokens) in wanted.items()}


def test_two_processes_hold_their_layers_only(two_stages: tuple[Engine, Collector]) -> None:
    reports = pipeline(two_stages[0]).stages
    assert len({os.getpid(), *(r.pid for r in reports)}) == 3
    embedding, total = 49152 * 576, 134_515_008
    # The tied embedding stands on both ends, everything else on one.
    assert sum(r.num_parameters for r in reports) == total + embedding
    assert all(r.num_parameters < 0.75 * total for r in reports)
    whole = total * 4
    for report in reports:
        memory = psutil.Process(report.pid).memory_full_info()
        assert memory.uss < whole + 400e6, f"stage {report.pid} holds {memory.uss / 1e6:.0f} MB: more than its share"


def test_both_stages_are_busy_at_once(two_stages: tuple[Engine, Collector]) -> None:
    engine, collector = two_stages
    collector.timings.clear()
    names = [f"busy{i}" for i in range(4)]
    for i, name in enumerate(names):
        engine.add(request(name, [10 + i] * 20, max_tokens=48))
    collector.wait(names)
    spans = {s: [(t.started, t.finished) for t in collector.timings if t.stage == s] for s in (0, 1)}
    overlap = sum(max(0.0, min(b0, b1) - max(a0, a1)) for a0, b0 in spans[0] for a1, b1 in spans[1])
    shorter = min(sum(b - a for a, b in spans[s]) for s in (0, 1))
    assert overlap > 0.4 * shorter, f"stages overlapped for {overlap:.2f} s of {shorter:.2f} s"


def test_stage_killed_in_mid_stream_and_the_stream_goes_on(two_stages: tuple[Engine, Collector]) -> None:
    engine, collector = two_stages
    prompt, tokens = golden.load()[2]
    engine.add(request("survivor", prompt, max_tokens=64))
    while len(collector.tokens("survivor")) < 5:
        time.sleep(0.01)
    os.kill(pipeline(engine).stages[1].pid, signal.SIGKILL)
    assert collector.wait(["survivor"], timeout=120)["survivor"] == tokens
    assert engine.failure is None


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    config = engine_config(1)
    model = config.model.model_copy(update={"path": str(tmp_path / "nothing.gguf")})
    group = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
    with pytest.raises(ValueError, match=r"nothing\.gguf"):
        launch_engine(config.model_copy(update={"model": model}), group, 1, Collector())
    remove_placement_group(group)

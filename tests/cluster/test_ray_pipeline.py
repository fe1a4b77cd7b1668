"""Real Ray actors, real processes, real sockets."""

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.config import CacheArgs, EngineConfig, ModelArgs, PipelineArgs, SchedulerArgs
from cluster.engine import Engine, RecoveryReport
from cluster.errors import CaravanError, StageDied
from cluster.launch import launch_engine
from cluster.ray_pipeline import RayPipeline
from cluster.transport import ControlServer
from tests import golden
from tests.conftest import Collector, request

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def engine_config(stages: int, **pipeline: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelArgs(path=golden.MODEL, name="smollm2", dtype="float32", max_model_len=2048),
        pipeline=PipelineArgs(stages=stages, device="cpu", **pipeline),
        cache=CacheArgs(memory_gb=0.1, host_gb=0.05),
        scheduler=SchedulerArgs(max_num_seqs=32, max_num_batched_tokens=512),
    )


def launch(stages: int, **options: Any) -> tuple[Engine, Collector, PlacementGroup]:
    group = placement_group([{"CPU": 0.1}, *[{"CPU": 0.3}] * stages])
    ray.get(group.ready(), timeout=60)
    collector = Collector()
    return launch_engine(engine_config(stages, **options), group, 1, collector), collector, group


@pytest.fixture(scope="module")
def two_stages(ray_cluster: None) -> Iterator[tuple[Engine, Collector]]:
    engine, collector, group = launch(2)
    pids = [report.pid for report in pipeline(engine).stages]
    yield engine, collector
    copies = arenas(engine)
    assert len(copies) == 2
    assert all(Path(path).exists() for path in copies)
    engine.close()
    assert not any(Path(path).exists() for path in copies), "shared memory is left behind"
    engine.scheduler.check()
    remove_placement_group(group)
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if psutil.pid_exists(pid)], "stage processes outlived the engine"


def arenas(engine: Engine) -> list[str]:
    """Files with the copies of KV blocks, of each stage."""
    asked = [
        stage.actor.__ray_call__.remote(lambda actor: str(actor._stage.copier._arenas[0]._path))
        for stage in pipeline(engine)._stages
    ]
    found: list[str] = ray.get(asked)
    return found


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


def test_a_killed_stage_leaves_its_copies_to_who_takes_its_place(two_stages: tuple[Engine, Collector]) -> None:
    engine, collector = two_stages
    prompt = [(37 * i) % 900 + 100 for i in range(300)]
    engine.add(request("whole", prompt, max_tokens=40))
    whole = collector.wait(["whole"])["whole"]
    engine.reset_cache()
    engine.add(request("killed", prompt, max_tokens=40))
    while len(collector.tokens("killed")) < 20:
        time.sleep(0.01)
    before, files = engine.scheduler.stats().host_hit_tokens, arenas(engine)
    os.kill(pipeline(engine).stages[1].pid, signal.SIGKILL)
    assert collector.wait(["killed"])["killed"] == whole
    assert engine.scheduler.stats().host_hit_tokens - before >= 288, "computed again"
    assert engine.scheduler.stats().host.damaged == 0
    assert arenas(engine) == files


def test_the_garbage_collector_leaves_alone_what_a_stage_started_with(two_stages: tuple[Engine, Collector]) -> None:
    """To look through it takes a tenth of a second, in which no step is launched."""
    for stage in pipeline(two_stages[0])._stages:
        assert ray.get(stage.actor.__ray_call__.remote(lambda actor: gc.get_freeze_count())) > 50_000


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


def disturb(engine: Engine, collector: Collector, name: str, pid: int, number: signal.Signals) -> RecoveryReport:
    """A signal to a stage in the middle of a stream, which must go on with the golden tokens; what the engine says."""
    prompt, tokens = golden.load()[2]
    before = len(collector.recoveries)
    engine.add(request(name, prompt, max_tokens=64))
    while len(collector.tokens(name)) < 5:
        time.sleep(0.01)
    os.kill(pid, number)
    sent = time.monotonic()
    while engine.recovering is None and len(collector.recoveries) == before:
        time.sleep(0.01)
    noticed = time.monotonic() - sent
    assert collector.wait([name], timeout=120)[name] == tokens
    assert engine.failure is None
    assert noticed < (2.0 if number == signal.SIGKILL else 30.0), f"noticed after {noticed:.1f} s"
    (report,) = collector.recoveries[before:]
    return report


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_stage_is_replaced_and_the_other_keeps_its_weights(
    two_stages: tuple[Engine, Collector], stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come and go meanwhile, each of which wakes the pipeline, whatever it is about to do."""
    engine, collector = two_stages
    rebuilt = pipeline(engine)
    open_control = rebuilt._open_control

    def open_while_woken() -> ControlServer:
        rebuilt.wake()
        return open_control()

    monkeypatch.setattr(rebuilt, "_open_control", open_while_woken)
    before = [report.pid for report in pipeline(engine).stages]
    report = disturb(engine, collector, f"killed{stage}", before[stage], signal.SIGKILL)
    assert (report.cause, report.num_replaced, report.num_seqs) == ("killed", 1, 1)
    after = [report.pid for report in pipeline(engine).stages]
    assert after[stage] != before[stage]
    assert after[1 - stage] == before[1 - stage]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stage_that_hangs_is_found_and_replaced(two_stages: tuple[Engine, Collector], stage: int) -> None:
    engine, collector = two_stages
    before = [report.pid for report in pipeline(engine).stages]
    report = disturb(engine, collector, f"stopped{stage}", before[stage], signal.SIGSTOP)
    assert (report.cause, report.num_replaced) == ("hung", 1)
    assert pipeline(engine).stages[1 - stage].pid == before[1 - stage]
    assert not psutil.pid_exists(before[stage]), "what hung is ended, not left behind"


def break_link(downstream: Any, upstream_pid: int) -> None:
    """In the process of a stage: end its connections with the one before it, as a network would."""
    (addresses,) = [{c.laddr for c in psutil.Process(upstream_pid).net_connections("tcp")}]
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr in addresses:
            with socket.socket(fileno=os.dup(connection.fd)) as broken:
                broken.shutdown(socket.SHUT_RDWR)


def slow_once(stage: Any, seconds: float) -> None:
    """In the process of a stage: it takes so long for its next step, as it does for a long prompt."""
    compute = stage._stage.compute

    def slow(*args: Any) -> Any:
        stage._stage.compute = compute
        time.sleep(seconds)
        return compute(*args)

    stage._stage.compute = slow


def test_a_link_that_breaks_costs_no_stage_its_weights(two_stages: tuple[Engine, Collector]) -> None:
    """Not even one that is computing all the while."""
    engine, collector = two_stages
    prompt, tokens = golden.load()[2]
    before, recoveries = [report.pid for report in pipeline(engine).stages], len(collector.recoveries)
    first, second = (stage.actor for stage in pipeline(engine)._stages)
    engine.add(request("linked", prompt, max_tokens=64))
    while len(collector.tokens("linked")) < 5:
        time.sleep(0.01)
    ray.get(first.__ray_call__.remote(slow_once, 1.0))
    while ray.get(first.doing.remote()).seconds < 0.2:
        time.sleep(0.01)
    ray.get(second.__ray_call__.remote(break_link, before[0]))
    assert collector.wait(["linked"], timeout=120)["linked"] == tokens
    (report,) = collector.recoveries[recoveries:]
    assert (report.cause, report.num_replaced) == ("link", 0)
    assert [report.pid for report in pipeline(engine).stages] == before


def test_requests_that_come_while_a_stage_is_replaced_hold_up_nobody(
    two_stages: tuple[Engine, Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than any queue of wakeups holds, and then it turns out that the replacement fails too."""
    engine, collector = two_stages
    load, names = pipeline(engine)._load, [f"flood{i}" for i in range(2500)]

    def flood() -> None:
        for name in names:
            engine.add(request(name, [5], max_tokens=1))

    def flooded(*args: Any) -> None:
        monkeypatch.setattr(pipeline(engine), "_load", load)
        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive(), "adding requests waits for the rebuild"
        raise StageDied("the replacement has died as well", "start")

    monkeypatch.setattr(pipeline(engine), "_load", flooded)
    disturb(engine, collector, "flooded", pipeline(engine).stages[1].pid, signal.SIGKILL)
    for name in names:
        engine.abort(name)


@pytest.mark.slow
def test_a_stage_of_several_devices_is_one_unit_of_failure() -> None:
    """Killed with all its devices, it is replaced with all of them, and gives the tokens of one device."""
    engine, collector, group = launch(2, tensor_parallel=3)
    try:
        prompt, tokens = golden.load()[0]
        before = pipeline(engine).stages
        report = disturb(engine, collector, "tp", before[0].pid, signal.SIGKILL)
        assert (report.cause, report.num_replaced) == ("killed", 1)
        assert pipeline(engine).stages[1].pid == before[1].pid
        engine.add(request("after", prompt, max_tokens=len(tokens)))
        assert collector.wait(["after"]) == {"after": tokens}
    finally:
        engine.close()
        remove_placement_group(group)


def test_a_spare_takes_over() -> None:
    engine, collector, group = launch(2, spare=True)
    try:
        spare_pid = ray.get(pipeline(engine)._stages[1]._spare.pid.remote())
        disturb(engine, collector, "spare", pipeline(engine).stages[1].pid, signal.SIGKILL)
        assert pipeline(engine).stages[1].pid == spare_pid
        assert pipeline(engine)._stages[1]._spare is not None, "the next spare is on its way"
    finally:
        engine.close()
        remove_placement_group(group)


def test_a_stage_that_cannot_be_replaced_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is gone: the requests may run elsewhere, and waiting helps nobody."""
    monkeypatch.setattr("cluster.ray_pipeline.PLACE_S", 2.0)
    engine, collector, group = launch(1)
    engine.add(request("r", [1, 2, 3], max_tokens=2000))
    while not collector.tokens("r"):
        time.sleep(0.01)
    remove_placement_group(group)
    with pytest.raises(CaravanError, match="no place"):
        collector.wait(["r"], timeout=60)
    engine.close()


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    config = engine_config(1)
    model = config.model.model_copy(update={"path": str(tmp_path / "nothing.gguf")})
    group = placement_group([{"CPU": 0.1}, {"CPU": 0.1}])
    with pytest.raises(ValueError, match=r"nothing\.gguf"):
        launch_engine(config.model_copy(update={"model": model}), group, 1, Collector())
    remove_placement_group(group)

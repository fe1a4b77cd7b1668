"""Which link a pair of stages gets; that over NCCL: its bookkeeping, with a group that only pretends, then itself.

What needs a GPU is skipped without one. Two processes share it if there is no other: see `a_host_of_its_own`.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.config import CacheArgs, EngineConfig, ModelArgs, PipelineArgs, SchedulerArgs
from cluster.engine import Engine
from cluster.errors import LinkBroken
from cluster.launch import launch_engine
from cluster.ray_pipeline import RayPipeline
from cluster.stages import rendezvous as meeting
from cluster.stages import stage_loop
from cluster.stages.gloo_link import GlooLink
from cluster.stages.link import DOWNSTREAM, UPSTREAM
from cluster.stages.nccl_link import NcclLink
from cluster.stages.rendezvous import Rendezvous, fits_nccl, join, make_link
from cluster.stages.stage_actor import StageActor
from cluster.stages.stage_loop import StageLoop
from cluster.transport import StepOrder, StopRequested, interface_of
from model.batch import Batch, StepOutput
from model.sampling import Sampled
from tests import golden
from tests.cluster.test_ray_pipeline import engine_config
from tests.conftest import Collector, a_host_of_its_own, request

HOST, CPU = "127.0.0.1", torch.device("cpu")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


# -- which one --------------------------------------------------------------------------------------------------------


def pair(identities: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What both ends get, on devices of these identities; NCCL is asked for, not used."""
    asked = threading.local()
    monkeypatch.setattr(meeting, "identity", lambda device: identities[asked.rank])
    monkeypatch.setattr("cluster.stages.nccl_link.connect", lambda store, rank, *_: f"nccl-{rank}")
    rendezvous = Rendezvous(HOST, 5.0)

    def end(rank: int) -> Any:
        asked.rank = rank
        store = rendezvous.store if rank == UPSTREAM else join(rendezvous.address, 5.0)
        return make_link(store, rank, HOST, "key", 5.0, CPU)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(end, (UPSTREAM, DOWNSTREAM)))


def test_two_gpus_get_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pair(("GPU-a", "GPU-b"), monkeypatch) == ["nccl-0", "nccl-1"]


@pytest.mark.parametrize("identities", [("GPU-a", "GPU-a"), ("", ""), ("GPU-a", "")])
def test_a_shared_gpu_and_a_cpu_get_gloo(identities: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses two ranks on one GPU; and a pair of which one end cannot use it must agree all the same."""
    up, down = pair(identities, monkeypatch)
    assert isinstance(up, GlooLink)
    up.send(torch.arange(6.0).view(2, 3), 5.0)
    assert torch.equal(down.receive(torch.empty(2, 3), 5.0), torch.arange(6.0).view(2, 3))


def test_a_cpu_has_no_identity() -> None:
    assert meeting.identity(CPU) == ""
    assert not fits_nccl("", "")


def test_the_interface_of_an_address() -> None:
    assert interface_of(HOST) == "lo"
    with pytest.raises(ValueError, match=r"192\.0\.2\.7"):
        interface_of("192.0.2.7")


# -- its bookkeeping --------------------------------------------------------------------------------------------------


class Work:
    done = False


class Looks:
    """In place of CUDA events."""

    @staticmethod
    def received(work: Work) -> Callable[[], bool]:
        return lambda: work.done

    sent = received


class Group:
    """A process group whose operations are done when it is told so, or aborted: then all of them look done."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.aborted = 0
        self.broken_when_aborted = ""
        self.link: NcclLink | None = None

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        self.works.append(Work())
        return self.works[-1]

    recv = send

    def abort(self) -> None:
        assert self.link is not None
        try:
            self.link.check()
        except LinkBroken as error:
            self.broken_when_aborted = str(error)
        self.aborted += 1
        for work in self.works:
            work.done = True


@pytest.fixture
def group() -> Group:
    made = Group()
    events: Any = Looks()
    made.link = NcclLink(made, 1, events)
    return made


def test_a_receive_past_its_deadline_is_aborted_and_never_believed(group: Group) -> None:
    assert group.link is not None
    into = torch.empty(1, 4)
    assert group.link.receive(into, timeout_s=0.2) is into
    group.link.check()
    deadline = time.monotonic() + 5
    while not group.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert group.works[0].done, "it looks as if it had come"
    with pytest.raises(LinkBroken, match="receiving from the stage before: the neighbour was silent"):
        group.link.check()
    assert "silent" in group.broken_when_aborted, "whoever is freed by the abort must see that it was one"
    with pytest.raises(LinkBroken):
        group.link.send(into, 1.0)
    group.link.close()
    assert group.aborted == 1


def test_what_came_in_time_is_not_waited_for(group: Group) -> None:
    assert group.link is not None
    group.link.receive(torch.empty(1, 4), timeout_s=0.3)
    group.works[0].done = True
    time.sleep(0.5)
    group.link.check()
    assert not group.aborted


def test_what_is_sent_lives_until_it_has_left(group: Group) -> None:
    import weakref

    assert group.link is not None
    hidden = torch.ones(2, 2)
    alive = weakref.ref(hidden)
    group.link.send(hidden, 5.0)
    del hidden
    assert alive() is not None
    with pytest.raises(LinkBroken, match="not taken"):
        group.link.flush(0.05)
    group.works[0].done = True
    group.link.flush(1.0)
    assert alive() is None


def test_closing_frees_what_waits(group: Group) -> None:
    assert group.link is not None
    group.link.receive(torch.empty(1, 4), 60.0)
    group.link.close()
    assert (group.aborted, group.works[0].done) == (1, True)


def test_a_stage_lets_go_of_what_its_device_may_wait_for(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through host memory it is the host that waits, with a deadline; and such a link is its own thread's."""
    stage = object.__new__(StageActor)
    stage._upstream = group.link
    stage._downstream = SimpleNamespace(on_device=False, close=lambda: pytest.fail("closed"))
    freed = threading.Barrier(2, timeout=5)  # to let go of one may wait until the other is let go of as well
    monkeypatch.setattr(group, "abort", lambda abort=group.abort: (freed.wait(), abort()))
    stage._tokens = SimpleNamespace(on_device=True, close=freed.wait)
    assert group.link is not None
    group.link.receive(torch.empty(1, 4), 60.0)
    stage.let_go()
    assert (group.aborted, group.works[0].done) == (1, True)


# -- the stage that uses it -------------------------------------------------------------------------------------------


class Orders:
    """Gives two batches, then nothing; keeps what is answered."""

    def __init__(self, tokens_from: int) -> None:  # of the second
        one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
        batches = [Batch(0, n, one, one, zero, zero, zero, zero[:0], t, zero) for n, t in enumerate((-1, tokens_from))]
        self.orders = [StepOrder(batch, 5.0) for batch in batches]
        self.answered: list[Any] = []

    def receive(self, wait: bool = True) -> StepOrder | None:
        if wait and not self.orders:
            raise StopRequested
        return self.orders.pop(0) if self.orders else None

    def send(self, message: Any) -> None:
        self.answered.append(message)


def last_stage(
    group: Group, monkeypatch: pytest.MonkeyPatch, compute: Any, tokens_from: int = -1
) -> tuple[StageLoop, Orders]:
    """A stage whose device is done with a step when its hidden state is there."""

    def span() -> Any:
        work = group.works[-1]
        is_there = lambda: work.done  # noqa: E731
        return SimpleNamespace(has_begun=is_there, is_over=is_there, wait=float, started=float, finished=float)

    monkeypatch.setattr(stage_loop, "Stopwatch", lambda device: SimpleNamespace(start=lambda: None, stop=span))
    stage: Any = SimpleNamespace(
        group=SimpleNamespace(check=lambda: None),
        adapters=None,
        layers=SimpleNamespace(is_first=False, is_last=True),
        decoder=SimpleNamespace(device=CPU, dtype=torch.float32),
        hidden_shape=lambda batch: (1, 8),
        compute=compute,
    )
    orders: Any = Orders(tokens_from)
    return StageLoop(1, stage, orders, 0, group.link, None), orders


def test_steps_are_launched_before_their_hidden_states_are_there(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, orders = last_stage(group, monkeypatch, lambda batch, hidden: Sampled(torch.tensor([3]), {}))
    running = threading.Thread(target=loop.run)
    running.start()
    deadline = time.monotonic() + 5
    while len(group.works) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(group.works) == 2, "the second receive is launched although the first has not come"
    assert loop.doing.activity == "receiving"
    assert orders.answered == []
    for work in group.works:
        work.done = True
    running.join(timeout=5)
    assert [m.step_id for m in orders.answered if isinstance(m, StepOutput)] == [0, 1]


def test_nothing_is_launched_behind_what_follows_from_unreported_tokens(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage before waits for those tokens; and a launch may keep the host from reporting them."""
    loop, orders = last_stage(group, monkeypatch, lambda batch, hidden: Sampled(torch.tensor([3]), {}), tokens_from=0)
    running = threading.Thread(target=loop.run)
    running.start()
    time.sleep(0.2)
    assert len(group.works) == 1
    group.works[0].done = True
    deadline = time.monotonic() + 5
    while len(group.works) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert [m.step_id for m in orders.answered if isinstance(m, StepOutput)] == [0], "reported first"
    group.works[1].done = True
    running.join(timeout=5)
    assert [m.step_id for m in orders.answered if isinstance(m, StepOutput)] == [0, 1]


def test_tokens_of_an_aborted_receive_are_never_reported(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, orders = last_stage(group, monkeypatch, lambda batch, hidden: Sampled(torch.tensor([3]), {}))
    assert group.link is not None
    threading.Timer(0.2, group.link.abort, args=("the neighbour is gone",)).start()
    with pytest.raises(LinkBroken, match="the neighbour is gone"):
        loop.run()
    assert orders.answered == []


def test_a_failure_on_garbage_is_the_links(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that stumbles over garbage is as good as before: its weights are kept."""

    def run(batch: Batch, hidden: torch.Tensor) -> Sampled:
        assert group.link is not None
        group.link.abort("the neighbour is gone")
        raise ValueError("not a number")

    loop, _ = last_stage(group, monkeypatch, run)
    with pytest.raises(LinkBroken, match="the neighbour is gone"):
        loop.run()


# -- itself -----------------------------------------------------------------------------------------------------------

SHAPES = [1, 64, 256, 3, 2048, 128, 1, 17] * 12


@pytest.fixture
def own_host(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() == 1:
        monkeypatch.setenv("NCCL_HOSTID", f"process-{os.getpid()}")


def hidden_state(index: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(tokens, 1024, generator=generator).bfloat16()


def sender(address: Any, key: str, count: int, then_wait: bool) -> None:
    """In a process of its own: the last GPU sends `count` hidden states, beside products that keep it busy."""
    gpu = torch.cuda.device_count() - 1
    if gpu == 0:
        a_host_of_its_own()
    rendezvous = Rendezvous(HOST, 60.0)
    address.put(rendezvous.address)
    torch.cuda.set_device(gpu)
    made = make_link(rendezvous.store, UPSTREAM, HOST, key, 60.0, torch.device("cuda", gpu))
    assert isinstance(made, NcclLink)
    busy = torch.randn(4096, 4096, device="cuda")
    for i, tokens in enumerate(SHAPES[:count]):
        made.send(hidden_state(i, tokens).cuda(), 60.0)
        busy = (busy @ busy).tanh()
    made.flush(60.0)
    while then_wait:
        time.sleep(1)


def started(key: str, count: int, then_wait: bool) -> tuple[Any, NcclLink]:
    """A sender, and this process's end of the link, on the first GPU."""
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=sender, args=(address, key, count, then_wait), daemon=True)
    process.start()
    store = join(address.get(timeout=60), 60.0)
    torch.cuda.set_device(0)
    made = make_link(store, DOWNSTREAM, HOST, key, 60.0, torch.device("cuda", 0))
    assert isinstance(made, NcclLink)
    return process, made


@NEEDS_GPU
@pytest.mark.usefixtures("own_host")
def test_hidden_states_arrive_in_order_from_gpu_to_gpu() -> None:
    process, made = started("order", len(SHAPES), then_wait=False)
    for i, tokens in enumerate(SHAPES):
        into = torch.empty(tokens, 1024, dtype=torch.bfloat16, device="cuda")
        doubled = made.receive(into, 60.0) * 2  # waits on the device
        assert torch.equal(doubled.cpu(), hidden_state(i, tokens) * 2)
    made.check()
    process.join(timeout=60)
    assert process.exitcode == 0
    made.close()


@NEEDS_GPU
@pytest.mark.usefixtures("own_host")
def test_a_survivor_is_freed_keeps_its_memory_and_links_again() -> None:
    process, made = started("first", 1, then_wait=True)
    weights = torch.arange(2**20, device="cuda")
    made.receive(torch.empty(1, 1024, dtype=torch.bfloat16, device="cuda"), 60.0)
    torch.cuda.synchronize()
    os.kill(process.pid, signal.SIGKILL)
    begun = time.monotonic()
    made.receive(torch.empty(64, 1024, dtype=torch.bfloat16, device="cuda"), 2.0)
    torch.cuda.synchronize()  # the host waits, until the link's own thread ends it
    with pytest.raises(LinkBroken, match="silent"):
        made.check()
    made.close()
    del made  # torch keeps who lets go of a group that failed waiting for a minute, unless it is told not to
    assert time.monotonic() - begun < 20
    process, made = started("second", 4, then_wait=False)
    for i, tokens in enumerate(SHAPES[:4]):
        into = made.receive(torch.empty(tokens, 1024, dtype=torch.bfloat16, device="cuda"), 60.0)
        assert torch.equal(into.cpu(), hidden_state(i, tokens))
    assert torch.equal(weights.cpu(), torch.arange(2**20))
    made.close()


@contextmanager
def engine_on_gpus(config: EngineConfig) -> Iterator[tuple[Engine, Collector]]:
    """A GPU for each stage, or a share of the only one."""
    stages = config.pipeline.stages
    share = min(1.0, torch.cuda.device_count() / stages)
    group = placement_group([{"CPU": 0.1}, *[{"CPU": 0.3, "GPU": share}] * stages])
    ray.get(group.ready(), timeout=60)
    collector = Collector()
    engine = launch_engine(config, group, 1, collector)
    try:
        yield engine, collector
    finally:
        engine.close()
        remove_placement_group(group)
    engine.scheduler.check()


@NEEDS_GPU
def test_stages_over_nccl_give_the_golden_tokens(ray_cluster: None) -> None:
    """The real pipeline: a stage actor on each GPU, captured decode steps, NCCL between them."""
    config = engine_config(2)
    pipeline = config.pipeline.model_copy(update={"device": "cuda"})
    wanted = {str(i): expected for i, expected in enumerate(golden.load())}
    with engine_on_gpus(config.model_copy(update={"pipeline": pipeline})) as (engine, collector):
        for name, (prompt, tokens) in wanted.items():
            engine.add(request(name, prompt, max_tokens=len(tokens)))
        assert collector.wait(list(wanted)) == {name: tokens for name, (_, tokens) in wanted.items()}


def made_up(stages: int) -> EngineConfig:
    """In float32, so that what is computed again, and otherwise, gives the same tokens."""
    return EngineConfig(
        model=ModelArgs(path="shape:test-1m", name="test", dtype="float32", load_format="dummy", max_model_len=512),
        pipeline=PipelineArgs(stages=stages, device="cuda", hang_timeout_s=2.0),
        cache=CacheArgs(memory_gb=0.1, prefix_caching=False),
        scheduler=SchedulerArgs(max_num_seqs=32, max_num_batched_tokens=256),
    )


def streams(engine: Engine, collector: Collector, name: str, then: Callable[[], None]) -> list[list[int]]:
    """The tokens of 24 prompts of many lengths, half of them sampled; `then` is called in the middle of them."""
    ids = [f"{name}-{i}" for i in range(24)]
    for i, request_id in enumerate(ids):
        prompt = [1 + (7 * i + j) % 250 for j in range(1 + 5 * i)]
        engine.add(request(request_id, prompt, max_tokens=160, temperature=float(i % 2), seed=i))
    deadline = time.monotonic() + 60
    while sum(len(collector.tokens(request_id)) for request_id in ids) < 24 * 60:
        assert collector.failure is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    then()
    return list(collector.wait(ids, timeout=90).values())


@NEEDS_GPU
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stage_lost_behind_nccl_is_replaced_alone(ray_cluster: None, number: signal.Signals) -> None:
    """Each in its turn: the other one keeps its process, and every stream its tokens."""
    with engine_on_gpus(made_up(1)) as (engine, collector):
        expected = streams(engine, collector, "one", lambda: None)
    with engine_on_gpus(made_up(2)) as (engine, collector):
        assert isinstance(engine.pipeline, RayPipeline)
        assert streams(engine, collector, "two", lambda: None) == expected
        for stage in (0, 1):
            before = [report.pid for report in engine.pipeline.stages]
            pid = before[stage]
            assert streams(engine, collector, f"lost-{stage}", lambda pid=pid: os.kill(pid, number)) == expected  # type: ignore[misc]
            after = [report.pid for report in engine.pipeline.stages]
            assert (after[stage] != pid, after[1 - stage]) == (True, before[1 - stage])
        assert [report.num_replaced for report in collector.recoveries] == [1, 1]
        assert max(report.seconds for report in collector.recoveries) < 40

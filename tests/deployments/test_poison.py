"""One request that kills the stage which computes it, among 64 streams on two pipelines: it alone fails.

From the gateway's client of engines down to the stages everything is what is deployed, but for Serve itself: a call to
a replica is a task of this event loop. A stage dies when it sees the mark in a batch.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import ray
from ray.serve.exceptions import RequestCancelledError
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.config import CacheArgs, EngineConfig, ModelArgs, PipelineArgs, SchedulerArgs
from cluster.engine import Engine, RecoveryReport
from cluster.launch import launch_engine
from cluster.local_pipeline import LocalPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request, TokenEvent
from cluster.stages import stage_handle
from cluster.stages.stage_actor import StageActor
from deployments.config import AppConfig
from deployments.engine.load import EngineLoad
from deployments.engine.streams import Streams
from deployments.engine.token_link import ReplyAddress, TokenSender
from deployments.gateway import engine_client
from deployments.gateway.engine_client import ServeEngineClient
from deployments.gateway.resume import ResumingEngineClient
from deployments.routing.assignments import ASSIGNMENTS
from deployments.routing.gateway_load import GatewayLoad
from model.batch import Batch
from model.stage import Stage
from ops.bench.engine.loading import hf_config
from tests.conftest import TINY, Collector, make_stages, request
from tests.deployments.gateway.test_resume import Recorded

STREAMS, TOKENS, STAGES = 64, 60, 2
MARK = [299, 3, 298, 4, 297]
_decode = msgspec.msgpack.Decoder(Request).decode


def kills(batch: Batch) -> bool:
    return np.array(MARK, np.int32).tobytes() in batch.token_ids.tobytes()


def poisoned(stage: Stage, death: Any) -> None:
    compute = stage.compute

    def computes(batch: Batch, hidden: Any) -> Any:
        if kills(batch):
            death()
        return compute(batch, hidden)

    stage.compute = computes  # type: ignore[method-assign]


class MortalStageActor(StageActor):
    """Its process ends when it sees the mark."""

    def allocate(self, num_blocks: int, num_places: int) -> None:
        super().allocate(num_blocks, num_places)
        assert self._stage is not None
        if self._spec.layers.is_last:
            poisoned(self._stage, lambda: os._exit(1))


class Replica(Collector):
    """What `EngineReplica` does for its gateways."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.streams = Streams(TokenSender(name), EngineLoad(AppConfig.model_construct()))
        self.engine: Engine

    async def generate(self, payload: bytes, reply_to: tuple[str, str]) -> None:
        wanted = _decode(payload)
        with self.streams.open(wanted.request_id, ReplyAddress(*reply_to)) as done:
            try:
                self.engine.add(wanted)
                await done
            finally:
                self.engine.abort(wanted.request_id)

    def on_tokens(self, events: list[TokenEvent]) -> None:
        super().on_tokens(events)
        self.streams.deliver(events)

    def on_death(self, death: Any) -> None:
        self.beat()

    def on_recovery(self, report: RecoveryReport) -> None:
        super().on_recovery(report)
        self.beat()

    def beat(self) -> None:
        self.streams.beat(self.engine.recovering is None)

    def on_failure(self, error: Any) -> None:
        super().on_failure(error)
        self.streams.fail(error)


class Response:
    """A call that says nothing until it has ended."""

    def __init__(self, call: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(call)
        self.cancel = self._task.cancel

    async def __aiter__(self) -> AsyncGenerator[None, None]:
        try:
            await self._task
        except asyncio.CancelledError:
            raise RequestCancelledError("") from None
        yield


class Handle:
    """A Serve handle that picks the replica which is not being rebuilt, and has fewest requests."""

    def __init__(self, replicas: dict[str, Replica]) -> None:
        self._replicas = replicas
        ASSIGNMENTS.set_running(replicas)

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, name: str, payload: bytes, reply_to: tuple[str, str]) -> Response:
        replicas = {name for name, replica in self._replicas.items() if replica.failure is None}
        best = min(replicas, key=lambda name: (ASSIGNMENTS.is_doubtful(name), ASSIGNMENTS.count(name)))
        ASSIGNMENTS.assign(name, best)
        return Response(self._replicas[best].generate(payload, reply_to))


class Rebuilt(LocalPipeline):
    """It takes longer than gateways need to end what they move elsewhere, as real rebuilds do."""

    def recover(self, epoch: int, fresh: bool = False) -> int:
        time.sleep(0.3)
        return super().recover(epoch, fresh)


def local_engine(replica: Replica) -> Engine:
    def fail() -> None:
        raise RuntimeError("a mark was seen")

    stages = make_stages(stages=STAGES, num_blocks=2000)
    poisoned(stages[-1], fail)
    scheduler = Scheduler(
        BlockManager(2000, 4), depth=STAGES, max_num_seqs=64, max_num_batched_tokens=256, max_model_len=512
    )
    engine = Engine(scheduler, Rebuilt(stages), replica)
    engine.start()
    return engine


@pytest.fixture
def engines(
    kind: str, names: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, Replica]]:
    replicas = {name: Replica(name) for name in names}
    groups = []
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(engine_client, "LAST_TOKENS_S", 0.5)
    if kind == "processes":
        request.getfixturevalue("ray_cluster")
        monkeypatch.undo()
        monkeypatch.setattr(stage_handle, "StageActor", MortalStageActor)
        (tmp_path / "config.json").write_text(json.dumps(hf_config(TINY)))
    for replica in replicas.values():
        if kind == "threads":
            replica.engine = local_engine(replica)
            continue
        groups.append(group := placement_group([{"CPU": 0.1}, *[{"CPU": 0.3}] * STAGES]))
        ray.get(group.ready(), timeout=60)
        config = EngineConfig(
            model=ModelArgs(path=str(tmp_path), name="tiny", dtype="float32", load_format="dummy"),
            pipeline=PipelineArgs(stages=STAGES, device="cpu"),
            cache=CacheArgs(block_size=4, memory_gb=0.01),
            scheduler=SchedulerArgs(max_num_seqs=64, max_num_batched_tokens=256),
        )
        replica.engine = launch_engine(config, group, 1, replica)
    yield replicas
    for replica in replicas.values():
        replica.engine.close()
        replica.engine.scheduler.check()
        replica.streams.close()
    for group in groups:
        remove_placement_group(group)
    ASSIGNMENTS.set_running([])


class Client:
    """The gateway's, and what it saw."""

    def __init__(self, replicas: dict[str, Replica]) -> None:
        self._replicas = replicas
        handle: Any = Handle(replicas)
        self._serve = ServeEngineClient(handle, "app", 4, Recorded(), GatewayLoad())
        self.engines = ResumingEngineClient(self._serve, 5, 60.0, Recorded())
        self.longest_pause = 0.0
        self.errors: dict[str, list[TokenEvent]] = {}

    async def stream(self, wanted: Request) -> list[int]:
        tokens: list[int] = []
        last = time.monotonic()
        async for events in self.engines.generate(wanted):
            now = time.monotonic()
            if tokens:
                self.longest_pause = max(self.longest_pause, now - last)
            last = now
            tokens += [event.token_id for event in events if event.error is None]
            if events[-1].error is not None:
                self.errors.setdefault(wanted.request_id, []).append(events[-1])
        return tokens

    async def aclose(self) -> None:
        """A socket that is left open blocks whichever thread collects it as garbage."""
        assert self._serve._receiver is not None
        await self._serve._receiver.aclose()

    async def beats(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for replica in self._replicas.values():
                replica.beat()


def healthy(index: int, time: str) -> Request:
    rng = random.Random(index)
    prompt = [rng.randrange(3, 290) for _ in range(rng.randrange(1, 40))]
    return request(f"{time}-{index}", prompt, max_tokens=TOKENS, temperature=0.8 * (index % 2), seed=index)


async def run(replicas: dict[str, Replica], time: str, bad: list[Request]) -> tuple[Client, list[list[int]]]:
    """All streams; `bad` requests come once half of the streams have some tokens."""
    client = Client(replicas)
    beats = asyncio.create_task(client.beats())
    streams = [asyncio.create_task(client.stream(healthy(i, time))) for i in range(STREAMS)]
    while sum(len(r.tokens(f"{time}-{i}")) > 2 for r in replicas.values() for i in range(STREAMS)) < STREAMS / 2:
        await asyncio.sleep(0.002)
    for one in bad:
        assert await asyncio.wait_for(client.stream(one), 60) == []
    tokens = [await asyncio.wait_for(stream, 60) for stream in streams]
    beats.cancel()
    await client.aclose()
    return client, tokens


@pytest.mark.parametrize("names", ["ab"])
@pytest.mark.parametrize("kind", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_it_alone_fails(kind: str, names: str, engines: dict[str, Replica]) -> None:
    async def both() -> tuple[Client, list[list[int]], list[list[int]]]:
        _, expected = await run(engines, "undisturbed", [])
        client, tokens = await run(engines, "disturbed", [request("bad", [7, *MARK], max_tokens=4)])
        return client, tokens, expected

    client, tokens, expected = asyncio.run(both())
    assert tokens == expected
    assert list(client.errors) == ["bad"]
    (end,) = client.errors["bad"]
    assert end.is_fatal
    assert "died 3 times" in (end.error or "")
    recoveries = [report for replica in engines.values() for report in replica.recoveries]
    assert len(recoveries) <= 3, "each rebuild is a pause for whoever is there"
    assert all(replica.failure is None for replica in engines.values())
    print(f"longest pause {client.longest_pause:.2f} s, rebuilds {[round(report.seconds, 2) for report in recoveries]}")


@pytest.mark.parametrize("names", ["abcd"])
@pytest.mark.parametrize("kind", ["threads"])
def test_engines_that_give_up_at_once_tell_the_next_one(kind: str, names: str, engines: dict[str, Replica]) -> None:
    """They rebuild nothing, so nobody but the request itself can know what has become of the engines before."""
    for replica in engines.values():
        replica.engine._recovery_attempts = 0

    async def send() -> TokenEvent:
        client = Client(engines)
        await client.stream(request("bad", [7, *MARK], max_tokens=4))
        await client.aclose()
        return client.errors["bad"][0]

    assert asyncio.run(send()).is_fatal
    assert sum(replica.failure is None for replica in engines.values()) == 1

"""Small models and engines that tests share."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from cluster.engine import Engine, RecoveryReport, StepReport
from cluster.errors import CaravanError, StageDied
from cluster.local_pipeline import LocalPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.host_tier import HostTier
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request, TokenEvent
from model.adapters.store import AdapterArgs, StageAdapters
from model.batch import Batch, Int32Array, StageTiming
from model.config import ModelConfig, split_layers
from model.group import DecoderGroup
from model.llama import Decoder
from model.sampling_params import SamplingParams
from model.stage import Stage
from model.weights.dummy import DummyCheckpoint

TINY = ModelConfig(
    dim=48,
    n_layers=6,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=96,
    vocab_size=300,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


def eventually(condition: Callable[[], object], timeout: float, what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.5)


def ints(*values: int) -> Int32Array:
    return np.array(values, np.int32)


def with_tables(batch: Batch, tables: list[list[int]], block_size: int) -> Batch:
    """The same step, which says all blocks of each sequence up to what it computes: that too is allowed."""
    counts = batch.num_blocks(block_size)
    blocks = [block for table, count in zip(tables, counts.tolist(), strict=True) for block in table[:count]]
    return msgspec.structs.replace(batch, num_new_blocks=counts, new_blocks=ints(*blocks))


def make_stages(
    config: ModelConfig = TINY,
    stages: int = 1,
    num_blocks: int = 128,
    block_size: int = 4,
    seed: int = 0,
    device: str = "cpu",
    adapters: int = 0,
    checkpoint: DummyCheckpoint | None = None,
) -> list[Stage]:
    """On a GPU with captured decode steps, as they are served; with room for so many adapters."""
    checkpoint = checkpoint or DummyCheckpoint(config, seed)
    made = []
    for part in split_layers(config, stages):
        tensors, longest = checkpoint.tensors(part.tensor_names(config)), config.max_position_embeddings
        group = DecoderGroup([Decoder(config, part, tensors, torch.float32, torch.device(device), longest)])
        room = StageAdapters(group, AdapterArgs(adapters, 64)) if adapters else None
        made.append(Stage(group, num_blocks, block_size, num_slots=64, adapters=room))
    if device == "cuda":
        for stage in made:
            stage.capture(512, lambda done, total: None)
    return made


class Collector:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.events: dict[str, list[TokenEvent]] = {}
        self.timings: list[StageTiming] = []
        self.reports: list[StepReport] = []
        self.recoveries: list[RecoveryReport] = []
        self.failure: CaravanError | None = None
        self._changed = threading.Condition()

    def on_tokens(self, events: list[TokenEvent]) -> None:
        with self._changed:
            for event in events:
                self.events.setdefault(event.request_id, []).append(event)
            self._changed.notify_all()

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_timing(self, timing: StageTiming) -> None:
        self.timings.append(timing)

    def on_death(self, death: StageDied) -> None:
        pass

    def on_recovery(self, report: RecoveryReport) -> None:
        self.recoveries.append(report)

    def on_failure(self, error: CaravanError) -> None:
        with self._changed:
            self.failure = error
            self._changed.notify_all()

    def tokens(self, request_id: str) -> list[int]:
        return [e.token_id for e in self.events.get(request_id, []) if e.has_token]

    def wait(self, request_ids: list[str], timeout: float = 120.0) -> dict[str, list[int]]:
        """Wait until all of these are finished; returns their tokens."""

        def done() -> bool:
            if self.failure is not None:
                raise self.failure
            return all(i in self.events and self.events[i][-1].finish_reason for i in request_ids)

        with self._changed:
            assert self._changed.wait_for(done, timeout), f"not finished: {set(request_ids) - set(self.events)}"
        return {i: self.tokens(i) for i in request_ids}


def request(request_id: str, token_ids: list[int], max_tokens: int = 16, **sampling: object) -> Request:
    params = {"temperature": 0.0, "seed": 0, "max_tokens": max_tokens, **sampling}
    return Request(request_id=request_id, token_ids=token_ids, sampling=SamplingParams(**params))  # type: ignore[arg-type]


MakeEngine = Callable[..., tuple[Engine, Collector]]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """A factory of local engines on the tiny model; all are closed and their books checked at the end."""
    engines: list[Engine] = []

    def make(
        stages: int = 1,
        num_blocks: int = 128,
        block_size: int = 4,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        prefix_caching: bool = True,
        config: ModelConfig = TINY,
        device: str = "cpu",
        host_places: int = 0,
        copies: Path | None = None,
        adapters: int = 0,
        max_host_adapters: int = 64,
        checkpoint: DummyCheckpoint | None = None,
    ) -> tuple[Engine, Collector]:
        """With `host_places`, blocks are copied to files in `copies`."""
        made = make_stages(config, stages, num_blocks, block_size, 0, device, adapters, checkpoint)
        host = HostTier(host_places, 8, stages) if host_places else None
        if host is not None:  # a model as small as this one computes faster than anybody copies
            host.is_worth = lambda num_blocks, block_size: num_blocks > 0  # type: ignore[method-assign]
        for i, stage in enumerate(made if host_places else []):
            assert copies is not None
            stage.keep_copies("tests", f"stage {i}", host_places, copies)
        pipeline = LocalPipeline(made)
        scheduler = Scheduler(
            BlockManager(num_blocks, block_size, prefix_caching, host),
            depth=stages,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=config.max_position_embeddings,
            max_adapters=adapters,
        )
        collector = Collector()
        engine = Engine(
            scheduler, pipeline, collector, vocab_size=config.vocab_size, max_host_adapters=max_host_adapters
        )
        engine.start()
        engines.append(engine)
        return engine, collector

    yield make
    for engine in engines:
        engine.close()
        engine.scheduler.check()


def a_host_of_its_own() -> None:
    """NCCL refuses two processes on one GPU of one host. Said to be on two, they meet over sockets."""
    os.environ["NCCL_HOSTID"] = f"process-{os.getpid()}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray for the session: its own temp dir and ports, a token of its own, gone afterwards."""
    import shutil
    import tempfile

    import ray

    temp = tempfile.mkdtemp(prefix="cv-", dir="/tmp")  # short: unix socket paths have 107 characters
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        _temp_dir=temp,
        object_store_memory=100_000_000,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"worker_process_setup_hook": a_host_of_its_own} if torch.cuda.device_count() == 1 else None,
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)

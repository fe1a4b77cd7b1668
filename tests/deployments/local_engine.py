"""An engine in this process behind the door that the gateway knows: real tokens, no Ray."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from cluster.engine import Engine, StepReport
from cluster.errors import CaravanError
from cluster.local_pipeline import LocalPipeline
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request, TokenEvent
from deployments.engine.board import ReplicaStatus
from deployments.engine.token_link import Inbox, deliver
from model.batch import StageTiming
from model.config import ModelConfig, split_layers
from model.llama import Decoder
from model.stage import Stage
from model.text.grammar import Masks
from model.weights.dummy import DummyCheckpoint
from tests.cluster.test_golden import BLOCK, decoders
from tests.deployments.gateway.test_gateway import tokenizer

MAX_SEQS = 32
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Request).decode


class LocalEngine:
    """An `EngineClient` with its engine. Requests cross msgpack, as they do on their way to a replica."""

    def __init__(
        self, decoders: Sequence[Decoder], max_model_len: int, num_blocks: int = 300, prefix_caching: bool = True
    ) -> None:
        scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK, prefix_caching),
            depth=len(decoders),
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=512,
            max_model_len=max_model_len,
        )
        self.pipeline = LocalPipeline([Stage(decoder, num_blocks, BLOCK, MAX_SEQS) for decoder in decoders])
        self.engine = Engine(scheduler, self.pipeline, self)
        self.masks = Masks(tokenizer, self.pipeline.wake)
        self.steps = 0
        self.left_at = -1  # the step at which the last client left
        self.requests: list[Request] = []
        self._inboxes: dict[str, Inbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.engine.start()

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        self._loop = asyncio.get_running_loop()
        request = _decode(_encode(request))
        self.requests.append(request)
        inbox = self._inboxes[request.request_id] = Inbox()
        finished = False
        try:
            constraint, matcher = request.sampling.constraint, None
            if constraint is not None:
                matcher = await asyncio.to_thread(self.masks.open, constraint, request.output_ids)
            self.engine.add(request, matcher)
            while not finished:
                events = await inbox.next()
                finished = events[-1].finish_reason is not None
                yield events
        finally:
            del self._inboxes[request.request_id]
            if not finished:
                self.left_at = self.steps
                self.engine.abort(request.request_id)

    async def reset_cache(self) -> None:
        self._engine.reset_cache()

    async def replicas(self) -> list[ReplicaStatus]:
        """One, so fast that whoever comes is admitted."""
        stats = self.engine.stats
        one = ReplicaStatus(
            replica="local",
            state="ready" if self.engine.failure is None else "failed",
            reason="",
            loaded=1.0,
            updated_at=time.time(),
            running=stats.running,
            waiting=stats.waiting,
            waiting_tokens=stats.waiting_tokens,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_total=stats.kv_blocks_total,
            max_model_len=self.engine.scheduler.max_model_len,
            running_tokens=stats.running_tokens,
            block_size=BLOCK,
            max_num_seqs=MAX_SEQS,
            prefill_rate=1e9,
            decode_rate=1e9,
        )
        return [one]

    @property
    def kv_blocks_used(self) -> int:
        return self.engine.scheduler.stats().kv_blocks_used

    def at_rest(self, timeout: float = 10.0) -> bool:
        """Whether nothing is left within the time: no request, no block in use."""
        deadline = time.monotonic() + timeout
        while self._inboxes or self.kv_blocks_used:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        self.engine.close()
        self.masks.close()

    # -- what the engine calls, from its thread

    def on_tokens(self, events: list[TokenEvent]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(deliver, events, self._inboxes)

    def on_step(self, report: StepReport) -> None:
        self.steps += 1

    def on_timing(self, timing: StageTiming) -> None:
        pass

    def on_failure(self, error: CaravanError) -> None:
        for inbox in list(self._inboxes.values()):
            assert self._loop is not None
            self._loop.call_soon_threadsafe(inbox.fail, error)


@contextmanager
def running(engine: LocalEngine) -> Iterator[LocalEngine]:
    """Afterwards it must be alive, its books right and its cache empty."""
    try:
        yield engine
        assert engine.at_rest()
        assert engine.engine.failure is None
    finally:
        engine.close()
    engine.engine.scheduler.check()


def default_model(max_model_len: int, **options: Any) -> LocalEngine:
    return LocalEngine(decoders(1), max_model_len, **options)


def made_up_model(config: ModelConfig, max_model_len: int, **options: Any) -> LocalEngine:
    """With random weights."""
    [part] = split_layers(config, 1)
    tensors = DummyCheckpoint(config).tensors(part.tensor_names(config))
    decoder = Decoder(config, part, tensors, torch.float32, torch.device("cpu"), max_model_len)
    return LocalEngine([decoder], max_model_len, **options)

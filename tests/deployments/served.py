"""The gateway on a real port, in front of an engine in this process: for real clients, and for no Ray."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import uvicorn
from fastapi import FastAPI

from cluster.block_manager import BlockManager
from cluster.engine import Engine, StepReport
from cluster.errors import CaravanError, EngineStopped
from cluster.pipeline import LocalPipeline
from cluster.scheduler import Scheduler
from cluster.sequence import Request, TokenEvent
from deployments.status import ReplicaStatus
from model.batch import StageTiming
from model.config import ModelConfig, split_layers
from model.llama import Decoder
from model.stage import Stage
from model.weights import Checkpoint, open_checkpoint, resolve_path

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Request).decode
BLOCK, MAX_SEQS = 16, 64


class LocalEngineClient:
    """See `EngineClient`: an engine in this process. Requests cross msgpack, as they do on their way to a replica."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, max_model_len: int, num_blocks: int) -> None:
        stages = [_stage(config, checkpoint, max_model_len, num_blocks)]
        scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK, True),
            depth=1,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=512,
            max_model_len=max_model_len,
        )
        self.engine = Engine(scheduler, LocalPipeline(stages), self)
        self.failure: CaravanError | None = None
        self._queues: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[list[TokenEvent]]]] = {}

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        request = _decode(_encode(request))
        queue: asyncio.Queue[list[TokenEvent]] = asyncio.Queue()
        self._queues[request.request_id] = (asyncio.get_running_loop(), queue)
        finished = False
        try:
            self.engine.add(request)
            while not finished:
                events = await queue.get()
                if not events:
                    raise EngineStopped(str(self.failure))
                finished = events[-1].finish_reason is not None
                yield events
        finally:
            del self._queues[request.request_id]
            if not finished:
                self.engine.abort(request.request_id)

    async def replicas(self) -> list[ReplicaStatus]:
        stats = self.engine.stats
        return [
            ReplicaStatus(
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
                prefill_rate=1e9,  # whoever comes is admitted
                decode_rate=1e9,
            )
        ]

    # -- what the engine calls, from its thread

    def on_tokens(self, events: list[TokenEvent]) -> None:
        by_request: dict[str, list[TokenEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        for request_id, its_events in by_request.items():
            self._put(request_id, its_events)

    def on_step(self, report: StepReport) -> None: ...
    def on_timing(self, timing: StageTiming) -> None: ...
    def on_failure(self, error: CaravanError) -> None:
        self.failure = error
        for request_id in list(self._queues):
            self._put(request_id, [])

    def _put(self, request_id: str, events: list[TokenEvent]) -> None:
        entry = self._queues.get(request_id)
        if entry is not None:
            loop, queue = entry
            loop.call_soon_threadsafe(queue.put_nowait, events)

    # -- for tests

    def at_rest(self, timeout: float = 10.0) -> bool:
        """Whether nothing is left within the time: no sequence, no block in use."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            stats = self.engine.scheduler.stats()
            if not self._queues and not stats.running and not stats.waiting and stats.kv_blocks_used == 0:
                return True
            time.sleep(0.02)
        return False


def _stage(config: ModelConfig, checkpoint: Any, max_model_len: int, num_blocks: int) -> Stage:
    part = split_layers(config, 1)[0]
    tensors = checkpoint.tensors(part.tensor_names(config))
    decoder = Decoder(config, part, tensors, torch.float32, torch.device("cpu"), max_model_len)
    return Stage(decoder, num_blocks, BLOCK, num_slots=MAX_SEQS)


@contextlib.contextmanager
def default_model(path: str, max_model_len: int, num_blocks: int = 512) -> Iterator[LocalEngineClient]:
    """An engine on a real checkpoint."""
    checkpoint = open_checkpoint(resolve_path(path))
    client = LocalEngineClient(checkpoint.config, checkpoint, max_model_len, num_blocks)
    with running(client):
        yield client


@contextlib.contextmanager
def running(client: LocalEngineClient) -> Iterator[None]:
    client.engine.start()
    try:
        yield
    finally:
        client.engine.close()
        client.engine.scheduler.check()


@contextlib.contextmanager
def served(app: FastAPI, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """The application's address, by a uvicorn in its own thread; with TLS if there is a certificate with its key."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    tls: dict[str, Any] = {}
    if certificate is not None:
        tls = {"ssl_certfile": str(certificate[0]), "ssl_keyfile": str(certificate[1])}
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=5, **tls))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()

"""The gateway in front of a real engine in this process: the default model, no Ray, no sockets."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import httpx
import openai

from cluster.block_manager import BlockManager
from cluster.engine import Engine, StepReport
from cluster.errors import CaravanError
from cluster.pipeline import LocalPipeline
from cluster.scheduler import Scheduler
from cluster.sequence import Request, TokenEvent
from deployments.config import parse_app_config
from deployments.http import create_gateway
from deployments.status import ReplicaStatus
from deployments.token_link import Inbox, deliver
from model.batch import StageTiming
from model.grammar import Masks
from model.stage import Stage
from tests import golden
from tests.cluster.test_golden import BLOCK, decoders
from tests.deployments.test_gateway import Recorded, tokenizer

ARGS = {
    "model": {"path": golden.MODEL, "name": "smol", "max_model_len": 512},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.1},
    "gateway": {"resume_attempts": 3},
}


class LocalClient:
    """An EngineClient, and the engine behind it. Counts the engine's steps."""

    def __init__(self, stages: int = 1, num_blocks: int = 300, prefix_caching: bool = True) -> None:
        scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK, prefix_caching),
            depth=stages,
            max_num_seqs=32,
            max_num_batched_tokens=512,
            max_model_len=512,
        )
        self.pipeline = LocalPipeline([Stage(decoder, num_blocks, BLOCK, 32) for decoder in decoders(stages)])
        self.engine = Engine(scheduler, self.pipeline, self)
        self.masks = Masks(tokenizer, self.pipeline.wake)
        self.steps = 0
        self.requests: list[Request] = []
        self._inboxes: dict[str, Inbox] = {}
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
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
                self.engine.abort(request.request_id)

    async def replicas(self) -> list[ReplicaStatus]:
        return []

    @property
    def kv_blocks_used(self) -> int:
        return self.engine.scheduler.stats().kv_blocks_used

    def close(self) -> None:
        self.engine.close()
        self.masks.close()

    def on_tokens(self, events: list[TokenEvent]) -> None:
        self._loop.call_soon_threadsafe(deliver, events, self._inboxes)

    def on_step(self, report: StepReport) -> None:
        self.steps += 1

    def on_timing(self, timing: StageTiming) -> None:
        pass

    def on_failure(self, error: CaravanError) -> None:
        for inbox in list(self._inboxes.values()):
            self._loop.call_soon_threadsafe(inbox.fail, error)


class Service:
    """Everything, with openai-python as the client."""

    def __init__(self, client: LocalClient, gateway: dict[str, Any] | None = None) -> None:
        self.engine = client
        self.metrics = Recorded()
        self.app = create_gateway(
            parse_app_config(ARGS | {"gateway": gateway or ARGS["gateway"]}), client, self.metrics
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        self.openai = openai.AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=self.http)

    async def post(self, path: str, **body: Any) -> Any:
        """The JSON of an answer that must be 200."""
        response = await self.http.post(path, json={"model": "smol", **body})
        assert response.status_code == 200, response.text
        return response.json()

    async def complete(self, prompt: Any = "Once upon a time", **body: Any) -> list[dict[str, Any]]:
        """Choices."""
        return list((await self.post("/v1/completions", prompt=prompt, **body))["choices"])


def with_service(test: Callable[[Service], Awaitable[None]], **options: Any) -> None:
    """Run `test`; afterwards the engine must be alive, its books right and its cache empty."""

    async def main() -> None:
        client = LocalClient(**options)
        service = Service(client)
        try:
            await test(service)
            for _ in range(200):
                if client.kv_blocks_used == 0:
                    break
                await asyncio.sleep(0.01)
            assert client.engine.failure is None
            assert client.kv_blocks_used == 0
        finally:
            service.app.state.gateway.close()
            await asyncio.to_thread(client.close)
        client.engine.scheduler.check()

    asyncio.run(main())

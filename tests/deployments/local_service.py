"""The gateway in front of a real engine in this process: the default model, no Ray, no sockets."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai

from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from tests import golden
from tests.cluster.test_golden import decoders
from tests.deployments.gateway.test_gateway import Recorded
from tests.deployments.local_engine import LocalEngine, running

ARGS: dict[str, Any] = {
    "model": {"path": golden.MODEL, "name": "smol", "max_model_len": 256},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.1},
    "gateway": {"resume_attempts": 3},
}


class Service:
    """Everything, with openai-python as the client."""

    def __init__(self, client: LocalEngine, gateway: dict[str, Any] | None = None) -> None:
        self.engine = client
        self.metrics = Recorded()
        model = ARGS["model"] | {"max_model_len": client.engine.scheduler.max_model_len}
        config = parse_app_config(ARGS | {"model": model, "gateway": gateway or ARGS["gateway"]})
        self.app = create_gateway(config, client, self.metrics)
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


def with_service(
    test: Callable[[Service], Awaitable[None]], stages: int = 1, max_model_len: int = 256, **options: Any
) -> None:
    """Run `test`; afterwards the engine must be alive, its books right and its cache empty."""
    with_engine(test, LocalEngine(decoders(stages), max_model_len, **options))


def with_engine(test: Callable[[Service], Awaitable[None]], engine: LocalEngine) -> None:
    async def main() -> None:
        with running(engine):
            service = Service(engine)
            try:
                await test(service)
                assert await asyncio.to_thread(engine.at_rest)
            finally:
                service.app.state.gateway.close()

    asyncio.run(main())

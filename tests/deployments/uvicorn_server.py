"""The gateway behind a uvicorn of its own, as Serve's direct ingress runs it, with an engine that only says words.

`python -m tests.deployments.uvicorn_server PORT` serves until it is ended.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator

import uvicorn

from cluster.scheduling.sequence import Request, TokenEvent
from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine

LIMITS = {
    "resume_attempts": 0, "max_body_bytes": 1_000_000, "max_buffered_bytes": 20_000_000, "body_timeout_s": 1.0,
    "write_timeout_s": 1.0,
}  # fmt: skip


class Talking(ScriptedEngine):
    """A token every 5 ms, as many as are wanted."""

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        self.open += 1
        try:
            for n in range(1, request.sampling.max_tokens + 1):
                await asyncio.sleep(0.005)
                reason = "length" if n == request.sampling.max_tokens else None
                yield [TokenEvent(request.request_id, 500, reason, -0.5, [(500, -0.5)], 0)]
        finally:
            self.open -= 1


def main(port: int) -> None:
    engine = Talking()
    app = create_gateway(parse_app_config({**ARGS, "gateway": LIMITS}), engine, Recorded())

    @app.get("/open")
    async def streams() -> int:
        return engine.open

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", access_log=False, timeout_keep_alive=30)


if __name__ == "__main__":
    main(int(sys.argv[1]))

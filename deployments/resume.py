"""Streams that outlive their engine: what one engine did not finish, another one continues.

A request resumes as a longer prompt, what was already sent being part of it, with the same seed and what is left of the
budget. Draws depend on (seed, position) alone, so the client gets the tokens it would have got.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

import msgspec

from cluster.errors import EngineStopped
from cluster.sequence import Request, TokenEvent
from deployments.engine_client import EngineClient, MetricsRecorder
from deployments.status import ReplicaStatus

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 4.0


class ResumingEngineClient:
    """See `EngineClient`. Raises `EngineStopped` once `attempts` are used up, or if no engine takes over in time."""

    def __init__(self, engine: EngineClient, attempts: int, timeout_s: float, recorder: MetricsRecorder) -> None:
        self._engine = engine
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._recorder = recorder

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        emitted: list[int] = []
        deadline: float | None = None  # for the next token, while an engine is being looked for
        for attempt in range(self._attempts + 1):
            stream = self._engine.generate(_attempt(request, attempt, emitted))
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    events = await anext(stream)
                if deadline is not None:
                    self._recorder.inc("streams_resumed_total")
                    deadline = None
                while True:
                    emitted += [event.token_id for event in events]
                    finished = events[-1].finish_reason is not None
                    yield events
                    if finished:
                        return
                    events = await anext(stream)
            except TimeoutError:
                raise EngineStopped(f"no engine took the stream over within {self._timeout_s:g} s") from None
            except (EngineStopped, StopAsyncIteration) as error:
                if attempt == self._attempts:
                    raise EngineStopped(str(error) or "the engine ended the stream early") from error
                now = time.monotonic()
                deadline = deadline or now + self._timeout_s
                log.warning("a stream lost its engine (%s) after %d tokens; resuming it", error, len(emitted))
            finally:
                await stream.aclose()
            await asyncio.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))

    async def replicas(self) -> list[ReplicaStatus]:
        return await self._engine.replicas()


def _attempt(request: Request, attempt: int, emitted: list[int]) -> Request:
    """Under an id of its own: should the lost engine still send something, nobody listens to it."""
    if attempt == 0:
        return request
    return msgspec.structs.replace(request.resume(emitted), request_id=f"{request.request_id}-{attempt}")

"""Streams that outlive their engine: what one engine did not finish, another one continues.

A request resumes as a longer prompt, what was already sent being part of it, with the same seed and what is left of the
budget. Draws depend on (seed, position) alone, so the client gets the tokens it would have got.

A request may also be what its engines died of. It says to the next one how many it has lost in a row, so that the
engine can tell it from those that were there by chance (`Scheduler.restart`), and end it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Literal

import msgspec

from cluster.errors import EngineLeaving, EngineStopped, MoveCause
from cluster.scheduling.sequence import MAX_PENDING_TOKENS, Request, TokenEvent
from deployments.engine.board import ReplicaStatus
from deployments.gateway.engine_client import EngineClient
from deployments.metrics import MetricsRecorder
from deployments.telemetry.record import current

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 4.0


class Search:
    """The time in which a stream has no engine."""

    def __init__(self, cause: Literal["lost"] | MoveCause, timeout_s: float) -> None:
        self.cause = cause
        self._timeout_s = timeout_s
        self._began = time.monotonic()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._timeout_s - self.age_s)


class ResumingEngineClient:
    """See `EngineClient`. Raises `EngineStopped` once `attempts` are used up, or if no engine takes over in time."""

    def __init__(self, engine: EngineClient, attempts: int, timeout_s: float, recorder: MetricsRecorder) -> None:
        self._engine = engine
        self.attempts = attempts
        self.timeout_s = timeout_s
        self._recorder = recorder

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        emitted: list[int] = []
        lost = moves = deaths = prompt_logprobs = 0
        search: Search | None = None  # for the next token, while an engine is being looked for
        while True:
            begun = len(emitted)
            stream = self._engine.generate(_attempt(request, lost + moves, emitted, deaths, prompt_logprobs))
            try:
                async with asyncio.timeout(search.remaining_s if search is not None else None):
                    events = await anext(stream)
                if search is not None:
                    self._recorder.inc("streams_resumed_total", cause=search.cause)
                    self._recorder.observe("stream_pause_seconds", search.age_s)
                    now = time.monotonic()
                    name = "recovery" if search.cause == "rebuilding" else "resume"
                    current().mark(name, now - search.age_s, now, cause=search.cause)
                    search = None
                while True:
                    emitted += [event.token_id for event in events if event.has_token]
                    prompt_logprobs += sum(len(event.prompt_logprobs or ()) for event in events)
                    finished = events[-1].finish_reason is not None
                    yield events
                    if finished:
                        return
                    events = await anext(stream)
            except TimeoutError:
                raise EngineStopped(f"no engine took the stream over within {self.timeout_s:g} s") from None
            except EngineLeaving as error:  # planned: nothing is wrong with the next one
                moves += 1
                deaths = _deaths(deaths, len(emitted) - begun) if error.cause == "rebuilding" else deaths
                search = search or Search(error.cause, self.timeout_s)
                log.info("%s; its stream moves on after %d tokens", error, len(emitted))
            except (EngineStopped, StopAsyncIteration) as error:
                if lost >= self.attempts:
                    raise EngineStopped(str(error) or "the engine ended the stream early") from error
                search = search or Search("lost", self.timeout_s)
                log.warning("a stream lost its engine (%s) after %d tokens; resuming it", error, len(emitted))
                await asyncio.sleep(min(FIRST_PAUSE_S * 2**lost, LONGEST_PAUSE_S))
                lost += 1
                deaths = _deaths(deaths, len(emitted) - begun)
            finally:
                await stream.aclose()

    async def reset_cache(self) -> None:
        await self._engine.reset_cache()

    async def replicas(self) -> list[ReplicaStatus]:
        return await self._engine.replicas()


def _attempt(request: Request, attempt: int, emitted: list[int], deaths: int, prompt_logprobs: int) -> Request:
    """Under an id of its own: should the lost engine still send something, nobody listens to it."""
    if attempt == 0:
        return request
    return msgspec.structs.replace(
        request.resume(emitted),
        request_id=f"{request.request_id}-{attempt}",
        num_prompt_logprobs=prompt_logprobs,
        deaths=deaths,
    )


def _deaths(before: int, num_tokens: int) -> int:
    """In a row, after one more; what was under way at the one before is done once an engine has given `num_tokens`."""
    return before + 1 if num_tokens <= MAX_PENDING_TOKENS else 1

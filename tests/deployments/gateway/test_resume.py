"""Streams whose engines fail, against scripted engines."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from cluster.errors import EngineStopped, RequestRejected
from cluster.scheduling.sequence import NO_TOKEN, Request, TokenEvent
from deployments.engine.board import ReplicaStatus
from deployments.gateway import resume
from deployments.gateway.resume import ResumingEngineClient
from model.batch import TokenLogprobs
from model.sampling_params import SamplingParams


class Recorded:
    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def inc(self, name: str, value: float = 1.0, **_: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + value

    def observe(self, name: str, value: float, **_: str) -> None:
        assert name == "stream_pause_seconds"
        assert value >= 0


class FailingEngine:
    """Counts on from a request's last token; attempt i fails after `lives[i]` tokens, the last one does not."""

    def __init__(self, *lives: int, error: Exception | None = None, silent: bool = False) -> None:
        self.lives = list(lives)
        self.error = error or EngineStopped("a node went down")
        self.silent = silent  # later attempts say nothing at all
        self.requests: list[Request] = []
        self.closed = 0

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        self.requests.append(request)
        attempt = len(self.requests) - 1
        try:
            if attempt and self.silent:
                await asyncio.sleep(60)
            done = len(request.output_ids)
            life = self.lives[attempt] if attempt < len(self.lives) else 1000
            for token in range(done, request.sampling.max_tokens):
                if token - done == life:
                    raise self.error
                last = token == request.sampling.max_tokens - 1
                yield [TokenEvent(request.request_id, token, "length" if last else None)]
        finally:
            self.closed += 1

    async def reset_cache(self) -> None:
        raise NotImplementedError

    async def replicas(self) -> list[ReplicaStatus]:
        return []


def run(engine: FailingEngine, attempts: int = 3, timeout: float = 5.0, recorder: Any = None) -> list[int]:
    request = Request(request_id="r", token_ids=[7], sampling=SamplingParams(max_tokens=10, seed=3, temperature=0.5))

    async def main() -> list[int]:
        client = ResumingEngineClient(engine, attempts, timeout, recorder or Recorded())
        return [event.token_id async for events in client.generate(request) for event in events]

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize("lives", [(), (0,), (1,), (9,), (3, 3), (0, 0, 0), (5, 0, 4)])
def test_every_token_comes_once_whenever_engines_fail(lives: tuple[int, ...]) -> None:
    engine, recorder = FailingEngine(*lives), Recorded()
    assert run(engine, recorder=recorder) == list(range(10))
    assert len(engine.requests) == len(lives) + 1 == engine.closed
    assert len({request.request_id for request in engine.requests}) == len(engine.requests)
    assert all(request.sampling.seed == 3 and request.token_ids == [7] for request in engine.requests)
    assert engine.requests[-1].output_ids == list(range(sum(lives)))
    resumed = sum(life > 0 for life in (*lives[1:], 1000)) if lives else 0
    assert recorder.counts.get("streams_resumed_total", 0) == resumed


def test_no_more_attempts_than_allowed() -> None:
    engine = FailingEngine(1, 1, 1, 1)
    with pytest.raises(EngineStopped, match="a node went down"):
        run(engine, attempts=2)
    assert len(engine.requests) == 3
    with pytest.raises(EngineStopped):
        run(FailingEngine(4), attempts=0)


def test_a_request_that_can_never_run_is_not_tried_again() -> None:
    engine = FailingEngine(0, error=RequestRejected("too long"))
    with pytest.raises(RequestRejected):
        run(engine)
    assert len(engine.requests) == 1


def test_no_engine_within_the_limit_ends_in_one_error() -> None:
    engine = FailingEngine(4, silent=True)
    with pytest.raises(EngineStopped, match=r"no engine took the stream over within 0\.3 s"):
        run(engine, timeout=0.3)
    assert engine.closed == 2


def test_a_client_that_leaves_closes_the_engines_stream() -> None:
    engine = FailingEngine(2)

    async def main() -> None:
        client = ResumingEngineClient(engine, 3, 5.0, Recorded())
        request = Request(request_id="r", token_ids=[7], sampling=SamplingParams(max_tokens=10, seed=3))
        stream = client.generate(request)
        for _ in range(4):
            await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert engine.closed == 2


def test_logprobs_of_a_prompt_that_an_engine_has_given_are_not_asked_for_again() -> None:
    """It is lost in the middle of the prompt: before any token."""
    requests: list[Request] = []

    class Losing(FailingEngine):
        async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
            requests.append(request)
            if len(requests) == 1:
                yield [TokenEvent("r", NO_TOKEN, prompt_logprobs=[TokenLogprobs(-1.0, [])] * 3)]
                raise EngineStopped("a node went down")
            yield [TokenEvent("r", NO_TOKEN, prompt_logprobs=[TokenLogprobs(-2.0, [])])]
            yield [TokenEvent("r", 5, "length")]

    assert run(Losing()) == [NO_TOKEN, NO_TOKEN, 5]
    assert [(one.num_prompt_logprobs, one.output_ids) for one in requests] == [(0, []), (3, [])]


def test_a_request_says_how_many_engines_it_has_lost_in_a_row() -> None:
    """Whatever was under way when one was lost is done once the next has given some tokens: then it counts anew."""
    engine = FailingEngine(0, 2, 1, 4)
    run(engine, attempts=5)
    assert [request.deaths for request in engine.requests] == [0, 1, 2, 3, 1]

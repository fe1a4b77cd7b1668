"""`caravan batch` against a real gateway: every request answered once, though it is cut, and put off."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.scheduling.sequence import Request, TokenEvent
from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from deployments.errors import ApiError
from model.weights import read_config, resolve_path
from ops.batch import BatchError, Options, Summary, read_requests, run
from tests import golden
from tests.conftest import TINY
from tests.deployments.gateway.test_gateway import Recorded
from tests.deployments.local_engine import LocalEngine, made_up_model, running
from tests.deployments.served import served

ARGS: dict[str, Any] = {
    "model": {"path": golden.MODEL, "name": "made-up", "max_model_len": 256},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.1},
}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


class Reluctant:
    """An engine that puts every third request off once; it notes their priorities."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.replicas = engine, engine.replicas
        self.asked = 0
        self.priorities: set[int] = set()

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        self.asked += 1
        self.priorities.add(request.priority)
        if self.asked % 3 == 0:
            raise ApiError(429, "wait a little", headers={"Retry-After": "0"})
        async for events in self.engine.generate(request):
            yield events


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, Reluctant]]:
    config = replace(TINY, vocab_size=read_config(resolve_path(golden.MODEL)).vocab_size)
    with running(made_up_model(config, 256)) as engine:
        reluctant = Reluctant(engine)
        app = create_gateway(parse_app_config(ARGS), reluctant, Recorded())
        with served(app) as url:
            yield url, reluctant
        app.state.gateway.close()


def written(path: Path, requests: list[Any]) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def a_list(count: int) -> list[dict[str, Any]]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 3}),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 3}),
    ]
    found = [
        {"custom_id": f"r{i}", "method": "POST", "url": kinds[i % 3][0], "body": kinds[i % 3][1]} for i in range(count)
    ]
    found[4]["body"] = {"messages": []}
    return found


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_is_answered_once_though_the_list_is_cut(service: tuple[str, Reluctant], tmp_path: Path) -> None:
    url, engine = service
    asked = read_requests(written(tmp_path / "in.jsonl", a_list(24)))
    out = tmp_path / "out.jsonl"

    class Cut(Exception):
        pass

    def cut(summary: Summary) -> None:
        if summary.answered == 7:
            raise Cut

    with pytest.raises(ExceptionGroup):
        asyncio.run(run(asked, out, Options(url, at_once=4), cut))
    assert len(results(out)) >= 7
    with out.open("a") as file:  # a line that was half written, and one that was put off to the end
        late = {"custom_id": "r20", "response": {"status_code": 503, "body": {}}, "error": None}
        file.write(json.dumps(late) + "\n" + '{"custom_id": "r')
    before = len(results_of_whole_lines(out)) - 1

    summary = asyncio.run(run(asked, out, Options(url, at_once=4)))
    found = results(out)
    assert sorted(r["custom_id"] for r in found) == sorted(r["custom_id"] for r in asked)
    assert summary.earlier == before
    assert summary.earlier + summary.answered + summary.failures.total() == 24
    failed = [r for r in found if r["response"]["status_code"] != 200]
    assert [(r["custom_id"], r["response"]["status_code"]) for r in failed] == [("r4", 400)]
    assert all(r["response"]["body"]["usage"] for r in found if r not in failed)
    assert engine.priorities == {100}
    assert asyncio.run(run(asked, out, Options(url))).answered == 0, "nothing is asked twice"


def results_of_whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


def test_results_in_order_and_retries(service: tuple[str, Reluctant], tmp_path: Path) -> None:
    url, _ = service
    asked = read_requests(written(tmp_path / "in.jsonl", a_list(12)))
    summary = asyncio.run(run(asked, tmp_path / "out.jsonl", Options(url, at_once=6, in_order=True)))
    assert [r["custom_id"] for r in results(tmp_path / "out.jsonl")] == [f"r{i}" for i in range(12)]
    assert summary.retries > 0
    assert summary.failures == {"400 messages": 1}
    assert summary.completion_tokens > 0
    nowhere = asyncio.run(run(asked[:2], tmp_path / "none.jsonl", Options("http://127.0.0.1:9", tries=1)))
    assert nowhere.failures == {"ConnectError": 2}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"), ("[]", "custom_id"), ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "url"),
        ('{"custom_id": "a", "url": "/v1/responses"}', "body"),
        ('{"custom_id": "a", "url": "/v1/responses", "body": {"stream": true}}', "stream"),
        ('{"custom_id": "a", "url": "/v1/responses", "body": {}}\n' * 2, "twice"),
    ],
)  # fmt: skip
def test_a_list_that_is_wrong_is_refused_before_anything_is_sent(tmp_path: Path, line: str, word: str) -> None:
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(BatchError, match=word):
        read_requests(tmp_path / "in.jsonl")

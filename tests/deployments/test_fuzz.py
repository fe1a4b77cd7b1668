"""Requests that no client should send, against a real engine on a small made-up model, while another stream runs.

Whatever comes in, the answer is an answer or an error in the API's form, soon; the engine lives on, its KV blocks are
free afterwards, and the other stream's tokens are those of an undisturbed run. The long forms (`-m slow`) send more
than 20,000 requests together; the short ones every so many of the same.
"""

import asyncio
import itertools
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from model.weights import read_config, resolve_path
from tests import golden
from tests.conftest import TINY
from tests.deployments.bad_inputs import (
    BODIES,
    CONSTRAINTS,
    HEADERS,
    ITEMS,
    LONGEST_BODY,
    MESSAGES,
    METHODS,
    NAME,
    OTHER_PATHS,
    ROUTES,
    TOOL_VALUES,
    VALUES,
    dumped,
)
from tests.deployments.gateway.test_gateway import Recorded
from tests.deployments.local_engine import LocalEngine, made_up_model, running
from tests.deployments.served import served

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

LONGEST, PATIENCE_S = 256, 60.0  # tokens of a sequence; an answer must have come by then
ARGS: dict[str, Any] = {
    "model": {"path": golden.MODEL, "name": NAME, "max_model_len": LONGEST},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.1},
    "gateway": {"routes": ["tgi", "watsonx", "bedrock", "sagemaker"], "resume_attempts": 0},
}


NO_HTTP = "Invalid HTTP request received."  # uvicorn's own answer to a method that does not exist


@dataclass(frozen=True)
class Case:
    """One request. With `leaves` the client goes away after the first bytes of the answer."""

    path: str
    content: bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    leaves: bool = False


class Canary(threading.Thread):
    """A client that asks for the same streams over and over and compares their tokens with those of the first time."""

    BODIES = (
        {"prompt": "A canary in a mine", "temperature": 0, "ignore_eos": True, "logprobs": 1},
        {"prompt": "Sing, bird", "temperature": 0.8, "seed": 11, "ignore_eos": True, "logprobs": 1},
    )

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._client = httpx.Client(base_url=url, timeout=PATIENCE_S)
        self._over = threading.Event()
        self.songs = [self._sing(body) for body in self.BODIES]
        assert [len(song) for song in self.songs] == [64] * len(self.BODIES)
        self.sung = 0
        self.differing: list[tuple[list[str], list[str]]] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._over.is_set():
                for body, song in zip(self.BODIES, self.songs, strict=True):
                    heard = self._sing(body)
                    self.sung += 1
                    if heard != song:
                        self.differing.append((song, heard))
        except Exception as error:
            self.failure = error

    def _sing(self, body: dict[str, Any]) -> list[str]:
        """The tokens, by their names; how many come in one chunk is up to the load."""
        whole = {"model": NAME, "stream": True, "max_tokens": 64, **body}
        with self._client.stream("POST", "/v1/completions", json=whole) as response:
            lines = [line for line in response.iter_lines() if line.startswith(("data: ", "{"))]  # no comments
            assert response.status_code == 200, lines
        assert lines[-1] == "data: [DONE]"
        choices = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
        return [token for choice in choices for token in (choice["logprobs"] or {"tokens": []})["tokens"]]

    def end(self) -> None:
        self._over.set()
        self.join(PATIENCE_S)


class Errors(logging.Handler):
    """Everything that was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(self.format(record))


class Target:
    """The service under fire."""

    def __init__(self, url: str, engine: LocalEngine, errors: Errors) -> None:
        self.url, self.engine, self.errors = url, engine, errors
        self.statuses: Counter[int] = Counter()

    def fire(self, cases: list[Case]) -> None:
        """Send all of them at once, and look at every answer."""

        async def main() -> None:
            async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S) as client:
                await asyncio.gather(*(self._send(client, case) for case in cases))

        asyncio.run(main())

    async def _send(self, client: httpx.AsyncClient, case: Case) -> None:
        headers = {"Content-Type": "application/json", **case.headers}
        request = client.build_request(case.method, case.path, content=case.content, headers=headers)
        try:
            response = await client.send(request, stream=True)
        except (httpx.ReadError, httpx.WriteError):
            assert len(case.content) > LONGEST_BODY, "only a body that is not read may be answered by hanging up"
            return
        try:
            if case.leaves:
                await anext(aiter(response.aiter_raw()), b"")
            else:
                await response.aread()
                self.check(response.status_code, response.headers.get("content-type"), response.text, case)
        finally:
            await response.aclose()

    def check(self, status: int, content_type: str | None, text: str, case: object) -> None:
        self.statuses[status] += 1
        shown = f"{case!r}"[:3000]
        assert status < 500, (status, text[:500], shown)
        assert "Traceback" not in text, shown
        assert "internal error" not in text, (text[-500:], shown)
        if status >= 400 and text and text != NO_HTTP:
            assert content_type == "application/json", shown
            said = json.loads(text)
            assert {"error", "errors", "message", "Message"} & set(said), shown
        assert not self.errors.records, (self.errors.records[:1], shown)
        assert self.engine.engine.failure is None, shown


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    config = replace(TINY, vocab_size=read_config(resolve_path(golden.MODEL)).vocab_size)
    errors = Errors()
    with running(made_up_model(config, LONGEST)) as engine:
        app = create_gateway(parse_app_config(ARGS), engine, Recorded())
        with served(app) as url:
            canary = Canary(url)
            canary.start()
            logging.getLogger().addHandler(errors)
            found = Target(url, engine, errors)
            yield found
            logging.getLogger().removeHandler(errors)
            canary.end()
        app.state.gateway.close()
        print(f"{found.statuses.total()} requests beside {canary.sung} streams; answers: {dict(found.statuses)}")
        assert found.statuses[429] == 0, "the engine must see them"
        assert canary.failure is None, repr(canary.failure)
        assert canary.differing[:1] == []
        assert canary.sung > 0


# -- every field with every bad value ----------------------------------------------------------------------------------


def matrix() -> Iterator[Case]:
    """Every field of every route with every value."""
    for path, good, fields, parameters in ROUTES:
        for name in fields:
            special = CONSTRAINTS if name == "model" and path.startswith("/v1") else []
            yield from (Case(path, dumped({**good, field: value})) for field, value in special)
            more = {"messages": MESSAGES, "inputs": MESSAGES, "input": [*MESSAGES, *ITEMS], "tools": TOOL_VALUES}
            for value in [*VALUES, *more.get(name, [])]:
                yield Case(path, dumped({**good, name: value}))
            yield Case(path, dumped({key: value for key, value in good.items() if key != name}))
        for name in parameters:
            for value in VALUES:
                yield Case(path, dumped({**good, "parameters": {**good.get("parameters", {}), name: value}}))


def batches(cases: Iterator[Case], size: int = 16) -> Iterator[list[Case]]:
    while batch := list(itertools.islice(cases, size)):
        yield batch


def test_every_197th_of_the_matrix(target: Target) -> None:
    for batch in batches(itertools.islice(matrix(), 7, None, 197)):
        target.fire(batch)


@pytest.mark.slow
def test_every_field_with_every_bad_value(target: Target) -> None:
    for batch in batches(matrix()):
        target.fire(batch)


# -- bodies that are no JSON, or hardly any ----------------------------------------------------------------------------


def odd_cases() -> Iterator[Case]:
    paths = list(dict.fromkeys(path for path, *_ in ROUTES))
    for path in paths:
        yield from (Case(path, body) for body in BODIES)
    for path, good, *_ in ROUTES:
        yield from (Case(path, dumped(good), headers=headers) for headers in HEADERS)
        yield from (Case(path, dumped(good) if method != "TRACE" else b"", method) for method in METHODS)
    for path in OTHER_PATHS:
        yield from (Case(path, b"", method) for method in METHODS)


def test_every_11th_odd_body_header_and_method(target: Target) -> None:
    for batch in batches(itertools.islice(odd_cases(), 3, None, 11)):
        target.fire(batch)


@pytest.mark.slow
def test_every_odd_body_header_and_method(target: Target) -> None:
    for batch in batches(odd_cases()):
        target.fire(batch)


# -- several things wrong at once --------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    path, good, fields, parameters = draw(st.sampled_from(ROUTES))
    body = {**good, **draw(st.dictionaries(st.sampled_from(fields), anything, max_size=4))}
    if parameters and isinstance(body.get("parameters"), dict):
        body["parameters"] = {
            **body["parameters"],
            **draw(st.dictionaries(st.sampled_from(parameters), anything, max_size=3)),
        }
    if path.startswith("/v1") and draw(st.integers(0, 3)) == 0:
        name, value = draw(st.sampled_from(CONSTRAINTS))
        body[name] = value
    return Case(path, dumped(body), leaves=draw(st.integers(0, 9)) == 0)


def storm(target: Target, examples: int, number: int) -> None:
    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @given(st.lists(cases(), min_size=8, max_size=8))
    def run(batch: list[Case]) -> None:
        target.fire(batch)

    run()


def test_several_things_wrong_at_once(target: Target) -> None:
    storm(target, 6, 1)


@pytest.mark.slow
def test_many_things_wrong_at_once(target: Target) -> None:
    storm(target, 600, 2)


# -- from the document -------------------------------------------------------------------------------------------------


def from_document(target: Target, examples: int, number: int) -> None:
    """Schemathesis: requests that the OpenAPI document allows, and ones that it does not."""
    document = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    operations = 0
    for result in document.get_all_operations():
        operation = result.ok()
        operations += 1

        @seed(number)
        @settings(
            max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(
            case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        )
        def run(case: schemathesis.Case) -> None:
            response = case.call(timeout=PATIENCE_S)
            target.check(response.status_code, response.headers.get("content-type", [None])[0], response.text, case)

        run()
    assert operations > 5


def test_requests_from_the_document(target: Target) -> None:
    from_document(target, 2, 1)


@pytest.mark.slow
def test_many_requests_from_the_document(target: Target) -> None:
    from_document(target, 150, 2)

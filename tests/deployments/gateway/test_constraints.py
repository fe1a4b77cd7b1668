"""Constrained answers over HTTP, and constraints that cannot be served."""

import asyncio
import json
import os
import re
import signal
import threading
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from deployments.errors import ApiError
from deployments.gateway import constraints
from deployments.gateway.constraints import ConstraintChecker
from model.text.constraint import Constraint
from tests import golden
from tests.cluster.test_constraints import SCHEMAS
from tests.deployments.local_service import Service, with_service

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
}


class Animal(BaseModel):
    """What people write for openai-python."""

    kind: Literal["llama", "camel"]
    age: Annotated[int, Field(ge=0, le=40)]
    owner: "Owner | None"


class Owner(BaseModel):
    name: Annotated[str, Field(max_length=8)]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "(("}, "guided_regex", "parenthesis"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "ookahead"),
    ({"guided_grammar": "root ::= foo"}, "guided_grammar", "not defined"),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"guided_json": {"type": "wizard"}}, "guided_json", "wizard"),
    ({"guided_json": {"type": "string", "pattern": "(("}}, "guided_json", "parenthesis"),
    ({"guided_json": {"type": "string", "pattern": "^a+$", "maxLength": 3}}, "guided_json", "maxLength"),
    ({"guided_json": {"type": "number", "multipleOf": 0.5}}, "guided_json", "multipleOf"),
    ({"guided_json": {"$ref": "http://example.com/x"}}, "guided_json", "URI"),
    ({"guided_json": {"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 1}]}}, "guided_json", "oneOf"),
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    ({"structured_outputs": {"json": {"type": "array", "items": 5}}}, "structured_outputs", "#/items"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format",
        "not cannot be guaranteed",
    ),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens", "guided_regex"),
]


def test_every_kind_of_constraint_and_every_bad_one() -> None:
    async def test(service: Service) -> None:
        for body, param, word in BAD:
            response = await service.http.post("/v1/completions", json={"model": "smol", "prompt": "x"} | body)
            assert response.status_code == 400, body
            error = response.json()["error"]
            assert error["param"] == param, body
            assert word in error["message"], error
            assert ".cc" not in error["message"]
        assert service.engine.requests == []

        chat: Any = service.openai.chat.completions
        ask: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "Who are you?"}]}
        schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        whole = await chat.create(**ask, response_format=schema, seed=5, n=2)
        for choice in whole.choices:
            assert choice.finish_reason == "stop"
            jsonschema.validate(json.loads(choice.message.content), PERSON)
        chunks = [c async for c in await chat.create(**ask, response_format=schema, seed=5, stream=True)]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content

        parsed = await chat.parse(**ask, response_format=Animal, seed=1)  # openai-python makes the schema
        assert isinstance(parsed.choices[0].message.parsed, Animal)

        async def text(**body: Any) -> str:
            (choice,) = await service.complete("The answer is", max_tokens=60, temperature=0, **body)
            assert choice["finish_reason"] == "stop"
            return str(choice["text"])

        assert await text(guided_choice=["maybe", 'a "quoted" é', "perhaps"]) in ("maybe", 'a "quoted" é', "perhaps")
        assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", await text(guided_regex=r"[0-9]{3}-[a-f]{2}"))
        assert await text(guided_grammar='root ::= "x" y\ny ::= "1" | "2"') in ("x1", "x2")
        assert json.loads(await text(structured_outputs={"json": {"enum": [[1, 2]]}})) == [1, 2]
        assert json.loads(await text(guided_json=json.dumps({"enum": ["q"]}), ignore_eos=True)) == "q"
        (cut,) = await service.complete("A JSON object:", response_format={"type": "json_object"}, max_tokens=12)
        assert cut["text"].lstrip().startswith("{")

    with_service(test)


@pytest.mark.slow
def test_two_hundred_requests_over_http_alone_and_mixed_with_free_text() -> None:
    async def test(service: Service) -> None:
        (free,) = await service.complete("Once upon a time", max_tokens=30, temperature=0)

        async def one(i: int) -> None:
            if i % 5 == 4 and i >= 100:
                (again,) = await service.complete("Once upon a time", max_tokens=30, temperature=0)
                assert again["text"] == free["text"]
            schema = SCHEMAS[i % 10]
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            (choice,) = await service.complete("JSON:", max_tokens=200, seed=i, response_format=form)
            assert choice["finish_reason"] == "stop", choice
            jsonschema.validate(json.loads(choice["text"]), schema)

        for start in range(0, 200, 20):
            await asyncio.gather(*(one(i) for i in range(start, start + 20)))

    with_service(test)


class FakeWorker:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Any = None
        self.gate = threading.Event()
        self.gate.set()

    def ask(self, constraint: Constraint, timeout_s: float) -> str | None:
        self.asked.append(constraint.text)
        self.gate.wait(30)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]

    def close(self) -> None:
        pass


def regex(text: str) -> Constraint:
    return Constraint("regex", text, (2,))


def checker(timeout_s: float = 5.0) -> tuple[ConstraintChecker, FakeWorker]:
    made, worker = ConstraintChecker(golden.MODEL, timeout_s), FakeWorker()
    made._worker = worker  # type: ignore[assignment]
    return made, worker


@pytest.mark.parametrize(
    ("answer", "word"),
    [("is odd", "p: is odd"), (TimeoutError(), "longer than 5 s"), (EOFError(), "cannot be compiled")],
    ids=str,
)
def test_verdicts_are_remembered(answer: Any, word: str) -> None:
    made, worker = checker()
    worker.answer = answer
    for _ in range(3):
        with pytest.raises(ApiError, match=word) as caught:
            made.check(regex("a"), "p")
        assert caught.value.status == 400
    assert worker.asked == ["a"]
    assert not made.known(regex("a"))


def test_the_memory_of_verdicts_is_bounded() -> None:
    made, _ = checker()
    for i in range(constraints.REMEMBERED + 50):
        made.check(regex(str(i)), "p")
    assert len(made._verdicts) == constraints.REMEMBERED
    assert made.known(regex("60"))
    assert not made.known(regex("10"))


def test_too_many_that_wait_are_asked_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_WAITING", 3)
    made, worker = checker()
    worker.gate.clear()
    threads = [threading.Thread(target=made.check, args=(regex(str(i)), "p")) for i in range(3)]
    for thread in threads:
        thread.start()
    while made._waiting < 3:
        pass
    with pytest.raises(ApiError) as caught:
        made.check(regex("9"), "p")
    assert caught.value.status == 503
    assert caught.value.headers["Retry-After"] == "2"
    worker.gate.set()
    for thread in threads:
        thread.join()
    made.check(regex("9"), "p")


def test_a_compiler_that_hangs_or_dies_is_replaced() -> None:
    """The real process, stopped by a signal as a grammar might stop it."""
    made = ConstraintChecker(golden.MODEL, timeout_s=1.0)
    try:
        made._timeout_s = 60.0
        made.check(regex("a+"), "p")
        process = made._worker._process
        assert process is not None
        made._timeout_s = 0.3
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ApiError, match="takes longer"):
            made.check(regex("b+"), "p")
        assert process.returncode == -signal.SIGKILL
        made._timeout_s = 60.0
        made.check(regex("c+"), "p")
    finally:
        made.close()

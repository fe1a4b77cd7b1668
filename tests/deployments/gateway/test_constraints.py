"""Constrained answers over HTTP, and constraints that cannot be served."""

import asyncio
import json
import os
import re
import signal
import time
from typing import Annotated, Any, Literal

import jsonschema
import psutil
import pytest
from pydantic import BaseModel, Field

from deployments.errors import ApiError
from deployments.gateway import constraints
from deployments.gateway.constraints import ConstraintChecker
from deployments.gateway.tenants import ANONYMOUS, Tenant
from deployments.offload import grammar_judge
from deployments.offload.grammar_judge import Patience
from model.text.constraint import Constraint
from tests import golden
from tests.cluster.test_constraints import SCHEMAS
from tests.deployments.local_service import Service, with_service

pytestmark = pytest.mark.integration

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


class FakeJudge:
    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []
        self.answer: Any = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask(self, constraint: Constraint, patience: Patience) -> str | None:
        self.asked.append((constraint.text, patience.seconds))
        await self.gate.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]

    def close(self) -> None:
        pass


def regex(text: str) -> Constraint:
    return Constraint("regex", text, (2,))


def checker(timeout_s: float = 5.0) -> tuple[ConstraintChecker, FakeJudge]:
    made, judge = ConstraintChecker(golden.MODEL, timeout_s), FakeJudge()
    made._judge = judge  # type: ignore[assignment]
    return made, judge


@pytest.mark.parametrize(
    ("answer", "word", "times"),
    [("is odd", "p: is odd", 1), (TimeoutError(), "longer than 5 s", 2), (EOFError(), "cannot be compiled", 1)],
    ids=str,
)
def test_verdicts_are_remembered(answer: Any, word: str, times: int) -> None:
    async def test() -> None:
        made, judge = checker()
        judge.answer = answer
        for _ in range(3):
            with pytest.raises(ApiError, match=word) as caught:
                await made.accept(ANONYMOUS, regex("a"), "p")
            assert caught.value.status == 400
        assert judge.asked == [("a", constraints.QUICK_S), ("a", 5.0)][:times]
        assert not made.known(regex("a"))

    asyncio.run(test())


def test_the_memory_of_verdicts_is_bounded() -> None:
    async def test() -> None:
        made, _ = checker()
        for i in range(constraints.REMEMBERED + 50):
            await made.accept(ANONYMOUS, regex(str(i)), "p")
        assert len(made._verdicts) == constraints.REMEMBERED
        assert made.known(regex("60"))
        assert not made.known(regex("10"))

    asyncio.run(test())


def test_a_tenant_with_too_many_that_wait_is_asked_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_WAITING", 3)

    async def test() -> None:
        made, judge = checker()
        judge.gate.clear()
        greedy, small = Tenant(name="greedy"), Tenant(name="small")
        count = constraints.AT_ONCE + 3
        tasks = [asyncio.create_task(made.accept(greedy, regex(str(i)), "p")) for i in range(count)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await made.accept(greedy, regex("too many"), "p")
        assert caught.value.status == 429
        assert caught.value.headers["Retry-After"] == "2"
        other = asyncio.create_task(made.accept(small, regex("other"), "p"))
        await asyncio.sleep(0)
        judge.gate.set()
        await asyncio.gather(other, *tasks)
        await made.accept(greedy, regex("too many"), "p")

    asyncio.run(test())


def test_what_is_dear_to_judge_costs_its_tenant_alone() -> None:
    """The real process. Verdicts of another tenant come while one has forty that nothing can make quick."""

    async def test() -> None:
        made = ConstraintChecker(golden.MODEL, timeout_s=2.0)
        try:
            await made.accept(ANONYMOUS, regex("a+"), "p")
            assert made._judge._process is not None
            process = psutil.Process(made._judge._process.pid)
            greedy, small = Tenant(name="greedy"), Tenant(name="small")
            bad = [regex(rf"(\w|\W){{1,{5000 + i}}}") for i in range(30)]
            tasks = [asyncio.create_task(made.accept(greedy, one, "p")) for one in bad]
            await asyncio.sleep(1.0)
            waits = []
            for i in range(3):
                started = time.monotonic()
                await made.accept(small, regex(rf"[a-f]{{{i + 1}}}"), "p")
                waits.append(time.monotonic() - started)
            assert not all(task.done() for task in tasks), "they are still at it"
            # On its turn at once; more than this only if the machine has other things to do.
            assert min(waits) < 3 * constraints.QUICK_S + 1.0, waits
            assert process.children()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await made.accept(small, regex("z"), "p")
            assert process.children() == [], "whoever has left costs nothing more"
        finally:
            made.close()

    asyncio.run(test())


def test_what_takes_too_long_or_kills_its_judge_is_refused_and_others_are_not() -> None:
    async def test() -> None:
        made = ConstraintChecker(golden.MODEL, timeout_s=0.6)
        try:
            dear = made.accept(ANONYMOUS, regex(r"(\w|\W){1,5000}"), "p")
            cheap = [made.accept(ANONYMOUS, regex(f"a{{{i + 1}}}"), "p") for i in range(8)]
            found = await asyncio.gather(dear, *cheap, return_exceptions=True)
            assert isinstance(found[0], ApiError)
            assert "takes longer than 0.6 s" in str(found[0])
            assert found[1:] == [None] * 8
        finally:
            made.close()

    asyncio.run(test())


def test_a_compiler_that_hangs_or_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real process, stopped by a signal as a grammar might stop it."""

    async def test() -> None:
        made = ConstraintChecker(golden.MODEL, timeout_s=60.0)
        try:
            await made.accept(ANONYMOUS, regex("a+"), "p")
            process = made._judge._process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            with monkeypatch.context() as patch:
                patch.setattr(grammar_judge, "ANSWER_S", 0.1)
                patch.setattr(grammar_judge, "WALL", 0.0)
                made.timeout_s = 0.3
                with pytest.raises(ApiError, match="takes longer"):
                    await made.accept(ANONYMOUS, regex("b+"), "p")
            assert process.returncode == -signal.SIGKILL
            made.timeout_s = 60.0
            await made.accept(ANONYMOUS, regex("c+"), "p")
            process = made._judge._process
            assert process is not None
            waiting = asyncio.create_task(made.accept(ANONYMOUS, regex(r"(\w|\W){1,5000}"), "p"))
            await asyncio.sleep(0.1)
            process.kill()
            with pytest.raises(ApiError, match="cannot be compiled"):
                await waiting
            await made.accept(ANONYMOUS, regex("d+"), "p")
        finally:
            made.close()

    asyncio.run(test())

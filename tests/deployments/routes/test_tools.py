"""Calls of functions in front of a real engine: every one valid, streamed or whole, though engines die."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import EngineStopped
from cluster.scheduling.sequence import Request, TokenEvent
from deployments.gateway import resume
from model.weights import read_config, resolve_path
from tests import golden
from tests.conftest import TINY
from tests.deployments.local_engine import made_up_model
from tests.deployments.local_service import Service, with_engine, with_service
from tests.deployments.tool_cases import Json, choice, problem, tool_set

pytestmark = pytest.mark.integration

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}}


def serve(test: Any) -> None:
    """A model with random weights, which writes whatever it may."""
    config = replace(TINY, vocab_size=read_config(resolve_path(golden.MODEL)).vocab_size)
    with_engine(test, made_up_model(config, 2048, num_blocks=5000))


async def streamed(service: Service, **body: Any) -> tuple[Json, str]:
    """The message that a stream's deltas add up to, and its finish_reason; how they come is checked on the way."""
    message: Json = {"role": None, "content": None, "tool_calls": []}
    reason = None
    async with service.http.stream("POST", "/v1/chat/completions", json={"stream": True, **body}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["x-accel-buffering"] == "no"
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        (event,) = json.loads(line[6:])["choices"]
        assert reason is None, "nothing comes after the end"
        reason, delta = event["finish_reason"], event["delta"]
        message["role"] = delta.get("role", message["role"])
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert call["type"] == "function"
                assert call["function"]["arguments"] == ""
                message["tool_calls"].append({"id": call["id"], "type": "function", "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert reason is not None
    return message, reason


def without_ids(calls: list[Json] | None) -> list[Json]:
    return [call["function"] for call in calls or []]


async def forced(service: Service, seed: int) -> str | None:
    """One forced call, whole and streamed; what is wrong with it, or None."""
    rng = random.Random(seed)
    tools = tool_set(rng)
    wanted, names, most = choice(rng, tools)
    body: Json = {"messages": QUESTION, "tools": tools, "tool_choice": wanted, "seed": seed, "max_tokens": 1200}
    if rng.random() < 0.5:
        body["parallel_tool_calls"], most = False, 1
    answer = await service.post("/v1/chat/completions", **body)
    (found,) = answer["choices"]
    message, reason = await streamed(service, **body)
    if (found["finish_reason"], reason) != ("tool_calls", "tool_calls"):
        return f"ends by {found['finish_reason']}, {reason}: {found['message']}"
    if found["message"]["content"] is not None or message["content"] is not None:
        return f"has content: {found['message']}"
    if without_ids(found["message"]["tool_calls"]) != without_ids(message["tool_calls"]):
        return f"streamed {message['tool_calls']}, whole {found['message']['tool_calls']}"
    if not 0 < answer["usage"]["completion_tokens"] <= 1200:
        return f"usage: {answer['usage']}"
    wrong = problem(message["tool_calls"], tools, names, most) or problem(
        found["message"]["tool_calls"], tools, names, most
    )
    return wrong and f"{wrong}; {body}"


def check_forced(seeds: range, at_once: int) -> None:
    async def test(service: Service) -> None:
        for start in seeds[::at_once]:
            found = await asyncio.gather(*(forced(service, s) for s in range(start, min(start + at_once, seeds.stop))))
            assert [wrong for wrong in found if wrong] == []

    serve(test)


def test_forced_calls_are_valid() -> None:
    check_forced(range(12), 6)  # each of them whole and streamed


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_forced_calls_are_valid() -> None:
    check_forced(range(1000, 1500), 20)


def test_auto_is_text_or_calls_and_never_half_a_call() -> None:
    check_auto(range(2), 24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_auto_many_times() -> None:
    check_auto(range(10, 60), 150)


def check_auto(seeds: range, max_tokens: int) -> None:
    async def test(service: Service) -> None:
        for seed in seeds:
            body: Json = {"messages": QUESTION, "tools": [TOOL], "seed": seed, "max_tokens": max_tokens}
            if seed % 2:  # as if the model wanted to
                body["logit_bias"] = {
                    str(i): 100 for i in service.app.state.gateway.tokenizer.encode("<", add_bos=False)
                }
            whole = (await service.post("/v1/chat/completions", **body))["choices"][0]
            message, reason = await streamed(service, **body)
            assert (message["content"] or "") == (whole["message"]["content"] or "")
            assert without_ids(message["tool_calls"]) == without_ids(whole["message"].get("tool_calls"))
            assert reason == whole["finish_reason"]
            if reason == "tool_calls":
                assert problem(message["tool_calls"], [TOOL], {"get_weather"}, 16) is None
            elif reason == "stop":
                assert "tool_calls" not in whole["message"]
            assert "<tool_call>" not in (message["content"] or "")

    with_service(test, max_model_len=2048, num_blocks=2500)


def test_a_call_survives_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream resumes below the layer that reads calls: the client sees the call that it would have seen."""
    monkeypatch.setattr(resume, "FIRST_PAUSE_S", 0.01)

    async def test(service: Service) -> None:
        body: Json = {"messages": QUESTION, "tools": [TOOL], "tool_choice": "required", "seed": 3}
        whole, _ = await streamed(service, **body)
        generate = service.engine.generate
        lives = [3, 5, 9]

        async def failing(request: Request) -> AsyncGenerator[list[TokenEvent], None]:
            life = lives.pop(0) if lives else 10_000
            stream = generate(request)
            try:
                async for events in stream:
                    yield events
                    life -= len(events)
                    if life <= 0:
                        raise EngineStopped("a node went down")
            finally:
                await stream.aclose()

        monkeypatch.setattr(service.engine, "generate", failing)
        again, reason = await streamed(service, **body)
        assert lives == []
        assert reason == "tool_calls"
        assert without_ids(again["tool_calls"]) == without_ids(whole["tool_calls"])

    serve(test)


def test_histories_choices_and_older_names() -> None:
    async def test(service: Service) -> None:
        client: Any = service.openai.chat.completions
        call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
        history = [
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "21 degrees"},
        ]
        ask: Json = {"model": "smol", "temperature": 0, "max_tokens": 20}
        text = await client.create(**ask, messages=history, tools=[TOOL], tool_choice="none")
        assert text.choices[0].finish_reason in ("stop", "length")
        assert text.choices[0].message.tool_calls is None
        bare = await client.create(**ask, messages=history)
        assert bare.usage.prompt_tokens == text.usage.prompt_tokens, "tools that may not be called are not told of"
        told = await client.create(**ask, messages=history, tools=[TOOL])
        assert told.usage.prompt_tokens > text.usage.prompt_tokens

        functions = {"functions": [TOOL["function"]], "function_call": {"name": "get_weather"}, "seed": 1}
        old = await client.create(model="smol", messages=QUESTION, **functions)
        assert old.choices[0].finish_reason == "function_call"
        assert json.loads(old.choices[0].message.function_call.arguments)["city"] is not None
        chunks = [c async for c in await client.create(model="smol", messages=QUESTION, **functions, stream=True)]
        parts = [c.choices[0].delta.function_call for c in chunks if c.choices[0].delta.function_call]
        assert parts[0].name == "get_weather"
        assert "".join(p.arguments for p in parts) == old.choices[0].message.function_call.arguments
        old_history = [
            {"role": "assistant", "content": None, "function_call": call["function"]},
            {"role": "function", "name": "get_weather", "content": "21 degrees"},
        ]
        await client.create(**ask, messages=[*QUESTION, *old_history])

        several = await client.create(
            model="smol", messages=QUESTION, tools=[TOOL], tool_choice="required", n=2, seed=4, stop=["{", "Paris"]
        )
        for answer in several.choices:
            found = [c.model_dump() for c in answer.message.tool_calls]
            assert problem(found, [TOOL], {"get_weather"}, 16) is None, "stop strings are looked for in text alone"
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["sun", "rain"]}}}
        mixed = await client.create(model="smol", messages=QUESTION, tools=[TOOL], response_format=form, seed=2)
        message = mixed.choices[0].message
        assert message.tool_calls or json.loads(message.content) in ("sun", "rain")

    serve(test)


def function(**parts: Any) -> Json:
    return {"type": "function", "function": {"name": "f", **parts}}


BAD: list[tuple[Json, str, str]] = [
    ({"tools": [function(parameters={"type": "array"})]}, "tools", "must be of type object"),
    ({"tools": [function(parameters={"type": "object", "properties": {"a": {"not": {}}}})]}, "tools", r"tools[0]"),
    ({"tools": [function(), function()]}, "tools", "same name"),
    ({"tools": [function(name="f x")]}, "tools", "name"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "function"),
    ({"tools": [function()] * 200}, "tools", "128"),
    ({"tools": [function()], "tool_choice": "sometimes"}, "tool_choice", "must be"),
    ({"tools": [function()], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "function g"),
    ({"tools": [function()], "tool_choice": {"type": "function"}}, "tool_choice", "name"),
    ({"tools": [function()], "tool_choice": 5}, "tool_choice", "string or an object"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call", "must be"),
    ({"functions": [{"name": "f"}], "tools": [function()]}, "functions", "newer name"),
    ({"tools": [function()], "min_tokens": 3}, "min_tokens", "tools"),
    ({"tools": [function()], "response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
     "response_format", "not cannot"),
]  # fmt: skip


def test_what_cannot_be_called_is_refused_by_name() -> None:
    async def test(service: Service) -> None:
        for body, param, word in BAD:
            response = await service.http.post("/v1/chat/completions", json={"messages": QUESTION, **body})
            assert response.status_code == 400, (body, response.text)
            error = response.json()["error"]
            assert (error["param"], word in error["message"]) == (param, True), error
        lenient = function(parameters={"type": "object", "properties": {"a": {"not": {}}}}, strict=False)
        answer = await service.post(
            "/v1/chat/completions", messages=QUESTION, tools=[lenient], tool_choice="required", max_tokens=40
        )
        assert answer["choices"][0]["message"]["tool_calls"]
        assert len(service.engine.requests) == 1

    serve(test)

"""The Responses API in front of a real engine, read by openai-python, which knows every event's fields."""

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from deployments.routes.openai_protocol import parse
from deployments.routes.responses_protocol import ResponsesRequest
from tests.deployments.gateway.test_gateway import Run, run  # noqa: F401  # a fixture
from tests.deployments.gateway.test_gateway import Service as ScriptedService
from tests.deployments.local_service import Service, with_service
from tests.deployments.routes.test_tools import WEATHER

QUESTION = "What is the capital of France?"
TOOL = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": WEATHER, "strict": True}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def events_of(service: Service, **body: Any) -> list[Any]:
    """The events of a stream, each judged by openai-python's own type of it."""
    async with service.http.stream("POST", "/v1/responses", json={"model": "smol", "stream": True, **body}) as answer:
        assert answer.status_code == 200, await answer.aread()
        text = (await answer.aread()).decode()
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(EVENT.validate_python(event, strict=False))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def test_text_whole_and_streamed() -> None:
    async def test(service: Service) -> None:
        ask: dict[str, Any] = {"input": QUESTION, "temperature": 0, "max_output_tokens": 20}
        whole = await service.openai.responses.create(model="smol", **ask)
        chat = await service.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=20
        )
        assert whole.output_text == chat["choices"][0]["message"]["content"]
        assert whole.status == "completed"
        assert whole.usage is not None
        assert whole.usage.output_tokens == chat["usage"]["completion_tokens"]
        assert whole.model_dump()["store"] is False

        events = await events_of(service, **ask)
        kinds = [event.type.removeprefix("response.") for event in events]
        deltas = kinds.count("output_text.delta")
        assert kinds == [
            "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
            "output_text.done", "content_part.done", "output_item.done", "completed",
        ]  # fmt: skip
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        assert events[-1].response.output_text == whole.output_text
        assert events[-1].response.usage.output_tokens == whole.usage.output_tokens

        cut = await service.openai.responses.create(model="smol", input=QUESTION, max_output_tokens=2)
        assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert (await events_of(service, input=QUESTION, max_output_tokens=2))[-1].type == "response.incomplete"

        logged = await service.openai.responses.create(
            model="smol", input=QUESTION, max_output_tokens=5, include=["message.output_text.logprobs"], top_logprobs=2
        )
        (part,) = logged.output[0].content  # type: ignore[union-attr]
        assert [len(x.top_logprobs) for x in part.logprobs] == [2] * 5  # type: ignore[union-attr]
        form = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["sun", "rain"]}, "strict": True}}
        formed = await service.post("/v1/responses", input=QUESTION, text=form, seed=1)
        assert json.loads(formed["output"][0]["content"][0]["text"]) in ("sun", "rain")

    with_service(test)


def test_calls_and_their_results() -> None:
    async def test(service: Service) -> None:
        ask: dict[str, Any] = {"input": QUESTION, "tools": [TOOL], "tool_choice": "required", "seed": 3}
        whole = Response.model_validate(await service.post("/v1/responses", **ask, parallel_tool_calls=False))
        (call,) = whole.output
        assert call.type == "function_call"
        assert json.loads(call.arguments)["city"] is not None
        events = await events_of(service, **ask, parallel_tool_calls=False)
        kinds = [event.type.removeprefix("response.") for event in events]
        deltas = kinds.count("function_call_arguments.delta")
        assert kinds == [
            "created", "in_progress", "output_item.added", *["function_call_arguments.delta"] * deltas,
            "function_call_arguments.done", "output_item.done", "completed",
        ]  # fmt: skip
        assert events[2].item.name == "get_weather"
        assert events[2].item.arguments == ""
        assert "".join(e.delta for e in events if e.type.endswith("arguments.delta")) == call.arguments
        assert events[-1].response.output[0].arguments == call.arguments
        history = [
            {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"},
        ]
        again = await service.post(
            "/v1/responses", input=history, tools=[TOOL], tool_choice="none", max_output_tokens=5
        )
        assert again["output"][0]["type"] == "message"

    with_service(test, max_model_len=1024)


def test_input_becomes_the_chat_that_it_is() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
    ]
    body = {"input": items, "instructions": "Be brief.", "logit_bias": {"5": 1}, "stop": "x", "seed": 7}
    chat = parse(ResponsesRequest, body).as_chat()
    found = [message.as_template_input for message in chat.messages]
    assert [m["content"] for m in found] == ["Be brief.\n\nBe kind.", "a", "b", "x"]
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool"]
    assert [c["function"]["name"] for c in found[2]["tool_calls"]] == ["f", "g"]
    assert (chat.logit_bias, chat.stop, chat.seed) == ({5: 1}, ["x"], 7)


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept"),
        ({"conversation": "c"}, "conversation", "nothing is kept"),
        ({"store": True}, "store", "nothing is kept"),
        ({"background": True}, "background", "stream"),
        ({"prompt": {"id": "x"}}, "prompt", "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_image"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input", "role"),
        ({"input": [{"type": "function_call"}]}, "input", "name"),
        ({"input": [{"type": "function_call_output", "output": 5}]}, "input", "content"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"include": ["file_search_call.results"]}, "include", "file_search"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"text": {"format": {"type": "xml"}}}, "text", "type"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_is_refused_is_named_as_it_is_named_here(run: Run, body: dict[str, Any], param: str, word: str) -> None:  # noqa: F811
    async def test(service: ScriptedService) -> None:
        answer = await service.client.post("/v1/responses", json={"input": "x", **body})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], word in error["message"]) == (400, param, True), error

    run(test)

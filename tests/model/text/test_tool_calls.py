"""Calls of functions in text: what the grammar lets through is what the reader reads, however the text is cut."""

import json
import random
from typing import Any

import pytest
import xgrammar

from model.text.tool_calls import HERMES, LLAMA3_JSON, MISTRAL, CallReader, CallSyntax, Function, structural_tag
from model.text.tool_prompt import with_calls_apart, with_short_ids, with_tools_as_text

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
FUNCTIONS = [Function("weather", WEATHER), Function("now", {"type": "object", "properties": {}})]
CALLS = [("weather", '{"city": "a } \\" ]{ \\\\"}'), ("now", "{}"), ("weather", '{"city": "\\u007d", "days": -3}')]
SYNTAXES = [HERMES, MISTRAL, LLAMA3_JSON]


def read(syntax: CallSyntax, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    reader, text, calls = CallReader(syntax), "", list[list[str]]()
    for piece in pieces:
        shown, deltas = reader.push(piece)
        text += shown
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    return text + reader.finish(), [(name, arguments) for name, arguments in calls]


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randrange(20)))) if len(text) > 1 else []
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["hermes", "mistral", "llama3"])
def test_what_is_written_is_read_wherever_it_is_cut(syntax: CallSyntax) -> None:
    rng = random.Random(0)
    for _ in range(300):
        calls = rng.choices(CALLS, k=rng.randrange(1, 4))
        before = rng.choice(["", "I look. ", "a <tool_cal \n\n", "x [TOOL_", '{"nam', " \n"])
        found = read(syntax, cut(before + syntax.write(calls), rng))
        assert found == (before.rstrip(), calls)
    for text in ("no call", "a <tool_cal", "ends white \n", '{"nam', "", "[TOOL_CALL"):
        assert read(syntax, cut(text, rng)) == (text, [])


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["hermes", "mistral", "llama3"])
def test_the_grammar_lets_good_answers_through_and_no_others(syntax: CallSyntax) -> None:
    def fits(text: str, most: int, answer: Any) -> bool:
        tag = structural_tag(syntax, FUNCTIONS, most=most, answer=answer)
        grammar = xgrammar.Grammar.from_structural_tag(json.dumps(tag))
        return bool(xgrammar.testing._is_grammar_accept_string(grammar, text))

    one, two = syntax.write(CALLS[1:2]), syntax.write(CALLS[:2])
    form = {"type": "json_schema", "json_schema": {"type": "integer"}}
    for text, most, answer, good in [
        (one, 1, None, True), (two, 2, None, True), (two, 1, None, False), ("", 1, None, False), ("hi", 1, None, False),
        ("hi", 1, "text", True), ("hi " + two, 2, "text", True), ("", 1, "text", True), (one + "x", 1, "text", False),
        (syntax.write([("never", "{}")]), 1, "text", False), (syntax.write([("weather", "{}")]), 1, "text", False),
        (syntax.write([("weather", '{"city": 5}')]), 1, None, False), (syntax.trigger, 1, "text", False),
        ("5", 1, form, True), (one, 1, form, True), ("hi", 1, form, False),
    ]:  # fmt: skip
        assert fits(text, most, answer) == good, (text, most, answer)


def test_a_call_that_is_cut_short_shows_what_there_was() -> None:
    text = HERMES.write([CALLS[0]])
    assert read(HERMES, [text[:-30]]) == (
        "",
        [("weather", CALLS[0][1][: len(CALLS[0][1]) + len("}\n</tool_call>") - 30])],
    )
    assert read(HERMES, ["so <tool_call>\n{"]) == ("so", [])


def test_tools_as_text_for_templates_that_know_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "2"}]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "tool", "tool_call_id": "2", "content": "twelve"},
        {"role": "user", "content": "Sure?"},
    ]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    found = with_tools_as_text(messages, tools, "Do it.")
    assert [message["role"] for message in found] == ["system", "user", "assistant", "user"]
    assert '{"name": "now", "parameters": {}}' in found[0]["content"]
    assert found[0]["content"].endswith("Do it.")
    assert found[2]["content"] == HERMES.write([("now", "{}")] * 2)
    assert found[3]["content"].count("<tool_response>") == 2
    assert found[3]["content"].endswith("\nSure?")
    by_user = with_tools_as_text(messages, tools, "", listed_by="user")
    assert [message["role"] for message in by_user] == ["user", "assistant", "user"]
    assert with_tools_as_text(messages[:1], [], "") == messages[:1]
    apart = with_calls_apart(messages)
    assert [m["role"] for m in apart] == ["user", "assistant", "tool", "assistant", "tool", "user"]
    short = with_short_ids(messages)
    assert short[1]["tool_calls"][0]["id"] == short[2]["tool_call_id"]
    assert len(short[2]["tool_call_id"]) == 9

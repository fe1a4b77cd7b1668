"""Calls of functions in a model's answer: how they are written, the grammar that keeps them well-formed, their reader.

A call's arguments follow its parameters' JSON schema by construction: the answer is constrained, and a call is read
from the very literals that its grammar is made of.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

MAX_CALLS = 16  # in one answer: a small model may not go on for ever


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """`begin` NAME `middle` ARGUMENTS `}`, several with `between` them, after `start` and before `finish`.

    Free text may not hold `trigger`, with which `start` or `begin` begins.
    """

    start: str
    begin: str
    middle: str
    between: str
    finish: str
    several: bool = True  # whether the model writes more than one in an answer

    @property
    def trigger(self) -> str:
        return self.start.rstrip() or self.begin

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls by name and arguments, as the model would have written them."""
        written = self.between.join(f"{self.begin}{name}{self.middle}{arguments}}}" for name, arguments in calls)
        return f"{self.start}{written}{self.finish}"


HERMES = CallSyntax(
    "<tool_call>\n", '{"name": "', '", "arguments": ', "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
)
MISTRAL = CallSyntax("[TOOL_CALLS][", '{"name": "', '", "arguments": ', ", ", "]")
LLAMA3_JSON = CallSyntax("", '{"name": "', '", "parameters": ', "; ", "", several=False)
# By ChatTemplate.tool_format; Hermes' way is also that of models that were taught none.
SYNTAXES: dict[str | None, CallSyntax] = {
    "hermes": HERMES,
    "mistral": MISTRAL,
    "llama3_json": LLAMA3_JSON,
    None: HERMES,
}
MARKS = frozenset({"<tool_call>", "</tool_call>", "[TOOL_CALLS]"})  # text, even where they are control tokens


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called: its name and its parameters' JSON schema."""

    name: str
    parameters: Json


def structural_tag(
    syntax: CallSyntax, functions: Sequence[Function], *, most: int, answer: Json | Literal["text"] | None
) -> Json:
    """The grammar of an answer with up to `most` calls.

    `answer`: what may come instead of calls, as a structural tag's format; "text": any text, which calls may follow;
    None: nothing, at least one call must come.
    """
    items = [
        {
            "type": "tag",
            "begin": f"{syntax.begin}{function.name}{syntax.middle}",
            "content": {"type": "json_schema", "json_schema": function.parameters},
            "end": "}",
        }
        for function in functions
    ]
    item: Json = items[0] if len(items) == 1 else {"type": "or", "elements": items}
    more: Json = {"type": "sequence", "elements": [_literal(syntax.between), item]}
    parts = [_literal(syntax.start)] * bool(syntax.start) + [item]
    parts += [{"type": "repeat", "min": 0, "max": most - 1, "content": more}] * (most > 1)
    parts += [_literal(syntax.finish)] * bool(syntax.finish)
    calls: Json = {"type": "sequence", "elements": parts}
    if answer == "text":
        text = {"type": "any_text", "excludes": [syntax.trigger]}
        calls = {"type": "sequence", "elements": [text, {"type": "optional", "content": calls}]}
    elif answer is not None:
        calls = {"type": "or", "elements": [answer, calls]}
    return {"type": "structural_tag", "format": calls}


def _literal(text: str) -> Json:
    return {"type": "const_string", "value": text}


@dataclass(slots=True)
class CallDelta:
    """What a text adds to a call: its name with the first one, then parts of its arguments, which add up to JSON."""

    index: int
    name: str | None
    arguments: str


class CallReader:
    """Splits an answer that comes in pieces into text and calls.

    What could be the beginning of a call is held back, with the white space before it, which is dropped if it is one.
    """

    def __init__(self, syntax: CallSyntax) -> None:
        self._syntax = syntax
        self._rest = ""  # not yet taken apart
        self._place: Literal["text", "between", "name", "arguments"] = "text"
        self._json = _JSONValue()
        self.count = 0  # calls that have begun

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """The text and the parts of calls that are certain now and were not before."""
        self._rest += text
        shown, deltas = "", list[CallDelta]()
        while True:
            place, before = self._place, self._rest
            if place == "text":
                shown += self._text()
            elif place == "between":
                self._between()
            elif place == "name":
                deltas += self._name()
            else:
                deltas += self._arguments()
            if (place, before) == (self._place, self._rest):
                return shown, deltas

    def finish(self) -> str:
        """What was held back and was no call after all."""
        held, self._rest = self._rest, ""
        return held if self._place == "text" else ""

    def _text(self) -> str:
        """Up to the first call, or to what may become one."""
        text, trigger = self._rest, self._syntax.trigger
        if (at := text.find(trigger)) >= 0:
            self._rest, self._place = text[at:], "between"
            return text[:at].rstrip()
        held = next((n for n in range(min(len(text), len(trigger) - 1), 0, -1) if text.endswith(trigger[:n])), 0)
        end = len(text[: len(text) - held].rstrip())
        self._rest = text[end:]
        return text[:end]

    def _between(self) -> None:
        """The literal before the first call, or between two."""
        literal = self._syntax.between if self.count else self._syntax.start
        if self._rest.startswith(literal):
            self._rest, self._place = self._rest[len(literal) :], "name"

    def _name(self) -> list[CallDelta]:
        s = self._syntax
        found = re.match(f"{re.escape(s.begin)}(.*?){re.escape(s.middle)}", self._rest, re.DOTALL)
        if found is None:
            return []
        self._rest, self._place, self._json = self._rest[found.end() :], "arguments", _JSONValue()
        self.count += 1
        return [CallDelta(self.count - 1, found[1], "")]

    def _arguments(self) -> list[CallDelta]:
        end = self._json.push(self._rest)
        text, self._rest = self._rest[:end], self._rest[end:]
        if self._rest:  # the call's own closing brace
            self._rest, self._place = self._rest[1:], "between"
        return [CallDelta(self.count - 1, None, text)] if text else []


class _JSONValue:
    """Finds the end of a JSON value inside an object: the brace that closes this object."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, text: str) -> int:
        """How much of a text, the next one, belongs to the value."""
        for i, c in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = c == "\\", c != '"'
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                if self._depth == 0:
                    return i
                self._depth -= 1
        return len(text)

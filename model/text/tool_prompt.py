"""Functions, calls and their results as plain text, for models whose chat template knows nothing of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from model.text.tool_calls import HERMES

Message = Mapping[str, Any]

INTRODUCTION = """You may call functions. These are there, each as JSON with the JSON schema of its parameters:
<tools>
{tools}
</tools>
A call is written like this, with the arguments as JSON:
{example}
After the call you are told what the function returned, between <tool_response> and </tool_response>."""
EXAMPLE = HERMES.write([("NAME", '{"PARAMETER": "VALUE"}')])


def with_tools_as_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], instruction: str, listed_by: str = "system"
) -> list[dict[str, Any]]:
    """Messages of roles that every template knows: results are said by the user, together with what he says next.

    The functions are listed in the first message of the role `listed_by`, with `instruction` at the end.
    """
    found: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        role, text = _as_text(message)
        if after_result and role == "user":
            found[-1]["content"] += f"\n{text}"
        else:
            found.append({"role": role, "content": text})
        after_result = message["role"] == "tool"
    if not tools:
        return found
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = f"{INTRODUCTION.format(tools=listed, example=EXAMPLE)}\n{instruction}".rstrip()
    first = next((message for message in found if message["role"] == listed_by), None)
    if first is None:
        return [{"role": listed_by, "content": text}, *found]
    order = [first["content"], text] if listed_by == "system" else [text, first["content"]]
    first["content"] = "\n\n".join(order)
    return found


def _as_text(message: Message) -> tuple[str, str]:
    """A message's role and text."""
    text = message.get("content") or ""
    if message["role"] == "tool":
        return "user", f"<tool_response>\n{text}\n</tool_response>"
    if not message.get("tool_calls"):
        return message["role"], text
    written = HERMES.write(
        [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    )
    return "assistant", f"{text}\n{written}" if text else written


def with_calls_apart(messages: Sequence[Message]) -> list[Message]:
    """One call a message, its result after it: Llama 3's template takes no others."""
    found: list[Message] = []
    results = {str(m.get("tool_call_id")): m for m in messages if m["role"] == "tool"}
    said = set[str]()
    for message in messages:
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            found += [] if str(message.get("tool_call_id")) in said else [message]
            continue
        for i, call in enumerate(calls):
            found.append({**message, "content": message.get("content") if i == 0 else "", "tool_calls": [call]})
            if (key := str(call.get("id"))) in results:
                found.append(results[key])
                said.add(key)
    return found


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Ids of calls as Mistral's template wants them: nine letters or digits."""

    def short(name: Any) -> str:
        return hashlib.sha256(str(name).encode("utf-8", "replace")).hexdigest()[:9]

    found: list[Message] = []
    for message in messages:
        changed = dict(message)
        if message.get("tool_call_id") is not None:
            changed["tool_call_id"] = short(message["tool_call_id"])
        if message.get("tool_calls"):
            changed["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in message["tool_calls"]]
        found.append(changed)
    return found

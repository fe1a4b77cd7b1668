"""OpenAI's Responses API, stateless: a response's input as the chat that it is.

Nothing is kept: what refers to an earlier response is refused by name (see openai_fields.py), and every response says
`store: false`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool

from deployments.errors import ApiError, bad_request
from deployments.routes.openai_protocol import ChatRequest, Sampling, Whole, parse, tool_choice_kind
from deployments.routes.openai_tools import MAX_TOOLS, NAME
from model.sampling_params import MAX_LOGPROBS

Json = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
INCLUDED = {LOGPROBS, "reasoning.encrypted_content"}  # the second asks for what there is none of


@contextmanager
def named_as_here() -> Iterator[None]:
    """Errors of the chat that a response is made of name its fields as this API does."""
    names = {"messages": "input", "response_format": "text", "max_completion_tokens": "max_output_tokens"}
    try:
        yield
    except ApiError as error:
        said = error.body["error"]
        said["param"] = names.get(said["param"], said["param"])
        raise


class FlatTool(BaseModel):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class TextFormat(BaseModel):
    format: dict[str, Any] | None = None


class ResponsesRequest(Sampling):
    """POST /v1/responses."""

    input: Annotated[str | list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    text: TextFormat | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, BeforeValidator(tool_choice_kind)] = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[str] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None
    stream_options: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if unknown := set(self.include or ()) - INCLUDED:
            raise bad_request(f"include: {min(unknown)[:80]} is not supported by this service", "include")

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def budget(self) -> int | None:
        return self.max_output_tokens

    def as_chat(self) -> ChatRequest:
        """The chat that asks the same. Raises `ApiError`; see `named_as_here`."""
        shared = {name: getattr(self, name) for name in Sampling.model_fields}
        if self.logit_bias:
            shared["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()]
        logprobs = {"logprobs": True, "top_logprobs": self.top_logprobs or 0} if self.wants_logprobs else {}
        chat: Json = {
            **shared,
            **logprobs,
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "tools": tools,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
        }
        return parse(ChatRequest, chat)

    def _response_format(self) -> Json | None:
        given = self.text.format if self.text is not None else None
        if given is None or given.get("type") != "json_schema":
            return given
        return {"type": "json_schema", "json_schema": {key: given[key] for key in given if key != "type"}}

    def _messages(self) -> list[Json]:
        """Calls follow the message in which they were made, instructions stand before everything."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages: list[Json] = []
        for i, item in enumerate(items):
            kind = item.get("type") or ("message" if "role" in item else None)
            if kind == "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(_call(item, i))
            elif kind == "function_call_output":
                call_id = item.get("call_id")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": item.get("output")})
            elif kind == "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            elif kind != "reasoning":  # of a model that showed its own; this one has none
                raise bad_request(f"input[{i}]: items of type {str(kind)[:40]} are not supported", "input")
        if self.instructions:
            first = messages.pop(0) if messages and messages[0]["role"] in ("system", "developer") else None
            text = {"type": "text", "text": self.instructions}
            content = [text] if first is None else [text, {"type": "text", "text": "\n\n"}, *_parts(first["content"])]
            messages.insert(0, {"role": "system", "content": content})
        return messages


def _call(item: Json, place: int) -> Json:
    if not isinstance(item.get("name"), str) or not isinstance(item.get("arguments"), str):
        raise bad_request(f"input[{place}]: a function_call must have a name and arguments", "input")
    call_id = item.get("call_id")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": call_id if isinstance(call_id, str) else None, "type": "function", "function": function}


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]

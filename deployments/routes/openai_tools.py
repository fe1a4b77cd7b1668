"""OpenAI's tools: which functions a request offers, whether one must be called, and what their arguments must be.

`functions` and `function_call` are the older names of the same. Arguments always follow the parameters' schema; what of
a schema cannot be guaranteed is refused, unless the function says `strict: false`: then that part is left to the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool

from deployments.errors import bad_request
from model.text import json_schema
from model.text.tool_calls import MAX_CALLS, Function

Json = dict[str, Any]

MAX_TOOLS = 128
NAME = r"^[a-zA-Z0-9_.:/-]{1,128}$"  # stands between quotes in JSON as it is
ROOTS = {"$ref", "anyOf", "oneOf", "allOf", "properties", "additionalProperties"}


class FunctionDefinition(BaseModel):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: FunctionDefinition


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(BaseModel):
    """Of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
Functions = Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's answer may call."""

    definitions: Sequence[FunctionDefinition]  # all that the model is told of
    functions: tuple[Function, ...]  # those that it may call
    required: bool  # at least one call must come, and no text
    most: int  # calls in one answer
    legacy: bool  # whether the answer has `function_call`, not `tool_calls`

    @property
    def listed(self) -> list[Json]:
        """As templates know them."""
        return [
            {"type": "function", "function": found.model_dump(exclude_none=True, exclude={"strict"})}
            for found in self.definitions
        ]

    @property
    def instruction(self) -> str:
        """For models whose template knows no tools."""
        if not self.required:
            return "If no function helps, answer in plain words."
        if len(self.functions) == 1:
            return f"Now call {self.functions[0].name}, and write nothing else."
        return "Now call a function, and write nothing else."


def tool_use(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """None if nothing may be called. Raises `ApiError` that names the field."""
    definitions = [tool.function for tool in tools or ()]
    mode, names = _choice(choice)
    if mode == "required" and not definitions:
        raise bad_request("tool_choice: there are no tools to choose from", "tool_choice")
    return _use(definitions, mode, names, 1 if parallel is False else MAX_CALLS, "tools")


def function_use(functions: Sequence[FunctionDefinition] | None, choice: Any) -> ToolUse | None:
    """The same by its older names."""
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "none", "auto"):
        raise bad_request('function_call: must be "none", "auto" or an object with a name', "function_call")
    mode, names = _choice(choice, "function_call")
    if mode == "required" and not functions:
        raise bad_request("function_call: there are no functions to choose from", "function_call")
    return _use(functions or (), mode, names, 1, "functions")


def _use(
    definitions: Sequence[FunctionDefinition], mode: str, names: list[str] | None, most: int, param: str
) -> ToolUse | None:
    if not definitions or mode == "none":
        return None
    by_name = {found.name: found for found in definitions}
    choice = {"tools": "tool_choice", "functions": "function_call"}[param]
    if len(by_name) < len(definitions):
        raise bad_request(f"{param}: two functions have the same name", param)
    if unknown := set(names or ()) - by_name.keys():
        raise bad_request(f"{choice}: there is no function {min(unknown)[:128]} in {param}", choice)
    chosen = definitions if names is None else [by_name[name] for name in dict.fromkeys(names)]
    places = {found.name: i for i, found in enumerate(definitions)}
    functions = tuple(_function(found, f"{param}[{places[found.name]}]", param) for found in chosen)
    named = mode == "named"
    return ToolUse(definitions, functions, mode in ("required", "named"), 1 if named else most, param == "functions")


def _choice(value: Any, param: str = "tool_choice") -> tuple[str, list[str] | None]:
    """The mode (none, auto, required, named), and the functions' names if not all may be called."""
    if value is None:
        return "auto", None
    if value in ("none", "auto", "required"):
        return str(value), None
    if isinstance(value, dict) and value.get("type") == "function":
        return "named", [_name(value, param)]
    if isinstance(value, dict) and value.get("type") == "allowed_tools":
        inner = value.get("allowed_tools", value)
        tools = inner.get("tools") if isinstance(inner, dict) else None
        if isinstance(tools, list) and tools and inner.get("mode") in ("auto", "required"):
            return inner["mode"], [_name(tool, param) for tool in tools]
    raise bad_request(
        f'{param}: must be "none", "auto", "required", {{"type": "function", "function": {{"name": ...}}}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}',
        param,
    )


def _name(value: Any, param: str) -> str:
    """Of {"type": "function", "function": {"name"}}, or as /v1/responses has it, {"type": "function", "name"}."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise bad_request(f"{param}: a function must have a name", param)
    return name


def _function(definition: FunctionDefinition, path: str, param: str) -> Function:
    """With the schema that its arguments will have."""
    schema = dict(definition.parameters or {"type": "object", "properties": {}})
    if "type" not in schema and (not schema or schema.keys() & ROOTS):
        schema |= {} if schema.keys() & (ROOTS - {"properties", "additionalProperties"}) else {"type": "object"}
    if schema.get("type", "object") != "object":
        raise bad_request(f"{path}: parameters must be of type object", param)
    try:
        return Function(definition.name, json_schema.prepared(schema, lenient=definition.strict is False))
    except ValueError as error:
        message = f'{path}: parameters: {error}. With "strict": false this part is left to the model'
        raise bad_request(message, param) from None

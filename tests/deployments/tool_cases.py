"""Sets of functions with random parameters, and a judge of what is called: jsonschema, with its formats."""

import json
import random
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

Json = dict[str, Any]

WORDS = ["city", "day", "limit", "note", "kind", "tags", "unit", "path", "é", "a b"]
FORMATS = ["date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname", "uri", "duration"]


def value(rng: random.Random, depth: int = 0) -> Json:
    """A schema of which every part can be guaranteed, of values that end soon."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "nullable"]
    kind = rng.choice(kinds + ["array", "object", "union", "tuple"] * (depth < 2))
    low = rng.randrange(-50, 50)
    simple: dict[str, Any] = {
        "string": {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)},
        "number": {"type": "number", "minimum": 0, "maximum": 9.5},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": rng.sample([1, "two", 'th"ree', None, True, 2.5], 3)},
        "const": {"const": rng.choice(["x", 7, None])},
        "pattern": {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", r"^\d{2}:\d{2}$", "^(on|off)$"])},
        "format": {"type": "string", "format": rng.choice(FORMATS)},
        "nullable": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "null"}]},
    }
    if kind in simple:
        return dict(simple[kind])
    if kind == "array":
        return {"type": "array", "items": value(rng, depth + 1), "minItems": rng.randrange(2), "maxItems": 3}
    if kind == "tuple":
        parts = [value(rng, depth + 1) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}
    if kind == "union":
        return {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, tagged("a", rng), tagged("b", rng)]}
    return parameters(rng, depth + 1)


def tagged(tag: str, rng: random.Random) -> Json:
    found = {"type": "object", "properties": {"is": {"const": tag}, "by": value(rng, 2)}, "required": ["is"]}
    return found | {"additionalProperties": False}


def parameters(rng: random.Random, depth: int = 0) -> Json:
    names = rng.sample(WORDS, rng.randrange(4))
    required = [name for name in names if rng.random() < 0.7]
    found: Json = {"type": "object", "properties": {name: value(rng, depth) for name in names}, "required": required}
    return found | ({"additionalProperties": False} if rng.random() < 0.5 else {})


def tool_set(rng: random.Random) -> list[Json]:
    names = rng.sample(["get_weather", "search", "book-flight", "now", "a.b", "ns:call"], rng.randrange(1, 4))
    tools = [{"type": "function", "function": {"name": name, "description": "Does it."}} for name in names]
    for tool in tools:
        if rng.random() < 0.95:
            tool["function"]["parameters"] = parameters(rng)
        if rng.random() < 0.5:
            tool["function"]["strict"] = rng.random() < 0.7
    return tools


def choice(rng: random.Random, tools: list[Json]) -> tuple[Any, set[str], int]:
    """A tool_choice that forces a call, the functions that may be called, and how many calls at most."""
    names = [tool["function"]["name"] for tool in tools]
    kind, one = rng.randrange(4), rng.choice(names)
    function = {"type": "function", "function": {"name": one}}
    if kind == 0:
        return function, {one}, 1
    if kind == 1:
        return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [function]}}, {one}, 16
    return "required", set(names), 16


def problem(calls: list[Json], tools: list[Json], names: set[str], most: int) -> str | None:
    """What is wrong with an answer's calls, or None."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {"type": "object"}) for tool in tools}
    if not 1 <= len(calls) <= most:
        return f"{len(calls)} calls"
    if len({call["id"] for call in calls}) < len(calls):
        return "an id twice"
    for call in calls:
        if call["type"] != "function" or call["function"]["name"] not in names:
            return f"{call['function']['name']} may not be called"
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError as error:
            return f"{error}: {call['function']['arguments']}"
        schema = schemas[call["function"]["name"]]
        validator = Draft202012Validator(schema, format_checker=FormatChecker())
        for error in validator.iter_errors(arguments):
            return f"{error.message} in {arguments}, by {schema}"
    return None

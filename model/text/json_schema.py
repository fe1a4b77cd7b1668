"""What the grammar library would take without a word and not guarantee, found before it is asked.

It says itself what else it ignores (see grammar_worker.py); here stands what it is silent about, each seen in a test.
"""

import json
from typing import Any

MAX_DEPTH = 64
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "$defs", "definitions", "discriminator", "format",
}  # fmt: skip
NOT_ENFORCED = {
    "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas", "dependencies", "not", "if",
    "then", "else", "patternProperties", "unevaluatedItems", "$anchor", "$dynamicRef", "$dynamicAnchor",
    "$recursiveRef", "contentSchema",
}  # fmt: skip
ALONE = ("$ref", "anyOf", "oneOf", "allOf")  # what stands beside one of these is ignored
OF_TYPE = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
    "minItems", "maxItems",
}  # fmt: skip
SUBSCHEMAS = {"items", "additionalProperties", "propertyNames", "unevaluatedProperties"}
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
MAPS = {"properties", "$defs", "definitions"}


def check(text: str) -> None:
    """Raise `ValueError`, naming the place, if some part of this JSON schema would not be guaranteed."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    _check(schema, "#", 0)


def _check(schema: Any, path: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"{path} must be an object, true or false")
    for name in sorted(schema.keys() & NOT_ENFORCED) + ["uniqueItems"] * (schema.get("uniqueItems") is True):
        raise ValueError(f"{path}: {name} cannot be guaranteed by this service")
    _check_neighbours(schema, path)
    for name in schema.keys() & SUBSCHEMAS:
        _check(schema[name], f"{path}/{name}", depth + 1)
    for name in schema.keys() & LISTS:
        for i, part in enumerate(_of_type(schema[name], list, f"{path}/{name}")):
            _check(part, f"{path}/{name}/{i}", depth + 1)
    for name in schema.keys() & MAPS:
        for key, part in _of_type(schema[name], dict, f"{path}/{name}").items():
            _check(part, f"{path}/{name}/{key}", depth + 1)


def _check_neighbours(schema: dict[str, Any], path: str) -> None:
    """What keywords say together."""
    others = schema.keys() - ANNOTATIONS
    for name in ALONE:
        if name in schema and others - {name}:
            raise ValueError(f"{path}: {min(others - {name})} beside {name} cannot be guaranteed by this service")
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        if others - {"enum", "const", "type"} or not all(_is_of(v, schema.get("type")) for v in values):
            raise ValueError(f"{path}: enum and const may only stand beside a type that all their values have")
    if "type" not in schema and schema.keys() & OF_TYPE:
        raise ValueError(f"{path}: {min(schema.keys() & OF_TYPE)} needs a type beside it")
    properties = _of_type(schema.get("properties", {}), dict, f"{path}/properties")
    for name in _of_type(schema.get("required", []), list, f"{path}/required"):
        if not isinstance(name, str) or name not in properties:
            raise ValueError(f"{path}: {name} is required but not one of the properties")
    if "propertyNames" in schema and schema.get("properties"):
        raise ValueError(f"{path}: propertyNames beside properties cannot be guaranteed by this service")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value has the type of this name, or one of these; no name fits all."""
    if kind is None:
        return True
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array"}
    name = names.get(type(value), "object")
    kinds = kind if isinstance(kind, list) else [kind]
    return name in kinds or (name == "integer" and "number" in kinds)


def _of_type(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{path} must be {'an array' if kind is list else 'an object'}")
    return value

"""What the grammar library would take without a word and not guarantee, found before it is asked.

It says itself what else it ignores (see grammar_worker.py); here stands what it is silent about, each seen in a test.
What it only does in another form is put into that form: a `format` is a pattern, a `oneOf` whose parts exclude each
other an `anyOf`.
"""

import json
from itertools import combinations
from typing import Any

from model.text.string_formats import STRING_FORMATS

MAX_DEPTH = 64
MAX_COMPARISONS = 4096  # of parts of a oneOf: whoever asks is made to wait for them
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "$defs", "definitions", "discriminator",
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
OF_STRINGS = {"minLength", "maxLength", "pattern"}
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
MAPS = {"properties", "$defs", "definitions"}
ALL_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})


def prepared(schema: Any, *, lenient: bool = False) -> Any:
    """The schema as the library is to get it. Raises `ValueError`, naming the place, if a part cannot be guaranteed.

    `lenient`: such a part may be any JSON instead.
    """
    return _Preparing(schema, lenient).of(schema, "#", 0)


def parsed(text: str) -> Any:
    """The schema that a client sent as a string. Raises `ValueError`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from None


class _Preparing:
    """One schema; `$ref`s are looked up in it where parts of a `oneOf` are compared."""

    def __init__(self, root: Any, lenient: bool) -> None:
        self._root = root
        self._lenient = lenient
        self._comparisons = 0

    def of(self, schema: Any, path: str, depth: int) -> Any:
        try:
            return self._guaranteed(schema, path, depth)
        except ValueError:
            if not self._lenient:
                raise
            return {"type": "object", "additionalProperties": True} if depth == 0 else True

    def _guaranteed(self, schema: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ValueError(f"{path} must be an object, true or false")
        for name in sorted(schema.keys() & NOT_ENFORCED) + ["uniqueItems"] * (schema.get("uniqueItems") is True):
            raise ValueError(f"{path}: {name} cannot be guaranteed by this service")
        _check_neighbours(schema, path)
        found = _with_pattern(schema, path)
        for name in found.keys() & SUBSCHEMAS:
            found[name] = self.of(found[name], f"{path}/{name}", depth + 1)
        for name in found.keys() & LISTS:
            parts = _of_type(found[name], list, f"{path}/{name}")
            found[name] = [self.of(part, f"{path}/{name}/{i}", depth + 1) for i, part in enumerate(parts)]
        for name in found.keys() & MAPS:
            parts = _of_type(found[name], dict, f"{path}/{name}")
            found[name] = {key: self.of(part, f"{path}/{name}/{key}", depth + 1) for key, part in parts.items()}
        return self._without_one_of(found, path)

    def _without_one_of(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        if "oneOf" not in schema:
            return schema
        if not all(self._exclude(a, b, 0) for a, b in combinations(schema["oneOf"], 2)):
            raise ValueError(
                f"{path}: oneOf cannot be guaranteed, for a value may match several of its parts: use anyOf, or give "
                "the parts different types or a required property each with a const of its own"
            )
        return {"anyOf" if name == "oneOf" else name: value for name, value in schema.items()}

    def _exclude(self, a: Any, b: Any, depth: int) -> bool:
        """Whether no value can match both; False where that is not plain."""
        a, b = self._resolved(a), self._resolved(b)
        self._comparisons += 1
        if self._comparisons > MAX_COMPARISONS:
            raise ValueError("has too many alternatives to compare")
        if depth > MAX_DEPTH or not isinstance(a, dict) or not isinstance(b, dict):
            return False
        for one, other in ((a, b), (b, a)):
            parts = one.get("anyOf", one.get("oneOf"))
            if isinstance(parts, list):
                return all(self._exclude(part, other, depth + 1) for part in parts)
        if (left := _values(a)) is not None and (right := _values(b)) is not None and not left & right:
            return True
        if not _types(a) & _types(b):
            return True
        properties = [schema.get("properties", {}) for schema in (a, b)]
        shared = set(a.get("required", ())) & set(b.get("required", ())) & properties[0].keys() & properties[1].keys()
        objects = _types(a) | _types(b) == {"object"}
        return objects and any(self._exclude(properties[0][x], properties[1][x], depth + 1) for x in shared)

    def _resolved(self, schema: Any) -> Any:
        """What a `$ref` into this schema points at; a schema without one as it is."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                return schema
            found: Any = self._root
            for part in schema["$ref"].removeprefix("#").split("/")[1:]:
                found = found.get(part) if isinstance(found, dict) else None
            schema = found if schema["$ref"].startswith("#") else None
        return None


def _with_pattern(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """A string's format as a pattern. Formats of numbers say how they are stored and nothing about their text."""
    if "format" not in schema:
        return dict(schema)
    found = {name: value for name, value in schema.items() if name != "format"}
    kinds = schema.get("type")
    if kinds != "string" and not (isinstance(kinds, list) and "string" in kinds):
        if kinds is None:
            raise ValueError(f"{path}: format needs a type beside it")
        return found
    if beside := schema.keys() & OF_STRINGS:
        raise ValueError(f"{path}: {min(beside)} beside format cannot be guaranteed by this service")
    pattern = STRING_FORMATS.get(str(schema["format"]))
    if pattern is None:
        known = ", ".join(STRING_FORMATS)
        raise ValueError(f"{path}: format must be one of {known}, others cannot be guaranteed: use pattern")
    return found | {"pattern": f"^{pattern}$"}


def _values(schema: dict[str, Any]) -> set[str] | None:
    """The only values there are, as JSON; None if there are others."""
    if "const" in schema:
        return {_json(schema["const"])}
    return {_json(value) for value in schema["enum"]} if isinstance(schema.get("enum"), list) else None


def _json(value: Any) -> str:
    return json.dumps(float(value) if type(value) is int and abs(value) < 2**53 else value, sort_keys=True)


def _types(schema: dict[str, Any]) -> set[str]:
    """Names of the types that a value may have; an integer is a number."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {_type_name(value) for value in values}
    kinds = schema.get("type", list(ALL_TYPES))
    named = {"number" if kind == "integer" else str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])}
    return named & ALL_TYPES or set(ALL_TYPES)


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
    if "pattern" in schema and schema.keys() & {"minLength", "maxLength"}:
        raise ValueError(f"{path}: pattern beside minLength or maxLength cannot be guaranteed: say the length in it")
    if "multipleOf" in schema and schema.get("type") != "integer":
        raise ValueError(f"{path}: multipleOf can be guaranteed of type integer only")
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        raise ValueError(f"{path}: allOf of several parts cannot be guaranteed: write them as one")
    if "propertyNames" in schema and schema.get("properties"):
        raise ValueError(f"{path}: propertyNames beside properties cannot be guaranteed by this service")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value has the type of this name, or one of these; no name fits all."""
    if kind is None:
        return True
    name = "integer" if type(value) is int else _type_name(value)
    kinds = kind if isinstance(kind, list) else [kind]
    return name in kinds or (name == "integer" and "number" in kinds)


def _type_name(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null", list: "array"}
    return names.get(type(value), "object")


def _of_type(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{path} must be {'an array' if kind is list else 'an object'}")
    return value

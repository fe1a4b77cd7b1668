"""The fields of OpenAI's API, and of vLLM's, that constrain an answer."""

import json
from typing import Any

from deployments.errors import bad_request
from deployments.gateway.constraints import make_constraint
from model.text.constraint import Constraint

Found = tuple[str, str, Any]  # the field, the kind (also "choice"), the value

KINDS = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
NAMES = {f"guided_{key}": kind for key, kind in KINDS.items()}  # vLLM's older names
NAMES |= {"regex": "regex", "ebnf": "grammar", "grammar": "grammar", "json_schema": "json_schema"}  # SGLang, llama.cpp


def constraint_of(body: Any, end_ids: frozenset[int]) -> tuple[str, Constraint] | None:
    """The field that constrains a request, and how; None if none does. Raises `ApiError` that names the field.

    The same under several names is one.
    """
    named = [(name, kind, getattr(body, name)) for name, kind in NAMES.items()]
    found = [item for item in (_response_format(body.response_format), *named, *_structured(body)) if item is not None]
    made = {item[0]: make_constraint(*item, end_ids) for item in found if item[2] is not None}
    if len(set(made.values())) > 1:
        last = list(made)[-1]
        raise bad_request(f"{last}: only one constraint is possible, not {', '.join(made)} together", last)
    return next(iter(made.items()), None)


def as_format(constraint: Constraint) -> dict[str, Any]:
    """A constraint as a part of a structural tag."""
    if constraint.kind == "regex":
        return {"type": "regex", "pattern": constraint.text}
    if constraint.kind == "grammar":
        return {"type": "grammar", "grammar": constraint.text}
    value = json.loads(constraint.text)
    if constraint.kind == "json_schema":
        return {"type": "json_schema", "json_schema": value}
    return dict(value["format"])


def _response_format(value: Any) -> Found | None:
    if value is None or value.get("type") == "text":
        return None
    if value.get("type") == "json_object":
        schema = value.get("schema")  # as llama.cpp has it
        return "response_format", "json_schema", {"type": "object"} if schema is None else schema
    if value.get("type") == "structural_tag":
        return "response_format", "structural_tag", _structural_tag(value, "response_format")
    if value.get("type") != "json_schema":
        message = "response_format: type must be text, json_object, json_schema or structural_tag"
        raise bad_request(message, "response_format")
    schema = value.get("json_schema")
    if not isinstance(schema, dict) or "schema" not in schema:
        raise bad_request("response_format: json_schema must be an object with a schema in it", "response_format")
    return "response_format", "json_schema", schema["schema"]


def _structured(body: Any) -> list[Found]:
    """vLLM's newer name, with one of several keys inside."""
    found: list[Found] = []
    for key, value in (body.structured_outputs or {}).items():
        if value is None or (key == "json_object" and value is False):
            continue
        if key == "json_object":
            found.append(("structured_outputs", "json_schema", {"type": "object"}))
        elif key == "structural_tag":
            found.append(("structured_outputs", "structural_tag", _structural_tag(value, "structured_outputs")))
        elif key in KINDS:
            found.append(("structured_outputs", KINDS[key], value))
        else:
            message = f"structured_outputs: {str(key)[:40]} is not supported by this service"
            raise bad_request(message, "structured_outputs")
    if len(found) > 1:
        raise bad_request("structured_outputs: only one constraint is possible", "structured_outputs")
    return found


def _structural_tag(value: Any, param: str) -> dict[str, Any]:
    """With a format, also where it comes in the older form, as triggers and structures."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"{param}: the structural_tag is not valid JSON: {error}", param) from None
    if isinstance(value, dict) and isinstance(value.get("format"), dict):
        return {"type": "structural_tag", "format": value["format"]}
    structures = value.get("structures") if isinstance(value, dict) else None
    if not isinstance(structures, list) or not all(isinstance(item, dict) for item in structures):
        raise bad_request(f"{param}: a structural_tag must have a format", param)
    tags = [
        {
            "type": "tag", "begin": item.get("begin"), "end": item.get("end"),
            "content": {"type": "json_schema", "json_schema": item.get("schema", True)},
        }
        for item in structures
    ]  # fmt: skip
    return {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": value.get("triggers", []), "tags": tags},
    }

"""The fields of OpenAI's API, and of vLLM's, that constrain an answer."""

from typing import Any

from deployments.errors import bad_request
from deployments.gateway.constraints import make_constraint
from model.text.constraint import Constraint

Found = tuple[str, str, Any]  # the field, the kind (also "json" and "choice"), the value


def constraint_of(body: Any, end_ids: frozenset[int]) -> tuple[str, Constraint] | None:
    """The field that constrains a request, and how; None if none does. Raises `ApiError` that names the field."""
    found = [item for item in (_response_format(body), *_guided(body), *_structured(body)) if item is not None]
    if len(found) > 1:
        names = ", ".join(param for param, _, _ in found)
        raise bad_request(f"{found[-1][0]}: only one constraint is possible, not {names} together", found[-1][0])
    if not found:
        return None
    param, kind, value = found[0]
    return param, make_constraint(param, kind, value, end_ids)


def _response_format(body: Any) -> Found | None:
    value = body.response_format
    if value is None or value.get("type") == "text":
        return None
    if value.get("type") == "json_object":
        return "response_format", "json_schema", {"type": "object"}
    if value.get("type") != "json_schema":
        raise bad_request("response_format: type must be text, json_object or json_schema", "response_format")
    schema = value.get("json_schema")
    if not isinstance(schema, dict) or "schema" not in schema:
        raise bad_request("response_format: json_schema must be an object with a schema in it", "response_format")
    return "response_format", "json_schema", schema["schema"]


def _guided(body: Any) -> list[Found]:
    """vLLM's older names."""
    kinds = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
    named = [(f"guided_{name}", kind, getattr(body, f"guided_{name}")) for name, kind in kinds.items()]
    return [item for item in named if item[2] is not None]


def _structured(body: Any) -> list[Found]:
    """vLLM's newer name, with one of several keys inside."""
    value = body.structured_outputs
    kinds = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
    found: list[Found] = []
    for key, inner in (value or {}).items():
        if inner is None or (key == "json_object" and inner is False):
            continue
        if key == "json_object":
            found.append(("structured_outputs", "json_schema", {"type": "object"}))
        elif key in kinds:
            found.append(("structured_outputs", kinds[key], inner))
        else:
            raise bad_request(
                f"structured_outputs: {str(key)[:40]} is not supported by this service", "structured_outputs"
            )
    return found

"""The JSON schema of a whole Serve configuration file with our `args` in it, for editors: `caravan schema`.

It says what `caravan check` says of keys and types: unknown keys are errors, in Serve's part too.
"""

import json
from typing import Any

from deployments.check import OPAQUE
from deployments.config import IN_PLACE, AppConfig
from deployments.serve_file import IMPORT_PATH

Json = dict[str, Any]


def schema_json() -> str:
    """Shipped as deployments/configs/schema.json, which the YAML files name for editors."""
    return json.dumps(schema(), indent=1) + "\n"


def schema() -> Json:
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    template = "#/$defs/{model}"
    whole: Json = ServeDeploySchema.model_json_schema(ref_template=template)
    ours = AppConfig.model_json_schema(ref_template=template)
    definitions = whole["$defs"]
    for name, definition in (
        *ours.pop("$defs").items(),
        ("Args", ours),
        *AutoscalingConfig.model_json_schema(ref_template=template).pop("$defs").items(),
    ):
        assert definitions.setdefault(name, definition) == definition, f"two definitions of {name}"
    definitions["DeploymentSchema"]["properties"]["autoscaling_config"] = {"$ref": "#/$defs/AutoscalingConfig"}
    for definition in (whole, *definitions.values()):
        _close(definition)
    application = definitions["ServeApplicationSchema"]
    application["if"] = {"properties": {"import_path": {"const": IMPORT_PATH}}}
    deployment = {"allOf": [_user_config(name, ours) for name in IN_PLACE]}
    application["then"] = {
        "properties": {"args": {"$ref": "#/$defs/Args"}, "deployments": {"items": deployment}},
        "required": ["args"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **without_titles(whole)}


def _user_config(name: str, ours: Json) -> Json:
    """What changes in place, for the deployment of this name."""
    sections = {section: ours["properties"][section] for section in IN_PLACE[name]}
    given = {"type": "object", "properties": sections, "additionalProperties": False}
    return {
        "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
        "then": {"properties": {"user_config": given}},
    }


def _close(definition: Json) -> None:
    """A mistyped key is an error; what Serve passes on unread stays open."""
    if "properties" in definition:
        definition["additionalProperties"] = False
        for name in OPAQUE:
            if name in definition["properties"]:
                definition["properties"][name].pop("additionalProperties", None)


def without_titles(value: Any) -> Any:
    """Without pydantic's titles, which are the keys once more."""
    if isinstance(value, list):
        return [without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_titles(inner) for key, inner in value.items() if key != "title" or not isinstance(inner, str)}

"""A Serve configuration file with our application in it: where our settings stand there.

`args` hold what a change of replaces pipelines; under `deployments` stands what changes while they run: the
`user_config` of gateways and engines, and how many of them there may be (`autoscaling_config`).
"""

from typing import Any

from deployments.config import IN_PLACE

Json = dict[str, Any]

IMPORT_PATH = "deployments.app:build"
POLICY = "deployments.routing.autoscaling:follow_demand"
DEPLOYMENTS = tuple(IN_PLACE)


def deployment(application: Json, name: str) -> Json:
    """What the file says of this deployment; empty if nothing."""
    found = (d for d in application.get("deployments") or [] if isinstance(d, dict) and d.get("name") == name)
    return next(found, {})


def settings(application: Json) -> Json:
    """All sections of our configuration, wherever they stand."""
    sections = {**(application.get("args") or {}), **(deployment(application, "Gateway").get("user_config") or {})}
    if (bounds := deployment(application, "Engine").get("autoscaling_config")) is not None:
        sections["autoscaling"] = bounds
    return sections


def put(application: Json, section: str, values: Json) -> None:
    """Set keys of one section where it stands, or would be expected."""
    _where(application, section).update(values)


def _where(application: Json, section: str) -> Json:
    engine, gateway = deployment(application, "Engine"), deployment(application, "Gateway")
    found: Json
    if section == "autoscaling" and "autoscaling_config" in engine:
        found = engine["autoscaling_config"]
    elif section in (gateway.get("user_config") or {}):
        found = gateway["user_config"][section]
    else:
        found = application.setdefault("args", {}).setdefault(section, {})
    return found

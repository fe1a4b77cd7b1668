"""What a change of the configuration will do to a service that runs: `caravan diff OLD NEW`.

Serve decides it by what it compares: a hash of import path, runtime_env, `args` and policies, equal for all processes
of an application, then each deployment's options (ray/serve/_private/version.py and deploy_utils.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from deployments.config import IN_PLACE, ConfigError

Effect = Literal["nothing", "in place", "gateways", "pipelines", "start anew"]
Json = dict[str, Any]
Keys = tuple[str, ...]

REPLACED: dict[str, Effect] = {"Gateway": "gateways", "Engine": "pipelines"}
SAYS: dict[Effect, str] = {
    "nothing": "changes nothing",
    "in place": "changes in place: no process is replaced",
    "gateways": "replaces gateways, one after the other; streams are finished first",
    "pipelines": "replaces gateways and pipelines, with their weights; streams move",
    "start anew": "changes nothing until Serve is shut down and started anew",
}
AT_START = ("proxy_location", "http_options", "grpc_options")
# Options of a deployment that its processes are started with.
PROCESS = (
    "ray_actor_options", "placement_group_bundles", "placement_group_strategy", "placement_group_bundle_label_selector",
    "placement_group_fallback_strategy", "max_replicas_per_node", "gang_scheduling_config",
)  # fmt: skip
CODE = ("import_path", "runtime_env", "args", "autoscaling_policy")
CODE_OF_DEPLOYMENT = ("request_router_config", "deployment_actors")


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs."""

    path: str
    before: Any
    after: Any
    effect: Effect
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.path}: {_short(self.before)} -> {_short(self.after)}: {SAYS[self.effect]}"
        return f"{line}. {self.remedy}" if self.remedy else line


def diff_files(old: Path, new: Path) -> list[Change]:
    """All that differs, in the order of the new file. Raises `ConfigError` for what is no such file."""
    return list(diff(_read(old), _read(new)))


def worst(changes: list[Change]) -> Effect:
    """What all of them do together."""
    order: list[Effect] = ["nothing", "start anew", "in place", "gateways", "pipelines"]
    return max((change.effect for change in changes), key=order.index, default="nothing")


def diff(old: Json, new: Json) -> Iterator[Change]:
    old, new = _named(old), _named(new)
    for path, before, after in _differences(old, new, ()):
        effect = _effect(path, old, new)
        yield Change(".".join(path), before, after, effect, "" if effect == "in place" else _remedy(path))


def _read(path: Path) -> Json:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the key applications")
    return content


def _named(content: Json) -> Json:
    """Applications and deployments by their names, for their order means nothing."""

    def by_name(items: Any) -> Json:
        return {str(item.get("name", "default")): item for item in items or [] if isinstance(item, dict)}

    applications = {
        name: {**application, "deployments": by_name(application.get("deployments"))}
        for name, application in by_name(content.get("applications")).items()
    }
    return {**content, "applications": applications}


def _differences(old: Any, new: Any, path: Keys) -> Iterator[tuple[Keys, Any, Any]]:
    """Leaves that differ, in their writing: Serve takes 30 and 30.0 for two things."""
    if isinstance(old, dict | None) and isinstance(new, dict | None) and (old or new):
        before, after = old or {}, new or {}
        for key in dict.fromkeys([*after, *before]):
            yield from _differences(before.get(key), after.get(key), (*path, str(key)))
    elif old != new or type(old) is not type(new):
        yield path, old, new


def _given(content: Json, app: str, name: str, option: str) -> Any:
    """What a file says of a deployment's option; None: nothing."""
    return content["applications"].get(app, {}).get("deployments", {}).get(name, {}).get(option)


def _effect(path: Keys, old: Json, new: Json) -> Effect:
    match path:
        case ("applications", app, "deployments", name, "user_config", *_):
            return "nothing" if _given(new, app, name, "user_config") is None else "in place"
        case ("applications", app, "deployments", name, option, *rest):
            # Of these Serve compares one list over all deployments, in which each that has the option has a place.
            is_new = any(_given(content, app, name, option) is None for content in (old, new))
            if option in CODE_OF_DEPLOYMENT or (option == "autoscaling_config" and (is_new or rest[:1] == ["policy"])):
                return "pipelines"
            return REPLACED.get(name, "pipelines") if option in PROCESS else "in place"
        case ("applications", _, key, *_):
            return "pipelines" if key in CODE else "in place"
        case (key, *_) if key in AT_START:
            return "start anew"
    return "in place"


def _remedy(path: Keys) -> str:
    """What to write so that it changes in place."""
    match path:
        case ("applications", _, "deployments", _, "user_config", *_):
            return "Serve does not tell processes of a user_config that is gone: leave an empty one, {}"
        case ("applications", _, "deployments", _, "autoscaling_config", *_):
            return "Once autoscaling_config is there, numbers in it change in place"
        case ("applications", _, "args", "autoscaling", *_):
            where = "autoscaling_config of Engine"
        case ("applications", _, "args", "gateway", "replicas"):
            where = "autoscaling_config of Gateway"
        case ("applications", _, "args", section, *_) if section in IN_PLACE["Gateway"]:
            where = f"user_config.{section} of Gateway"
        case _:
            return ""
    return f"Where it stands in {where}, under deployments, it changes in place"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."

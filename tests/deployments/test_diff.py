"""`caravan diff`: what a change will do, against what Serve itself would decide of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.application_state import override_deployment_info
from ray.serve._private.common import DeploymentID
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.version import DeploymentVersion
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from deployments.app import build
from deployments.diff import Effect, diff, worst
from ops.cli import app
from tests.deployments.test_check import in_old_form

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
APP = "applications.0"
ENGINE, GATEWAY = f"{APP}.deployments.0", f"{APP}.deployments.1"


def shipped() -> Json:
    content: Json = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    assert [d["name"] for d in content["applications"][0]["deployments"]] == ["Engine", "Gateway"]
    return content


def old_form() -> Json:
    content = shipped()
    in_old_form(content)
    return content


def put(content: Json, path: str, value: Any) -> Json:
    content = copy.deepcopy(content)
    where: Any = content
    *parents, last = path.split(".")
    for parent in parents:
        where = where[int(parent)] if parent.isdigit() else where.setdefault(parent, {})
    where[last] = value
    return content


CASES: list[tuple[str, Any, Effect]] = [
    (f"{ENGINE}.autoscaling_config.max_replicas", 4, "in place"),
    (f"{ENGINE}.autoscaling_config.min_replicas", 0, "in place"),
    (f"{ENGINE}.autoscaling_config.look_back_period_s", 30.0, "in place"),
    (f"{ENGINE}.user_config", {"logging": {"level": "DEBUG"}}, "in place"),
    (f"{ENGINE}.max_surge_percent", 0, "in place"),
    (f"{ENGINE}.graceful_shutdown_timeout_s", 30.0, "in place"),
    (
        f"{ENGINE}.autoscaling_config.policy",
        {"policy_function": "deployments.routing.autoscaling:follow_demand"},
        "pipelines",
    ),
    (f"{ENGINE}.ray_actor_options", {"num_cpus": 0.1}, "pipelines"),
    (f"{GATEWAY}.user_config.admission.target_ttft_s", 5.0, "in place"),
    (f"{GATEWAY}.user_config.logging.level", "DEBUG", "in place"),
    (f"{GATEWAY}.user_config.gateway", {"keepalive_s": 5.0, "routes": ["tgi"]}, "in place"),
    (f"{GATEWAY}.autoscaling_config", {"min_replicas": 1, "max_replicas": 2}, "in place"),
    (f"{GATEWAY}.autoscaling_config", None, "pipelines"),
    (f"{GATEWAY}.ray_actor_options", {"num_cpus": 0.1}, "gateways"),
    (f"{APP}.args.scheduler.max_num_seqs", 32, "pipelines"),
    (f"{APP}.args.resources.gateway_cpus", 0.1, "pipelines"),
    (f"{APP}.args.gateway", {"keepalive_s": 5.0}, "pipelines"),
    (f"{APP}.runtime_env", {"env_vars": {"A": "1"}}, "pipelines"),
    (f"{APP}.route_prefix", "/v2", "in place"),
    ("http_options.port", 8001, "start anew"),
]


@pytest.mark.parametrize(("path", "value", "effect"), CASES, ids=lambda x: str(x)[:50])
def test_each_key(path: str, value: Any, effect: Effect) -> None:
    old, new = shipped(), put(shipped(), path, value)
    changes = list(diff(old, new))
    assert changes
    assert {change.effect for change in changes} == {effect}
    if effect != "start anew":
        assert serves_verdict(old, new) == effect


def serves_verdict(old: Json, new: Json) -> Effect:
    """By Serve's own comparisons, on our own application. Raises where it would not deploy it at all."""
    before, after = (ServeDeploySchema.model_validate(c).applications[0] for c in (old, new))
    if get_app_code_version(before) != get_app_code_version(after):
        return "pipelines"
    effects: set[Effect] = {"nothing"}
    for name, replaced in (("Gateway", "gateways"), ("Engine", "pipelines")):
        was, will = version(before, name), version(after, name)
        if was.requires_actor_restart(will):
            effects.add("gateways" if replaced == "gateways" else "pipelines")
        elif was != will or options(before, name) != options(after, name):
            effects.add("in place")
    return next(e for e in ("pipelines", "gateways", "in place", "nothing") if e in effects)  # type: ignore[return-value]


def infos(application: Any) -> dict[str, DeploymentInfo]:
    built = build(application.args)
    gateway = built._bound_deployment
    engine = gateway._replica_config.init_args[0]._bound_deployment
    found = {}
    for deployment in (gateway, engine):
        found[deployment.name] = DeploymentInfo(
            actor_name=DeploymentID(deployment.name, "caravan").to_replica_actor_class_name(),
            deployment_config=deployment._deployment_config, replica_config=deployment._replica_config,
            start_time_ms=0, deployer_job_id="", version="v", 
            route_prefix="/" if deployment.name == "Gateway" else None,
        )  # fmt: skip
    return override_deployment_info(found, application)


def version(application: Any, name: str) -> DeploymentVersion:
    info = infos(application)[name]
    replica = info.replica_config
    return DeploymentVersion(
        "v", info.deployment_config, replica.ray_actor_options, replica.placement_group_bundles,
        replica.placement_group_strategy, max_replicas_per_node=replica.max_replicas_per_node,
        route_prefix=info.route_prefix,
    )  # fmt: skip


def options(application: Any, name: str) -> Json:
    found: Json = infos(application)[name].deployment_config.model_dump(exclude={"user_configured_option_names"})
    return found


def test_nothing_and_what_only_looks_the_same() -> None:
    assert list(diff(shipped(), shipped())) == []
    turned = shipped()
    turned["applications"][0]["deployments"].reverse()
    assert list(diff(shipped(), turned)) == []
    (change,) = diff(shipped(), put(shipped(), f"{ENGINE}.autoscaling_config.upscale_delay_s", 10.0))
    assert (change.before, change.after, change.effect) == (10, 10.0, "in place")
    gone = shipped()
    del gone["applications"][0]["deployments"][1]["user_config"]
    changes = list(diff(shipped(), gone))
    assert {c.effect for c in changes} == {"nothing"}
    assert "leave an empty one" in changes[0].remedy


def test_the_old_form_is_told_where_it_would_change_in_place() -> None:
    (change,) = diff(old_form(), put(old_form(), f"{APP}.args.autoscaling.max_replicas", 4))
    assert change.effect == "pipelines"
    assert "autoscaling_config of Engine, under deployments" in change.remedy
    (change,) = diff(old_form(), put(old_form(), f"{APP}.args.admission.target_ttft_s", 4.0))
    assert "user_config.admission of Gateway" in change.remedy
    assert worst(list(diff(old_form(), shipped()))) == "pipelines", "to move them replaces all, once"


def test_the_command(tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text(yaml.safe_dump(shipped()))
    new.write_text(yaml.safe_dump(put(shipped(), f"{ENGINE}.autoscaling_config.max_replicas", 4)))
    done = CliRunner().invoke(app, ["diff", str(old), str(new)])
    assert done.exit_code == 0, done.output
    assert (
        "applications.caravan.deployments.Engine.autoscaling_config.max_replicas: 2 -> 4: changes in place"
        in done.output
    )
    assert "In all, deploying" in done.output
    new.write_text("- 1")
    assert CliRunner().invoke(app, ["diff", str(old), str(new)]).exit_code == 1

"""The Helm chart: rendered by Helm, every object against its schema; its pods are run in tests/ops/test_pods.py."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments.check import check_file
from deployments.config import AppConfig, parse_app_config
from deployments.placement import bundles
from ops.kubernetes.generate import CHART

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / ".venv" / "chart"))  # where `make` puts them: they are too large to be everybody's
helm = pytest.importorskip("helm_python", reason="Helm as a library: make .venv/chart/.ready")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="make .venv/chart/.ready")

VALUES = sorted((CHART.parent / "values").glob("*.yaml"))
CRDS = ROOT / "tests" / "data" / "crds"
KUBERNETES = "1.32"


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """All objects."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="caravan", namespace="models")
    texts = [text for name, text in files.items() if not name.endswith("NOTES.txt")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def values_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


def service_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return next(found for found in objects if found["kind"] == "RayService")


def pods_of(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Templates: the head's, then those of the groups."""
    cluster = service["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def closed(schema: Any) -> Any:
    """An OpenAPI schema of a custom resource as JSON schema, in which unknown fields are errors: Kubernetes would drop
    them without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if key != "x-kubernetes-validations"}
    if isinstance(found.get("format"), str):
        del found["format"]  # int32 and the like
    if isinstance(found.get("pattern"), str):
        found["pattern"] = found["pattern"].replace("^(?i)", "(?i)^")  # Go's way
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in found and isinstance(found["properties"], dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", bool(found.get("x-kubernetes-preserve-unknown-fields")))
    return found


def validate(thing: dict[str, Any]) -> None:
    file = CRDS / f"{thing['kind'].lower()}.json.gz"
    if not file.exists():
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
        return
    known = json.loads(gzip.decompress(file.read_bytes()))
    assert thing["apiVersion"] == f"{known['group']}/{known['version']}"
    schema = closed(known["schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # any object's
    jsonschema.validate(thing, schema)


def with_everything_on(values: dict[str, Any]) -> dict[str, Any]:
    monitoring = {"podMonitor": True, "prometheusRule": True, "dashboard": True, "labels": {"release": "x"}}
    return {**values, "monitoring": monitoring}


@pytest.mark.parametrize("file", VALUES, ids=lambda file: file.stem)
def test_every_object_is_valid(file: Path) -> None:
    values = with_everything_on(values_of(file))
    report = helm.lint(str(CHART), values, strict=True)
    assert report["errors"] == []
    objects = rendered(values)
    kinds = {found["kind"] for found in objects}
    assert kinds == {
        "RayService", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "PrometheusRule", "ConfigMap",
    }  # fmt: skip
    for found in objects:
        validate(found)
    for template in pods_of(service_of(objects)):  # once more, by Kubernetes' own schema
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}, **template}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)


def test_what_is_wrong_is_found() -> None:
    """The judges themselves."""
    objects = rendered(values_of(VALUES[0]))
    service = service_of(objects)
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["templat"] = {}
    with pytest.raises(jsonschema.ValidationError, match="templat"):
        validate(service)
    budget = next(found for found in objects if found["kind"] == "PodDisruptionBudget")
    budget["spec"]["minAvailabel"] = 1
    with pytest.raises(Exception, match="minAvailabel"):
        validate(budget)


@pytest.mark.parametrize("file", VALUES, ids=lambda file: file.stem)
def test_the_application_is_one_that_caravan_takes_and_fits_into_its_pods(file: Path, tmp_path: Path) -> None:
    service = service_of(rendered(values_of(file)))
    written = tmp_path / "serve.yaml"
    written.write_text(service["spec"]["serveConfigV2"])
    assert check_file(written, files=False) == []
    config = parse_app_config(yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"])
    room: list[dict[str, float]] = []
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        start = group["rayStartParams"]
        room += [{"CPU": float(start["num-cpus"]), "GPU": float(start["num-gpus"])} for _ in range(group["replicas"])]
        requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert (float(requests["cpu"]), requests.get("nvidia.com/gpu", 0)) == (room[-1]["CPU"], room[-1]["GPU"])
    assert fits(config, room)
    assert config.gateway.replicas >= len(room), "a worker without a gateway is never ready"
    grace = pods_of(service)[1]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.resources.drain_timeout_s
    env = {e["name"]: e.get("value") for e in pods_of(service)[1]["spec"]["containers"][0]["env"]}
    assert float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] or 0) >= config.resources.drain_timeout_s
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > config.resources.drain_timeout_s


def fits(config: AppConfig, room: list[dict[str, float]]) -> bool:
    """First fit of everything that always runs: gateways, and the bundles of each pipeline."""
    wanted = [{"CPU": config.resources.gateway_cpus}] * config.gateway.replicas
    wanted += [bundle for _ in range(config.autoscaling.min_replicas) for bundle in bundles(config)]
    for bundle in sorted(wanted, key=lambda b: -b.get("GPU", 0)):
        node = next((n for n in room if all(n[kind] >= amount - 1e-9 for kind, amount in bundle.items())), None)
        if node is None:
            return False
        for kind, amount in bundle.items():
            node[kind] -= amount
    return True


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"args": {"model": {"path": "x", "name": "x"}, "pipeline": {"stagse": 2}}}, "stagse"),
        ({"args": {"pipeline": {"stages": 2}}}, "model"),
        ({"head": {"memory": "lots"}}, "memory"),
        ({"workers": []}, "workers"),
        ({"upgrade": {"strategy": "Recreate"}}, "strategy"),
        ({"netwrokPolicy": {"enabled": False}}, "netwrokPolicy"),
    ],
)
def test_wrong_values_are_refused_by_helm(change: dict[str, Any], named: str) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmError, match=named):
        chart.render({**values_of(VALUES[0]), **change}, name="caravan")


def test_what_changes_in_place_is_passed_on(tmp_path: Path) -> None:
    values = values_of(CHART.parent / "values" / "7b-8-replicas.yaml")
    bounds = values["args"].pop("autoscaling")
    values["deployments"] = [{"name": "Engine", "autoscaling_config": bounds}]
    written = tmp_path / "serve.yaml"
    written.write_text(service_of(rendered(values))["spec"]["serveConfigV2"])
    assert check_file(written, files=False) == []
    assert yaml.safe_load(written.read_text())["applications"][0]["deployments"] == values["deployments"]


def test_choices_reach_their_objects() -> None:
    values = values_of(CHART.parent / "values" / "7b-8-replicas.yaml")
    service = service_of(rendered(values))
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "caravan-redis"
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token", "secretName": "caravan-ray-token"}
    group = cluster["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"], group["rayStartParams"]["labels"]) == (4, 8, "pool=chat")
    environment = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
    assert environment["CARAVAN_KEYS"]["valueFrom"]["secretKeyRef"] == {"name": "caravan-keys", "key": "keys.yaml"}
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert args["auth"] == {"required": True, "keys_env": "CARAVAN_KEYS"}
    off = {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}}
    assert [found["kind"] for found in rendered({**values, "monitoring": {}, **off})] == ["RayService"]
    none = {**values, "head": {"state": {"backend": "none"}}, "env": {"RAY_health_check_period_ms": "900"}}
    service = service_of(rendered(none))
    assert "gcsFaultToleranceOptions" not in service["spec"]["rayClusterConfig"]
    env = pods_of(service)[0]["spec"]["containers"][0]["env"]
    assert [e["value"] for e in env if e["name"] == "RAY_health_check_period_ms"] == ["900"]


@pytest.mark.parametrize("file", VALUES, ids=lambda file: file.stem)
def test_pods_have_no_rights(file: Path) -> None:
    for template in pods_of(service_of(rendered(values_of(file)))):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        container = pod["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written == {"/tmp", "/dev/shm"}

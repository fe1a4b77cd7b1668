"""The service that is tormented: the real application on a small made-up model, two pipelines of two stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from deployments.check import check_file
from ops.chaos.namespaces import Network
from ops.chaos.nodes import Nodes
from ops.chaos.witness import Logs, ask_ready, await_true, census, of_kind
from ops.local import LocalError, free_port

MODEL, SHAPE = "test", "shape:test-1m"
STAGES = 2
DEPLOY_TIMEOUT_S = 300.0
# Custom resources, so that faults hit what they mean to hit: nodes that may hold gateways, and that may hold stages.
FRONT, BACK = "front", "back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is deployed, and where."""

    engines: int = 2
    gateways: int = 2
    workers: int = 3  # nodes beside the head
    spread: bool = False  # every stage on a node of its own, or a whole pipeline on one
    gateways_on_workers: bool = False  # or on the head
    namespaces: bool = False  # a network namespace for every node
    small_disks: bool = False  # a file system for every node
    haproxy: bool = False  # HAProxy instead of Serve's own proxy
    scaled: bool = False  # the number of pipelines is set from outside, by `serve deploy`
    spares: bool = False  # a started process waits for the place of every stage
    args: dict[str, Any] = field(default_factory=dict)  # section -> key -> value, over the defaults below

    @property
    def every_proxy(self) -> bool:
        """Nodes with addresses of their own have a proxy each; on one address there is room for one."""
        return self.namespaces and self.gateways_on_workers


def service_config(setting: Setting, host: str, port: int) -> dict[str, Any]:
    """A whole Serve configuration."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": SHAPE, "name": MODEL, "dtype": "float32", "load_format": "dummy", "max_model_len": 1024},
        "pipeline": {"stages": STAGES, "device": "cpu", "threads": 1, "spare": setting.spares},
        "cache": {"memory_gb": 0.05},
        "scheduler": {"max_num_seqs": 64, "max_num_batched_tokens": 512},
        "gateway": {"replicas": setting.gateways},
        "admission": {"target_ttft_s": 300.0},  # no client is to be refused because two cores are slow
        "autoscaling": {"min_replicas": setting.engines, "max_replicas": setting.engines},
        "resources": {"gateway_cpus": 0.1, "engine_cpus": 0.2, "stage_cpus": 0.4, "drain_timeout_s": 60.0},
    }
    for section, values in setting.args.items():
        sections[section] = {**sections.get(section, {}), **values}
    front = {FRONT: 0.6 if setting.gateways_on_workers else 0.1}  # one on a node, for the node's proxy to be there too
    stage = {"CPU": 0.4, BACK: 0.7 if setting.spread else 0.4}
    number = {"min_replicas": setting.engines, "max_replicas": setting.engines}
    scaled = {"autoscaling_config": number} if setting.scaled else {}  # from the start: a new key replaces all replicas
    bundles = [{"CPU": 0.2, BACK: 0.3 if setting.spread else 0.2}, *([stage] * STAGES)]
    return {
        "proxy_location": "EveryNode" if setting.every_proxy else "HeadOnly",
        "http_options": {"host": host, "port": port},
        "logging_config": {"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "caravan",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": sections,
                "deployments": [
                    {"name": "Gateway", "ray_actor_options": {"num_cpus": 0.1, "resources": front}},
                    {"name": "Engine", "placement_group_bundles": bundles, **scaled},
                ],
            }
        ],
    }


class Service:
    """The deployed application."""

    def __init__(self, nodes: Nodes, setting: Setting) -> None:
        self.nodes = nodes
        self.setting = setting
        self.logs = Logs(nodes)
        self._port = 8000 if setting.namespaces else free_port(8000)
        self.config = service_config(setting, "0.0.0.0" if setting.namespaces else "127.0.0.1", self._port)

    @property
    def doors(self) -> list[str]:
        """Where clients try, in turn, as through a load balancer: a node without replicas has no proxy, or one that
        drains, which lets its streams end."""
        nodes = self.nodes.workers if self.setting.every_proxy else [self.nodes.head]
        return [f"http://{node.address}:{self._port}" for node in nodes]

    @property
    def urls(self) -> list[str]:
        """Those of the nodes with gateways, which always have a proxy."""
        return self.doors[: self.setting.gateways]

    def start(self) -> None:
        """Nodes first, then `serve deploy`. Raises `LocalError` if the application does not get ready."""
        setting = self.setting
        front = {FRONT: 1.0}
        self.nodes.start_head(1, {} if setting.gateways_on_workers else front)
        for number in range(setting.workers):
            here = front if setting.gateways_on_workers and number < setting.gateways else {}
            self.nodes.add_worker(2, {BACK: 1.0, **here})
        self.deploy()
        if await_true(self._supervised, DEPLOY_TIMEOUT_S, 0.3) is None:
            raise LocalError(
                f"the service was not ready within {DEPLOY_TIMEOUT_S:g} s: {ask_ready(self.urls[0])}, "
                f"{dict(census(self.nodes.processes()))}\n{self.nodes.serve('status').stdout[-2000:]}"
            )

    def _supervised(self) -> bool:
        self.nodes.supervise()
        return self.is_whole()

    def deploy(self) -> None:
        """Send the configuration to Serve. Raises `LocalError`."""
        file = self.nodes.directory / "service.yaml"
        file.write_text(yaml.safe_dump(self.config))
        problems = check_file(file)
        if problems:
            raise LocalError("\n".join(problems))
        deployed = self.nodes.serve("deploy", str(file))
        if deployed.returncode:
            raise LocalError(f"serve deploy failed:\n{deployed.stderr.strip()[-2000:]}")

    @property
    def engines(self) -> int:
        """How many there should be."""
        for deployment in self.config["applications"][0]["deployments"]:
            if "autoscaling_config" in deployment:
                return int(deployment["autoscaling_config"]["min_replicas"])
        return self.setting.engines

    @property
    def stages(self) -> int:
        """How many processes of stages there should be, spares included."""
        return STAGES * self.engines * (2 if self.setting.spares else 1)

    def is_whole(self) -> bool:
        """All processes that should be there are, no others, and every replica that is heard of is ready."""
        counts = census(self.nodes.processes())
        wanted = {"engine": self.engines, "stage": self.stages, "gateway": self.setting.gateways}
        if any(counts[kind] != count for kind, count in wanted.items()) or not counts["controller"]:
            return False
        for url in self.urls:
            said = ask_ready(url)
            if not said.ready or said.serving < self.engines or "loading" in said.states or "failed" in said.states:
                return False
        return True

    def pipelines_with(self, pids: set[int]) -> frozenset[str]:
        """Replicas whose engine or one of whose stages is among these processes."""
        self.logs.follow()
        engines = of_kind(self.nodes.processes(), "engine")
        carriers = (e.pid for e in engines if pids & {e.pid, *self.logs.stages_of(e.pid).values()})
        return frozenset(replica for pid in carriers if (replica := self.logs.replica_of(pid)))

    def shutdown(self) -> None:
        self.nodes.serve("shutdown", "-y")


def open_network(setting: Setting) -> Network | None:
    return Network(setting.workers + 3) if setting.namespaces else None


def wait_for_end(nodes: Nodes, kinds: Sequence[str], timeout: float) -> float | None:
    """Seconds until no process of these kinds was left, or None."""
    return await_true(lambda: not any(census(nodes.processes())[kind] for kind in kinds), timeout)

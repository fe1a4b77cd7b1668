"""Pods without Kubernetes: a network, process and mount namespace each, started as KubeRay and the kubelet would.

What comes from the chart is taken from its rendered template: environment, volumes, probes, the preStop hook, the grace
period, `rayStartParams`. What KubeRay adds is written down here, from its
`generateRayStartCommand` (ray-project/kuberay, 2026-08): the command line and some variables. Not shown by
it: images, users, scheduling.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ops.chaos.namespaces import Namespace
from ops.processes import living_processes

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
# unshare ends with its child, and takes everything in the process namespace with it.
UNSHARE = ("unshare", "--pid", "--mount", "--fork", "--kill-child=KILL", "--mount-proc")


@dataclass(slots=True)
class Pod:
    """One of them, with its only container."""

    name: str
    space: Namespace
    template: dict[str, Any]
    start_params: dict[str, str]
    head_address: str  # the head's, its own for the head
    token: str
    directory: Path
    is_head: bool
    process: "subprocess.Popen[bytes] | None" = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.directory / f"{self.name}.log"

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.template["spec"]
        return spec

    @property
    def container(self) -> dict[str, Any]:
        container: dict[str, Any] = self.spec["containers"][0]
        return container

    def environment(self) -> dict[str, str]:
        address = "127.0.0.1" if self.is_head else self.head_address
        injected = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_ADDRESS": f"{address}:6379",
            "FQ_RAY_IP": self.head_address, "RAY_USAGE_STATS_KUBERAY_IN_USE": "1", "RAY_CLUSTER_NAME": "caravan",
        }  # fmt: skip
        image = {"PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "PYTHONPATH": str(ROOT)}
        own = {entry["name"]: entry["value"] for entry in self.container["env"]}
        return {**image, **own, **injected}

    def ray_start(self) -> str:
        """KubeRay's command line: its own parameters, the chart's, and those that follow from the resources."""
        own = {"dashboard-agent-listen-port": "52365", **self.start_params}
        if self.is_head:
            own["dashboard-host"] = "0.0.0.0"
        else:
            own["address"] = f"{self.head_address}:6379"
        words = " ".join(f"--{key}={value}" for key, value in sorted(own.items()))
        return f"ulimit -n 65536; ray start {'--head ' if self.is_head else ''}--block {words}"

    def start(self) -> None:
        scratch = self.directory / f"{self.name}-tmp"
        scratch.mkdir(exist_ok=True)
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        mounts = ["mount --make-rprivate /"]
        for mount in self.container["volumeMounts"]:
            empty = volumes[mount["name"]]["emptyDir"]
            if empty.get("medium") == "Memory":
                size = empty["sizeLimit"].replace("Mi", "m").replace("Gi", "g")
                mounts.append(f"mount -t tmpfs -o size={size} tmpfs {mount['mountPath']}")
            else:
                mounts.append(f"mount --bind {scratch} {mount['mountPath']}")
        if self.container["securityContext"]["readOnlyRootFilesystem"]:
            mounts.append("mount -o remount,bind,ro /")
        script = "; ".join([*mounts, 'exec "$@"'])
        command = [*self.space.prefix, *UNSHARE, "sh", "-ec", script, "sh", "/bin/bash", "-c", "--", self.ray_start()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment(), stdout=log, stderr=log, start_new_session=True, cwd="/"
            )

    def probe(self, kind: str) -> bool:
        """As the kubelet does, from outside."""
        probe = self.container[f"{kind}Probe"]
        get = probe["httpGet"]
        try:
            address = f"http://{self.space.address}:{get['port']}{get['path']}"
            return 200 <= httpx.get(address, timeout=probe["timeoutSeconds"]).status_code < 400
        except httpx.HTTPError:
            return False

    def await_probe(self, kind: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.probe(kind):
            assert self.process is not None
            words = self.log.read_text(errors="replace")[-2000:]
            if self.process.poll() is not None:
                self.start()  # restartPolicy: Always; Ray gives up where a machine is too busy for its deadlines
            assert time.monotonic() < deadline, f"{self.name} was not {kind} within {timeout_s:g} s: {words}"
            time.sleep(0.3)

    def delete(self) -> float:
        """As the kubelet ends a pod: the hook, SIGTERM, and SIGKILL when the grace period is over. Returns seconds."""
        assert self.process is not None
        began = time.monotonic()
        deadline = began + self.spec["terminationGracePeriodSeconds"]
        first = self._first()
        inside = ["nsenter", "--target", str(first), "--pid", "--mount", "--net"]
        hook = subprocess.Popen(
            [*inside, *self.container["lifecycle"]["preStop"]["exec"]["command"]], env=self.environment(), cwd="/"
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            hook.wait(deadline - time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGTERM)
        try:
            self.process.wait(max(2.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
        return time.monotonic() - began

    def _first(self) -> int:
        """The process that is 1 inside: the only child of unshare, which `ip netns exec` became."""
        assert self.process is not None
        return next(found.pid for found in living_processes() if found.parent == self.process.pid)

    def kill(self) -> None:
        """All of it at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

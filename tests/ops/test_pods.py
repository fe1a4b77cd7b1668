"""The chart's pods as they would run: one is deleted under streams, and none of them fails."""

import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ops.chaos.namespaces import NamespaceError, Network, check_possible
from ops.kubernetes.generate import CHART
from tests.ops.pods import Pod

sys.path.append(str(Path(__file__).parents[2] / ".venv" / "chart"))
helm = pytest.importorskip("helm_python", reason="Helm as a library: make .venv/chart/.ready")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOKENS, STREAMS = 160, 6
PROMPTS = [f"Write a long story about the number {i}." for i in range(STREAMS)]


@pytest.fixture
def pods() -> Iterator[list[Pod]]:
    """Head and workers of the laptop's values; not started."""
    try:
        check_possible()
    except NamespaceError as error:
        pytest.skip(str(error))
    values = yaml.safe_load((CHART.parent / "values" / "laptop-cpu.yaml").read_text())
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(values, name="caravan", namespace="models")
    service = yaml.safe_load(rendered["caravan/templates/rayservice.yaml"])
    cluster = service["spec"]["rayClusterConfig"]
    group = cluster["workerGroupSpecs"][0]
    with Network(1 + group["replicas"]) as network, tempfile.TemporaryDirectory(prefix="cv", dir="/tmp") as directory:
        for space in network.spaces:  # Ray asks the kernel by which address it would reach the internet
            route = ["ip", "-n", space.name, "route", "add", "default", "via", network.host]
            subprocess.run(route, check=True)
        head, token = network.spaces[0].address, secrets.token_hex(16)
        parts = [("head", cluster["headGroupSpec"])] + [(f"worker-{i}", group) for i in range(group["replicas"])]
        found = [
            Pod(name, space, part["template"], part["rayStartParams"], head, token, Path(directory), name == "head")
            for (name, part), space in zip(parts, network.spaces, strict=True)
        ]
        found[0].template = {**found[0].template, "service": service}
        try:
            yield found
        finally:
            for pod in found:
                pod.kill()


class Stream(threading.Thread):
    """One answer through one pod's port."""

    def __init__(self, address: str, prompt: str) -> None:
        super().__init__(daemon=True)
        self.address, self.prompt = address, prompt
        self.text, self.tokens, self.problem = "", 0, ""
        self.start()

    def run(self) -> None:
        body = {
            "model": "smollm2-135m-instruct", "prompt": self.prompt, "max_tokens": TOKENS, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        done = False
        try:
            with httpx.stream("POST", f"{self.address}/v1/completions", json=body, timeout=120) as answer:
                if answer.status_code != 200:
                    self.problem = f"{answer.status_code} {answer.read()!r}"
                    return
                for line in answer.iter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        self._take(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.problem = repr(error)
        if not done and not self.problem:
            self.problem = "it ended without [DONE]"

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.problem = str(chunk["error"])
        self.text += "".join(choice["text"] for choice in chunk.get("choices", []))
        self.tokens = (chunk.get("usage") or {}).get("completion_tokens", self.tokens)


def test_a_worker_that_is_deleted_under_streams_fails_none(pods: list[Pod]) -> None:
    head, *workers = pods
    head.start()
    head.await_probe("startup", 120)
    head.await_probe("readiness", 30)
    for worker in workers:
        worker.start()
    deploy(head)
    for worker in workers:
        worker.await_probe("readiness", 240)
        assert worker.probe("liveness")
    doors = [f"http://{worker.space.address}:8000" for worker in workers]
    calm = finished([Stream(doors[0], prompt) for prompt in PROMPTS])

    streams = [Stream(doors[i % len(doors)], prompt) for i, prompt in enumerate(PROMPTS)]
    while not all(stream.text for stream in streams):
        assert all(stream.is_alive() or stream.text for stream in streams), [s.problem for s in streams]
        time.sleep(0.05)
    open_then = sum(stream.is_alive() for stream in streams)
    took = workers[1].delete()
    later = [Stream(doors[0], prompt) for prompt in PROMPTS[:2]]  # its address is no endpoint any more
    disturbed = finished(streams)
    assert open_then == STREAMS
    assert disturbed == calm
    assert finished(later) == calm[:2]
    assert took < workers[1].spec["terminationGracePeriodSeconds"], "it was killed, not drained"

    workers[1].start()  # KubeRay's next pod
    workers[1].await_probe("readiness", 240)


def finished(streams: list[Stream]) -> list[str]:
    """Their texts, each whole."""
    for stream in streams:
        stream.join(180)
    assert [stream.problem for stream in streams] == [""] * len(streams)
    assert [stream.tokens for stream in streams] == [TOKENS] * len(streams)
    return [stream.text for stream in streams]


def deploy(head: Pod) -> None:
    """As KubeRay does with serveConfigV2."""
    config = yaml.safe_load(head.template["service"]["spec"]["serveConfigV2"])
    address = f"http://{head.space.address}:8265/api/serve/applications/"
    answer = httpx.put(address, json=config, headers={"Authorization": f"Bearer {head.token}"}, timeout=60)
    assert answer.status_code == 200, answer.text

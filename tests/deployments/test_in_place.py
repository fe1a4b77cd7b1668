"""Numbers that change while the service runs, on a real Serve: nobody is replaced, and no stream notices."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments import serve_file
from deployments.gateway.tenants import add_key
from ops.bench.service.deployed import Deployed, serving
from ops.bench.service.load import Stream, stream
from ops.local import session_processes
from tests.conftest import eventually

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
Json = dict[str, Any]
KINDS = ("ServeReplica:caravan:Engine", "ServeReplica:caravan:Gateway", "StageActor", "ServeController")


@dataclass(slots=True)
class Service:
    """A small made-up model behind keys, and how its configuration is changed."""

    deployed: Deployed
    content: Json
    directory: Path
    key: str

    @property
    def application(self) -> Json:
        found: Json = self.content["applications"][0]
        return found

    def deploy(self) -> None:
        file = self.directory / "changed.yaml"
        port = int(self.deployed.url.rpartition(":")[2])
        file.write_text(yaml.safe_dump({**self.content, "http_options": {"host": "127.0.0.1", "port": port}}))
        done = self.deployed.head.serve("deploy", str(file))
        assert done.returncode == 0, done.stderr

    def processes(self) -> dict[int, float]:
        """Those of replicas and stages, by id, with the time at which they were started."""
        found = {}
        for pid in session_processes(self.deployed.head):
            process = psutil.Process(pid)
            if any(kind in " ".join(process.cmdline()) for kind in KINDS):
                found[pid] = process.create_time()
        return found

    def get(self, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.get(f"{self.deployed.url}{path}", headers=headers, timeout=30)

    def bounds(self, name: str) -> Json:
        """As Serve has them."""
        headers = {"Authorization": f"Bearer {self.deployed.head.environment['RAY_AUTH_TOKEN']}"}
        url = f"{self.deployed.head.dashboard}/api/serve/applications/"
        body = httpx.get(url, headers=headers, timeout=30).json()
        found: Json = body["applications"]["caravan"]["deployments"][name]["deployment_config"]["autoscaling_config"]
        return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("in-place")
    key = add_key(directory / "keys.yaml", "team", requests_per_minute=6000)
    content = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    application = content["applications"][0]
    application["args"]["model"] = {
        "path": "shape:test-1m", "name": "tiny", "dtype": "float32", "load_format": "dummy", "max_model_len": 1024,
    }  # fmt: skip
    application["args"]["pipeline"]["split"] = "auto"
    serve_file.put(application, "autoscaling", {"min_replicas": 1, "max_replicas": 1})
    gateway = serve_file.deployment(application, "Gateway")["user_config"]
    gateway |= {"auth": {"keys_file": str(directory / "keys.yaml")}, "admission": {"target_ttft_s": 300.0}}
    with serving(content, haproxy=False) as deployed:
        yield Service(deployed, content, directory, key)


class Streams:
    """Open all the time, one after the other in each of `n` places."""

    def __init__(self, service: Service, n: int) -> None:
        self.done: list[Stream] = []
        self._url = f"{service.deployed.url}/v1/completions"
        self._headers = {"Authorization": f"Bearer {service.key}"}
        self._n = n
        self._enough = asyncio.Event()

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=None, headers=self._headers) as client:
            await asyncio.gather(*(self._place(client, i) for i in range(self._n)))

    async def _place(self, client: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "tiny", "prompt": [number + 5, 7, 9], "max_tokens": 400, "temperature": 0, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        while not self._enough.is_set():
            self.done.append(await stream(client, self._url, body))

    def end(self) -> None:
        self._enough.set()


def during_streams(service: Service, work: Any) -> list[Stream]:
    """Do `work` in a thread while 8 streams are open; returns them when they have ended."""

    async def main() -> list[Stream]:
        streams = Streams(service, 8)
        running = asyncio.ensure_future(streams.run())
        await asyncio.sleep(2)
        try:
            await asyncio.to_thread(work)
        finally:
            streams.end()
        await running
        return streams.done

    return asyncio.run(main())


def test_numbers_change_and_nobody_is_replaced(service: Service) -> None:
    before = service.processes()
    assert len(before) == 5, "a controller, a gateway, an engine, two stages"
    assert service.get("/v1/models").headers["x-ratelimit-limit-requests"] == "6000"
    assert service.get("/info").status_code == 404
    assert service.bounds("Engine")["max_replicas"] == 1

    def change() -> None:
        add_key(service.directory / "keys.yaml", "team", requests_per_minute=9000)
        gateway = serve_file.deployment(service.application, "Gateway")
        gateway["user_config"] |= {
            "gateway": {"keepalive_s": 0.5, "routes": ["tgi"], "max_messages": 1},
            "admission": {"target_ttft_s": 200.0},
            "logging": {"level": "DEBUG"},
        }
        serve_file.deployment(service.application, "Engine")["user_config"] = {"logging": {"level": "DEBUG"}}
        serve_file.put(service.application, "autoscaling", {"max_replicas": 3, "downscale_delay_s": 60})
        service.deploy()
        eventually(lambda: service.get("/info").status_code == 200, 30, "the new route answers")
        eventually(lambda: service.bounds("Engine")["max_replicas"] == 3, 30, "Serve has the new bounds")
        limit = lambda: service.get("/v1/models").headers["x-ratelimit-limit-requests"]  # noqa: E731
        eventually(lambda: limit() == "9000", 10, "the tenant has its new limit")

    streams = during_streams(service, change)
    assert len(streams) >= 8
    assert {(s.error, s.output_tokens) for s in streams} == {("", 400)}
    assert service.processes() == before
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}] * 2, "max_tokens": 1}
    headers = {"Authorization": f"Bearer {service.key}"}
    refused = httpx.post(f"{service.deployed.url}/v1/chat/completions", json=chat, headers=headers, timeout=30)
    assert "at most 1 are allowed" in refused.text, "a limit of the gateway counts at once"


def test_what_is_wrong_changes_nothing_and_is_said(service: Service) -> None:
    before = service.processes()
    good = json.loads(json.dumps(serve_file.deployment(service.application, "Gateway")["user_config"]))

    def change() -> None:
        gateway = serve_file.deployment(service.application, "Gateway")
        gateway["user_config"] = {**good, "gateway": {"keep_alive": 1.0}}
        service.deploy()
        said = lambda: service.get("/ready").json().get("refused_configuration", "")  # noqa: E731
        eventually(lambda: "gateway.keep_alive: unknown key" in said(), 30, "the problem is said")
        assert service.get("/info").status_code == 200, "and all is as it was"
        gateway["user_config"] = good
        service.deploy()
        eventually(lambda: not said(), 30, "it is good again")

    streams = during_streams(service, change)
    assert {(s.error, s.output_tokens) for s in streams} == {("", 400)}
    assert service.processes() == before

"""A service of its own on this machine, to be measured over HTTP: Ray, `serve deploy`, and a clean end."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments import serve_file
from ops.bench import workload
from ops.bench.service import load
from ops.local import Head, LocalError, await_ready, free_port, ray_head

VOCAB = 49_000
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deployed:
    """What is deployed, and how to reach it."""

    head: Head
    url: str
    model: str
    start_s: float  # from `serve deploy` until it was ready

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    def bodies(self, count: int, first: int, prompt_tokens: int, new_tokens: int) -> list[Json]:
        """Requests of one length, with prompts that share nothing; `first` is the number of the first prompt."""
        return [
            {
                "model": self.model,
                "prompt": workload.prompt(first + i, prompt_tokens, VOCAB),
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
            for i in range(count)
        ]


def all_served(capacity: load.Summary) -> load.Summary:
    """A run that shows what a service can take. Raises `LocalError` if it refused some: then it does not show that."""
    if capacity.failed:
        raise LocalError(
            f"{capacity.failed} of {capacity.requests} requests failed while it was measured what the service takes: "
            "this machine is too slow for the time to the first token that is asked of it (admission.target_ttft_s)"
        )
    return capacity


@contextmanager
def deployed(config: Path, sections: dict[str, Json], haproxy: bool) -> Iterator[Deployed]:
    """One pipeline of `config` with these settings in place of its own. Raises `LocalError`."""
    content = yaml.safe_load(config.read_text("utf-8"))
    application = content["applications"][0]
    # One stage, so that a small machine has a core left for the gateway and for the clients.
    for name, section in {"pipeline": {"stages": 1, "split": "auto"}, **sections}.items():
        serve_file.put(application, name, section)
    serve_file.put(application, "autoscaling", {"min_replicas": 1, "max_replicas": 1})
    with serving(content, haproxy) as service:
        yield service


@contextmanager
def serving(content: Json, haproxy: bool, num_cpus: int = 2, pipelines: int = 1) -> Iterator[Deployed]:
    """This Serve configuration, on a free port; so many of its pipelines are ready. Raises `LocalError`."""
    with tempfile.TemporaryDirectory(prefix="cv") as temporary, ingress(Path(temporary), haproxy):
        port, file = free_port(), Path(temporary) / "deployed.yaml"
        http = {**(content.get("http_options") or {}), "host": "127.0.0.1", "port": port}
        file.write_text(yaml.safe_dump({**content, "http_options": http}))
        with ray_head(num_cpus) as head:
            started = time.monotonic()
            done = head.serve("deploy", str(file))
            if done.returncode:
                raise LocalError(f"serve deploy failed:\n{done.stderr.strip()}")
            url = f"http://127.0.0.1:{port}"
            await_ready(head, url, pipelines)
            start_s = round(time.monotonic() - started, 1)
            try:
                yield Deployed(head, url, content["applications"][0]["args"]["model"]["name"], start_s)
            finally:
                head.serve("shutdown", "-y")


@contextmanager
def ingress(directory: Path, haproxy: bool) -> Iterator[None]:
    """Serve's ingress is HAProxy while this lasts, with files and ports of its own; or Serve's own proxy."""
    base = "RAY_SERVE_HAPROXY_"
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_FILE": "server-state"}
    names = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        f"{base}SERVER_STATE_BASE": str(directory / "haproxy"),
        f"{base}METRICS_PORT": str(free_port()),
        f"{base}STATS_PORT": str(free_port()),
        **{base + name: str(directory / file) for name, file in files.items()},
    }
    before = {name: os.environ.get(name) for name in names}
    if haproxy:
        os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

"""A real Prometheus and a real Alertmanager on this machine, with a receiver that keeps what they send."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from ops.local import free_port

PROMETHEUS, ALERTMANAGER = "prometheus", "prometheus-alertmanager"
Sample = tuple[dict[str, str], float]


def missing() -> str:
    """What a test would skip for; empty if both are there."""
    return ", ".join(name for name in (PROMETHEUS, ALERTMANAGER) if shutil.which(name) is None)


class Watching:
    """Both of them, and what has been told to whoever is on call."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.told: list[tuple[str, str, dict[str, str]]] = []  # status, alert, labels

    def query(self, expression: str) -> list[Sample]:
        answer = httpx.post(f"{self.url}/api/v1/query", data={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", (expression, answer)
        return [(found["metric"], float(found["value"][1])) for found in answer["data"]["result"]]

    def broken_rules(self) -> list[tuple[str, str]]:
        """Those that Prometheus cannot evaluate, and why."""
        answer = httpx.get(f"{self.url}/api/v1/rules", timeout=30).json()
        found = [rule for group in answer["data"]["groups"] for rule in group["rules"]]
        return [(rule["name"], rule.get("lastError", "")) for rule in found if rule["health"] == "err"]

    def names(self, status: str) -> list[str]:
        return [name for what, name, _ in list(self.told) if what == status]

    def await_told(self, name: str, status: str, timeout: float, **wanted: str) -> dict[str, str]:
        """The labels of the first such message with these among them. Fails if none comes in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for what, which, labels in list(self.told):
                if (what, which) == (status, name) and wanted.items() <= labels.items():
                    return labels
            time.sleep(0.3)
        firing = self.query('ALERTS{alertstate=~"firing|pending"}')
        raise AssertionError(f"{name} is not {status} within {timeout:g} s; {self.told}; {firing}")


@contextmanager
def watching(directory: Path, target: str, rules: dict[str, Any]) -> Iterator[Watching]:
    """Scrapes `target` (host:port) every second, evaluates the rules, tells what fires."""
    ports = {name: free_port() for name in ("prometheus", "alertmanager")}
    found = Watching(f"http://127.0.0.1:{ports['prometheus']}")

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in body["alerts"]:
                found.told.append((alert["status"], alert["labels"]["alertname"], alert["labels"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hook = {"url": f"http://127.0.0.1:{server.server_address[1]}/", "send_resolved": True}
        route = {
            "receiver": "call",
            "group_by": ["..."],
            "group_wait": "0s",
            "group_interval": "1s",
            "repeat_interval": "4h",
        }
        manager = {"route": route, "receivers": [{"name": "call", "webhook_configs": [hook]}]}
        (directory / "alertmanager.yml").write_text(yaml.safe_dump(manager))
        (directory / "rules.yml").write_text(json.dumps(rules))
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{ports['alertmanager']}"]}]}]},
            "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(settings))
        commands = [
            [ALERTMANAGER, f"--config.file={directory}/alertmanager.yml", f"--storage.path={directory}/am",
             f"--web.listen-address=127.0.0.1:{ports['alertmanager']}", "--cluster.listen-address="],
            [PROMETHEUS, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb",
             f"--web.listen-address=127.0.0.1:{ports['prometheus']}"],
        ]  # fmt: skip
        processes = []
        try:
            for command in commands:
                log = (directory / f"{command[0]}.log").open("wb")
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            _await_ready(found.url)
            yield found
        finally:
            for process in processes:
                process.terminate()
                process.wait(20)
            server.shutdown()


def _await_ready(url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/-/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError("Prometheus does not get ready")

"""The board's queries and the alerts on a real Prometheus and Alertmanager, beside a real service that is broken.

Windows are a 60th of what is shipped (an hour is a minute, none is under 4 s): a test cannot wait for days.
"""

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ops.bench.service import load
from ops.chaos.service import MODEL, SHAPE
from ops.local import Head, await_ready, free_port, ray_head, session_processes
from ops.watch import top
from ops.watch.alerts import rules
from ops.watch.dashboard import GPU_PANELS, dashboard, in_plain
from ops.watch.objectives import objectives
from tests.conftest import eventually
from tests.deployments.test_deployed import cmdline
from tests.ops.prometheus import Watching, missing, watching

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()}"),
]
SHORTENED = 60
STAGES = 3
SWITCHED_OFF = "speculation_|adapter"  # metrics of what this small service does not do


def config(port: int) -> dict[str, Any]:
    args = {
        "model": {"path": SHAPE, "name": MODEL, "dtype": "float32", "load_format": "dummy", "max_model_len": 512},
        "pipeline": {"stages": STAGES, "device": "cpu", "threads": 1, "recovery_attempts": 9},
        "cache": {"memory_gb": 0.05},
        "scheduler": {"max_num_seqs": 32, "max_num_batched_tokens": 256},
        "gateway": {"resume_timeout_s": 3.0, "resume_attempts": 1},
        "admission": {"target_ttft_s": 300.0},
        "autoscaling": {"min_replicas": 1, "max_replicas": 1},
        "resources": {"gateway_cpus": 0.1, "engine_cpus": 0.1, "stage_cpus": 0.2, "drain_timeout_s": 20.0},
    }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {"name": "caravan", "route_prefix": "/", "import_path": "deployments.app:build", "args": args}
        ],
    }


class Service:
    """A small one, under load."""

    def __init__(self, head: Head, url: str) -> None:
        self.head, self.url = head, url

    def processes(self, word: str) -> list[int]:
        return sorted(pid for pid in session_processes(self.head) if word in cmdline(pid))

    @contextmanager
    def loaded(self, streams: int = 8) -> Iterator[None]:
        """So many streams at once, one after the other. What becomes of them is no matter here."""
        ended = threading.Event()

        async def worker(client: httpx.AsyncClient, number: int) -> None:
            body = {"model": MODEL, "prompt": [5 + number] * 30, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
            while not ended.is_set():
                result = await load.stream(client, f"{self.url}/v1/completions", body)
                await asyncio.sleep(0.2 if result.error else 0)

        async def main() -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                await asyncio.gather(*(worker(client, i) for i in range(streams)))

        thread = threading.Thread(target=lambda: asyncio.run(main()))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(90)

    @contextmanager
    def slowed(self, pid: int, share: float) -> Iterator[None]:
        """A process that is stopped for this share of the time, 20 times a second."""
        ended = threading.Event()

        def brake() -> None:
            while not ended.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.05 * share)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.05 * (1 - share))

        thread = threading.Thread(target=brake)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("watched") / "config.yaml"
    port = free_port()
    file.write_text(yaml.safe_dump(config(port)))
    with ray_head(2) as head:
        deployed = head.serve("deploy", str(file))
        assert deployed.returncode == 0, deployed.stderr
        await_ready(head, f"http://127.0.0.1:{port}")
        yield Service(head, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def watch(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watching]:
    target = service.head.metrics.removeprefix("http://").removesuffix("/metrics")
    table = objectives(first_token_s=20.0, inter_token_s=2.5)  # what is slow here is the machine
    with watching(tmp_path_factory.mktemp("prometheus"), target, rules(table, shortened=SHORTENED)) as found:
        yield found


def test_every_panel_shows_something_under_load(service: Service, watch: Watching) -> None:
    """Recoveries and what only a GPU has apart."""
    assert httpx.post(f"{service.url}/v1/completions", json={}).status_code == 400
    gpus = {title for title, *_ in GPU_PANELS}
    # Their series are born with what they tell of: a stream that was moved, a pipeline that was rebuilt.
    later = {"Pause of resumed streams", "Time to rebuild a pipeline"}
    targets = [
        (board, panel["title"], target["expr"])
        for board in ("service", "pipeline")
        for panel in dashboard(board)["panels"]  # type: ignore[arg-type]
        for target in panel.get("targets", [])
        if panel["title"] not in gpus | later and not re.search(SWITCHED_OFF, target["expr"])
    ]
    assert len(targets) > 50

    def empty(replica: str) -> list[tuple[str, str, str]]:
        """Those that have shown nothing: a gauge may be missing at one look while processors are scarce."""
        left, deadline = targets, time.monotonic() + 60
        while left and time.monotonic() < deadline:
            choice = {"application": "caravan", "replica": replica}
            left = [target for target in left if not watch.query(in_plain(target[2], choice.__getitem__, "15s"))]
        return left

    with service.loaded():
        left = empty(".*")
        assert watch.broken_rules() == []
        assert left == [], watch.query("rate(ray_caravan_requests_total[1m]) > 0")
        assert empty(watch.query("last_over_time(ray_caravan_running[1m])")[0][0]["replica"]) == []
        assert watch.query('count(ALERTS{alertstate="firing",severity="page"})') == []


@pytest.mark.slow  # other stages are slow too where processors are scarce
def test_a_slow_stage_is_named_by_the_board_the_alert_and_the_live_view(
    service: Service, watch: Watching, capsys: pytest.CaptureFixture[str]
) -> None:
    panel = next(p for p in dashboard()["panels"] if p["title"].startswith("Slowest stage"))
    query = in_plain(panel["targets"][0]["expr"], window="10s")
    with service.loaded():
        info = {labels["stage"]: labels["node"] for labels, _ in watch.query("ray_caravan_stage_info")}
        assert sorted(info) == ["0", "1", "2"]
        node = info["1"]
        pids = stage_pids(service)
        with service.slowed(pids[1], 0.75):
            watch.await_told("CaravanStageSick", "firing", 90, stage="1", node=node)
            worst = max(watch.query(query), key=lambda sample: sample[1])
            assert (worst[0]["stage"], worst[0]["node"]) == ("1", node)
            assert worst[1] > 1.3
            assert top.run([service.head.metrics], interval=5, once=True) == 0
            (line,) = [line for line in capsys.readouterr().out.splitlines() if "slowest" in line]
            assert re.search(rf"\b1 +{re.escape(node)}", line), line
        watch.await_told("CaravanStageSick", "resolved", 60, stage="1")


def stage_pids(service: Service) -> list[int]:
    """In order, as the engine's log says them."""
    logs = "".join(f.read_text(errors="replace") for f in service.head.directory.glob("session_*/logs/serve/*Engine*"))
    logs += "".join(f.read_text(errors="replace") for f in service.head.directory.glob("session_*/logs/worker-*.err"))
    said = dict(re.findall(r"stage (\d+) \(pid (\d+) on [^)]*\): layers", logs))
    return [int(said[str(stage)]) for stage in range(STAGES)]


def rebuilt(watch: Watching, times: int) -> bool:
    return sum(value for _, value in watch.query("ray_caravan_recoveries_total")) > times


def test_a_pipeline_that_flaps(service: Service, watch: Watching) -> None:
    with service.loaded(4):
        for killed in range(4):
            os.kill(service.processes("StageActor")[0], signal.SIGKILL)
            eventually(partial(rebuilt, watch, killed), 60, "the pipeline is rebuilt")
        watch.await_told("CaravanPipelineFlaps", "firing", 30)
    watch.await_told("CaravanPipelineFlaps", "resolved", 90)


@pytest.mark.slow
def test_an_engine_that_hangs_pages_and_the_page_ends(service: Service, watch: Watching) -> None:
    """There is no other engine: which alert is first depends on who notices first. Serve replaces it in the end."""
    before = len(watch.told)

    def paged(status: str) -> set[str]:
        return {name for what, name, labels in watch.told[before:] if what == status and labels["severity"] == "page"}

    with service.loaded(16):
        (engine,) = service.processes("ServeReplica:caravan:Engine")
        os.kill(engine, signal.SIGSTOP)
        try:
            eventually(lambda: paged("firing"), 120, "somebody is called")
        finally:
            with suppress(ProcessLookupError):  # Serve may have ended it
                os.kill(engine, signal.SIGKILL)
        await_ready(service.head, service.url)
    eventually(lambda: paged("firing") <= paged("resolved"), 120, "every page ends")


def test_a_service_that_is_gone_pages(service: Service, watch: Watching) -> None:
    before = watch.names("firing").count("CaravanAbsent")
    assert service.head.serve("shutdown", "-y").returncode == 0
    eventually(lambda: watch.names("firing").count("CaravanAbsent") > before, 60, "its absence is noticed")


def test_links_of_alerts_work(watch: Watching, tmp_path: Path) -> None:
    """Where the runbook is served, the link of every alert leads to its section."""
    headings = (Path(__file__).parents[2] / "ops/runbook.md").read_text()
    answer = httpx.get(f"{watch.url}/api/v1/rules", params={"type": "alert"}).json()
    links = [rule["annotations"]["runbook_url"] for group in answer["data"]["groups"] for rule in group["rules"]]
    assert links
    for link in links:
        anchor = link.partition("#")[2]
        assert re.search(rf"^### {anchor}$", headings, re.MULTILINE | re.IGNORECASE), link

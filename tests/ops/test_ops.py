"""Metrics, dashboard, live view, logs and load generator, each against what it stands for."""

import asyncio
import json
import logging
import math
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from rich.console import Console

from deployments import logs
from deployments.metrics import METRICS, Recorder
from ops.bench.service import load
from ops.watch import top
from ops.watch.alerts import rules
from ops.watch.dashboard import GPU_PANELS, Board, dashboard, dashboard_json, exported, in_plain

BY_NAME = {m.name: m for m in METRICS}


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_metric_is_well_formed() -> None:
    assert len(BY_NAME) == len(METRICS)
    for m in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", m.name)
        assert m.help[0].isupper()
        assert not m.help.endswith(".")
        assert (m.kind == "histogram") == bool(m.buckets)
        assert list(m.buckets) == sorted(set(m.buckets))
        if m.kind == "counter":
            assert m.name.endswith("_total")
        if m.slo is not None:
            assert m.slo in m.buckets, "a service level must be an edge, or its share cannot be computed"


class Backend:
    """Stands in for ray.serve.metrics, with prometheus_client behind it and Ray's habits in front."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        outer = self

        class Counter:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                self._metric = prometheus_client.Counter(
                    f"ray_{name}", description, [*tag_keys, *WHO], registry=outer.registry
                )

            def _record(self, value: float, tags: dict[str, str]) -> None:
                self._metric.labels(**tags, **WHO).inc(value)

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0
                self._metric.labels(**tags, **WHO).inc(value)

        class Gauge:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                self._metric = prometheus_client.Gauge(
                    f"ray_{name}", description, [*tag_keys, *WHO], registry=outer.registry
                )

            def set(self, value: float, tags: dict[str, str]) -> None:
                self._metric.labels(**tags, **WHO).set(value)

        class Histogram:
            def __init__(self, name: str, description: str, boundaries: list[float], tag_keys: tuple[str, ...]) -> None:
                self._metric = prometheus_client.Histogram(
                    f"ray_{name}", description, [*tag_keys, *WHO], registry=outer.registry, buckets=boundaries
                )

            def observe(self, value: float, tags: dict[str, str]) -> None:
                self._metric.labels(**tags, **WHO).observe(value)

        self.Counter, self.Gauge, self.Histogram = Counter, Gauge, Histogram

    def text(self) -> str:
        return prometheus_client.generate_latest(self.registry).decode()


WHO = {"application": "caravan", "replica": "r1"}


def recorded(backend: Backend, seconds: int = 0) -> str:
    """What a replica exports after `seconds` of a certain load."""
    engine, gateway = Recorder(backend, "engine"), Recorder(backend, "gateway")
    return fill(backend, engine, gateway, seconds)


def fill(backend: Backend, engine: Recorder, gateway: Recorder, seconds: int) -> str:
    for name in ("running", "waiting", "kv_blocks_used", "kv_blocks_total", "last_token_age_seconds"):
        engine.set(name, {"running": 8, "waiting": 2, "kv_blocks_used": 30, "kv_blocks_total": 40}.get(name, 0.5))
    engine.set("weights_loaded_ratio", 1.0)
    engine.set("waiting_tokens", 100)
    if seconds:
        engine.inc("generated_tokens_total", 100 * seconds)
        gateway.inc("requests_total", 9 * seconds, endpoint="probe", outcome="ok", status="200")
        gateway.inc("requests_total", 2 * seconds, endpoint="chat", outcome="stop", status="200")
        for stage, busy in (("0", 0.9), ("1", 0.6)):
            engine.inc("stage_busy_seconds_total", busy * seconds, stage=stage)
            engine.inc("stage_wait_seconds_total", (0.95 - busy) * seconds, stage=stage)
            engine.inc("stage_transfer_seconds_total", 0.05 * seconds, stage=stage)
            engine.inc("stage_steps_total", 30 * seconds, stage=stage)
            engine.observe("stage_step_seconds", busy / 30, stage=stage)
            for gpu in ("2", "3"):
                engine.set("stage_info", 1.0, stage=stage, node=f"10.0.0.{stage}", gpu=gpu)
        for _ in range(100):
            gateway.observe("ttft_seconds", 0.3)
    return backend.text()


def test_names_as_exported_are_those_of_the_table() -> None:
    text = recorded(Backend(), 5)
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    for m in METRICS:
        assert exported(m.name) in families, m.name


def test_what_is_not_in_the_table_is_an_error() -> None:
    recorder = Recorder(Backend(), "engine")
    with pytest.raises(KeyError):
        recorder.set("no_such_metric", 1.0)
    with pytest.raises(ValueError, match="label"):
        recorder.set("running", 1.0, colour="red")
    with pytest.raises(KeyError):
        recorder.observe("ttft_seconds", 1.0)  # the gateway's


# -- the dashboard ----------------------------------------------------------------------------------------------------


BOARDS: tuple[Board, ...] = ("service", "pipeline")


def queries(board: Board) -> list[str]:
    return [target["expr"] for panel in dashboard(board)["panels"] for target in panel.get("targets", [])]


def test_every_metric_has_its_panel_and_every_panel_its_metric() -> None:
    titles = [panel["title"] for board in BOARDS for panel in dashboard(board)["panels"]]
    assert [m.name for m in METRICS if titles.count(m.title) != 1] == []
    text = "".join(map(dashboard_json, BOARDS))
    used = set(re.findall(r"ray_caravan_\w+", text))
    assert used <= {exported(m.name) for m in METRICS} | {f"{exported(m.name)}_bucket" for m in METRICS if m.buckets}
    recorded_ = {rule["record"] for rule in rules()["groups"][0]["rules"]}
    assert set(re.findall(r"caravan:\w+:\w+", text)) <= recorded_
    assert dashboard_json() == dashboard_json()


def test_what_is_promised_comes_first_then_the_slowest_stage_then_demand() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert [title.split(":")[0] for title in rows[:3]] == ["Objectives", "Stages", "Demand and capacity"]
    stage = next(p for p in dashboard()["panels"] if p["title"].startswith("Slowest stage"))
    assert stage["gridPos"]["y"] < 8, "on the first screen"
    assert "{{node}}" in stage["targets"][0]["legendFormat"]


def test_a_choice_of_replica_empties_no_panel_of_gateways() -> None:
    names = [[v["name"] for v in dashboard(board)["templating"]["list"]] for board in BOARDS]
    assert names == [["datasource", "application"], ["datasource", "application", "replica"]]
    assert not [q for q in queries("service") if "$replica" in q]
    gateways = [exported(m.name) for m in METRICS if m.owner == "gateway"]
    assert not [q for q in queries("pipeline") if any(name in q for name in gateways)]


def test_links_lead_to_the_runbook_and_to_the_other_board() -> None:
    for board, other in zip(BOARDS, reversed(BOARDS), strict=True):
        made = dashboard(board, "https://wiki.example/runbook")
        assert [link["url"] for link in made["links"]] == [
            "https://wiki.example/runbook",
            f"/d/{dashboard(other)['uid']}",
        ]


@pytest.mark.parametrize("board", BOARDS)
def test_panels_do_not_overlap(board: Board) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard(board)["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard(board)["panels"]]
    assert len(set(ids)) == len(ids)


def test_promtool_accepts_every_expression_and_the_exported_text(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (part of Prometheus) is not installed")
    made = [
        {"record": f"x:{i}", "expr": in_plain(query)}
        for i, query in enumerate(queries("service") + queries("pipeline"))
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": made}]}))  # JSON is YAML
    done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = recorded(Backend(), 5).replace("_created", "_created_seconds")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    problems = [line for line in done.stderr.splitlines() if "_created" not in line]
    assert not [p for p in problems if "error" in p], problems


def test_the_gpu_of_a_stage_is_found_by_its_node_and_index(tmp_path: Path) -> None:
    """As Ray exports it; NVIDIA's exporter names the node by its address and port."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (part of Prometheus) is not installed")
    info = 'ray_caravan_stage_info{application="c",replica="r1",stage="%d",node="10.0.0.%d",gpu="%d"}'
    series = {info % (0, 1, 0): "1x5", info % (1, 1, 1): "1x5", info % (2, 2, 0): "1x5"}
    tests = []
    for title, _, metric, node, index, factor in GPU_PANELS:
        port = ":9400" if node == "instance" else ""
        values = {(host, gpu): 1000 * host + gpu for host in (1, 2, 3) for gpu in (0, 1)}
        for (host, gpu), value in values.items():
            series[f'{metric}{{{node}="10.0.0.{host}{port}",{index}="{gpu}",GpuUuid="x"}}'] = f"{value}x5"
        panel = next(p for p in dashboard("pipeline")["panels"] if p["title"] == title)
        seen = [(0, 1, 0), (1, 1, 1), (2, 2, 0)]
        samples = [
            {
                "labels": f'{{application="c",replica="r1",stage="{s}",node="10.0.0.{host}",gpu="{gpu}"}}',
                "value": values[host, gpu] * factor,
            }
            for s, host, gpu in seen
        ]
        tests.append({"expr": in_plain(panel["targets"][0]["expr"]), "eval_time": "1m", "exp_samples": samples})
    whole = {
        "interval": "15s",
        "input_series": [{"series": name, "values": value.replace("x", "+0x")} for name, value in series.items()],
        "promql_expr_test": tests,
    }
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps({"rule_files": [], "tests": [whole]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the live view ----------------------------------------------------------------------------------------------------


def test_the_view_shows_rates_shares_and_the_slowest_stage() -> None:
    backend = Backend()
    engine, gateway = Recorder(backend, "engine"), Recorder(backend, "gateway")
    before = top.parse(fill(backend, engine, gateway, 0))
    after = top.parse(fill(backend, engine, gateway, 4))
    view = top.summarise(before, after, 4.0)
    assert view.output_tokens == pytest.approx(100)
    assert view.requests == pytest.approx(2)
    assert view.ttft_p95 == 0.5  # the edge above 0.3
    (replica,) = view.replicas
    assert (replica.replica, replica.running, replica.waiting, replica.kv_use) == ("r1", 8, 2, 0.75)
    assert [s.stage for s in replica.stages] == ["0", "1"]
    assert replica.stages[0].busy == pytest.approx(0.9)
    assert replica.stages[1].waiting == pytest.approx(0.35)
    assert replica.stages[0].step_ms == pytest.approx(30)
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(top.render(view))
    lines = console.export_text().splitlines()
    assert ["slowest" in line for line in lines if " ms" in line] == [True, False]
    assert "100.0 tok/s" in lines[0]
    assert ["10.0.0.0 GPU 2,3" in line for line in lines if "slowest" in line] == [True]


def test_the_view_without_data() -> None:
    view = top.summarise({}, {}, 1.0)
    assert math.isnan(view.ttft_p95)
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(top.render(view))
    assert "no engine replica" in console.export_text()
    assert top.run(["http://127.0.0.1:9/metrics"], once=True) == 1


def test_the_view_names_an_endpoint_that_is_dead_and_shows_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    backend = Backend()
    engine, gateway = Recorder(backend, "engine"), Recorder(backend, "gateway")
    dead = "http://127.0.0.1:9/metrics"
    with metrics_server(lambda: fill(backend, engine, gateway, 1)) as alive:
        assert top.run([dead, alive], interval=0.01, once=True) == 0
    shown = capsys.readouterr().out
    assert f"no answer from {dead}" in shown
    assert "no answer from " + alive not in shown
    assert "r1" in shown
    assert "give the right address" not in shown


def test_an_endpoint_that_comes_back_brings_no_rate_of_all_its_time() -> None:
    backend = Backend()
    text = fill(backend, Recorder(backend, "engine"), Recorder(backend, "gateway"), 4)
    gone = top.Scrape(0.0, {}, {"a": "gone"})
    back = top.Scrape(2.0, {"a": top.parse(text)}, {})
    assert back.since(gone).output_tokens == 0.0
    assert back.since(back).replicas[0].running == 8


@contextmanager
def metrics_server(text: Callable[[], str]) -> Iterator[str]:
    """An endpoint of its own; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()


@pytest.mark.parametrize(
    ("busy", "slowest"), [((0.9, 0.6), 0), ((0.9, 0.89), None), ((0.04, 0.01), None), ((0.9,), None), ((0.3, 0.4), 1)]
)
def test_slowest_is_said_where_the_difference_means_something(busy: tuple[float, ...], slowest: int | None) -> None:
    stages = [top.StageView(str(i), busy=share) for i, share in enumerate(busy)]
    assert top.slowest_stage(stages) is (None if slowest is None else stages[slowest])


# -- logs -------------------------------------------------------------------------------------------------------------


def test_log_lines_are_json_with_known_fields_only() -> None:
    record = logging.LogRecord("deployments.x", logging.INFO, "f", 1, "hello %s", ("you",), None)
    record.request_id, record.prompt = "abc", "secret"
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["message"], line["request_id"], line["level"]) == ("hello you", "abc", "INFO")
    assert "secret" not in str(line)
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    text = logs.JsonFormatter().format(record)
    assert "ValueError: broken" in json.loads(text)["exception"]
    assert "\n" not in text


def test_lines_carry_what_is_known_of_their_request() -> None:
    formatter = logs.JsonFormatter(replica="own")

    def line(**fields: Any) -> dict[str, Any]:
        record = logging.makeLogRecord({"msg": "m", **fields})
        return {name: value for name, value in json.loads(formatter.format(record)).items() if name in logs.FIELDS}

    async def serve(request_id: str) -> list[dict[str, Any]]:
        logs.begin(request_id=request_id)
        seen = [line()]

        async def part() -> None:
            await asyncio.sleep(0)
            logs.bind(replica=f"of {request_id}", secret="s")

        await asyncio.create_task(part())
        return [*seen, line(), line(request_id="given")]

    async def both() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(serve("a"), serve("b"))

    for request_id, lines in zip("ab", asyncio.run(both()), strict=True):
        assert lines[0] == {"request_id": request_id, "replica": "own"}
        assert lines[1] == {"request_id": request_id, "replica": f"of {request_id}"}
        assert lines[2]["request_id"] == "given"
    logs.bind(request_id="outside of all requests")
    assert line() == {"replica": "own"}


# -- load -------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Streams as the path says."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/refuse":
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        for i in range(5):
            self.chunk({"choices": [{"text": str(i), "finish_reason": None}]})
        if self.path == "/error":
            self.chunk({"error": {"message": "a stage died"}})
        if self.path == "/good":
            self.chunk({"choices": [], "usage": {"completion_tokens": 5}})
            self.wfile.write(b"data: [DONE]\n\n")

    def chunk(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "error"),
    [("good", ""), ("refuse", "HTTP 503"), ("error", "a stage died"), ("cut", "without [DONE]")],
)
def test_load_counts_what_was_not_served(server: str, path: str, error: str) -> None:
    summary, streams = asyncio.run(load.run(f"{server}/{path}", [{}] * 6, concurrency=2))
    assert (summary.requests, summary.failed) == (6, 6 if error else 0)
    assert all(error in s.error for s in streams)
    assert summary.output_tokens == (0 if error else 30)
    if not error:
        assert all(s.text == "01234" and len(s.gaps_s) == 4 and s.ttft_s > 0 for s in streams)
        assert summary.output_throughput == pytest.approx(30 / summary.seconds)


def test_percentiles() -> None:
    assert load.percentiles([*map(float, range(101))]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert load.percentiles([]) == {"p50": 0.0, "p95": 0.0, "p99": 0.0}
    assert load.percentiles([3.0])["p99"] == 3.0

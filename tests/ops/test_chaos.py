"""Faults under load, in their short form, and the judges of the long form: `make chaos`."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deployments.config import markdown_table, parse_app_config
from deployments.metrics import METRICS
from ops.chaos import FAULTS
from ops.chaos.command import NO_RECOVERY, wrong_options
from ops.chaos.faults import INJECTORS, Fault
from ops.chaos.namespaces import Link, NamespaceError, Network, check_possible
from ops.chaos.nodes import PATIENCE, Nodes
from ops.chaos.report import FaultRecord, Report
from ops.chaos.run import Plan, run
from ops.chaos.service import Setting, service_config
from ops.chaos.table import recorded, table
from ops.chaos.traffic import Case, Outcome, Traffic, longest_pauses, make_cases, undisturbed
from ops.chaos.verdict import calm_gap, is_excused, measure
from ops.chaos.witness import Logs, Stay, parse_line

pytestmark = pytest.mark.timeout(400)

SHORT = {"streams": 16, "requests": 60, "cases": 16, "tokens": (64, 160), "calm_s": 1.0}


@pytest.mark.faults
def test_streams_survive_a_stage_and_an_engine() -> None:
    """The deployed service; kill -9 under 16 streams, half of them sampled: every token as without faults."""
    report = run(Setting(workers=2, gateways=1), Plan(kinds=["stage", "engine"], faults=2, seed=1, **SHORT))  # type: ignore[arg-type]
    assert report.bad == 0, report.details
    assert report.left == {}
    assert report.requests >= 60
    assert [fault.kind for fault in report.faults] == ["stage", "engine"]
    assert all(fault.detect_s is not None and fault.recover_s is not None for fault in report.faults)
    assert any(fault.streams_hit for fault in report.faults), "no stream was open where the faults hit"
    assert report.passed
    assert json.loads(report.as_json())["passed"] is True


@pytest.mark.faults
def test_a_stopped_gateway_costs_no_engine() -> None:
    """Long enough for Serve to replace an engine that does not answer it: three health checks of 10 s."""
    plan = Plan(kinds=["gateway-stop"], faults=1, hold_s=45.0, seed=1, **SHORT)  # type: ignore[arg-type]
    report = run(Setting(workers=2, gateways=2), plan)
    assert [(fault.kind, fault.replaced) for fault in report.faults] == [("gateway-stop", 0)]
    assert report.faults[0].streams_hit, "no stream was open where the fault hit"
    assert report.passed, (report.details, report.left)


@pytest.mark.slow
def test_without_recovery_the_same_run_fails() -> None:
    plan = Plan(kinds=["engine"], faults=1, seed=1, **SHORT)  # type: ignore[arg-type]
    report = run(Setting(workers=2, gateways=1, args=NO_RECOVERY), plan)
    assert report.failed > 0
    assert not report.passed


@pytest.mark.slow
def test_streams_survive_a_partition_between_two_stages() -> None:
    try:
        check_possible()
    except NamespaceError as error:
        pytest.skip(str(error))
    setting = Setting(workers=5, gateways=1, spread=True, namespaces=True)
    report = run(setting, Plan(kinds=["partition"], faults=1, hold_s=10.0, **SHORT))  # type: ignore[arg-type]
    assert report.passed, (report.details, report.left)
    assert report.faults[0].detect_s is not None


# -- the judges: what they must not let pass ---------------------------------------------------------------------------

CASE = Case({"model": "test", "prompt": [300], "max_tokens": 4, "ignore_eos": True}, " w1 w2 w3 w4")


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `scripts`: a list of SSE payloads, or an HTTP status."""

    def __init__(self, scripts: list[list[str] | int]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts = scripts
        self.ids: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.ids.append(self.headers["X-Request-Id"])
        script = self.server.scripts.pop(0)
        self.send_response(script if isinstance(script, int) else 200)
        self.end_headers()
        for payload in script if isinstance(script, list) else []:
            self.wfile.write(f"data: {payload}\n\n".encode())

    def log_message(self, *_: Any) -> None:
        pass


def answer(*words: str, tokens: int = 4) -> list[str]:
    chunks = [json.dumps({"choices": [{"text": word}]}) for word in words]
    return [*chunks, json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}), "[DONE]"]


def ask(*scripts: list[str] | int) -> Outcome:
    server = Server(list(scripts))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        traffic = Traffic([f"http://127.0.0.1:{server.server_port}"], [CASE], 1)
        (outcome,) = asyncio.run(traffic.run_each_once())
        assert outcome.request_id == server.ids[-1]
        return outcome
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("script", "ending"),
    [
        (answer(" w1", " w2", " w3", " w4"), "right"),
        (answer(" w1", " w2", " w3", " w5"), "wrong"),  # another token
        (answer(" w1", " w2", " w3", " w3", " w4"), "wrong"),  # one twice
        (answer(" w1", " w2", " w4"), "wrong"),  # one lost
        (answer(" w1", " w2", " w3", " w4", tokens=3), "wrong"),
        (answer(" w1", " w2")[:-1], "truncated"),
        ([*answer(" w1")[:1], json.dumps({"error": {"message": "the engine went away"}})], "failed"),
    ],
)
def test_every_way_to_be_wrong_is_seen(script: list[str], ending: str) -> None:
    assert ask(script).ending == ending


def test_a_refusal_is_tried_again_and_counted() -> None:
    outcome = ask(503, 500, answer(" w1", " w2", " w3", " w4"))
    assert (outcome.ending, outcome.refusals) == ("right", 2)


def test_a_service_that_fails_without_faults_cannot_be_tormented() -> None:
    server = Server([answer(" w1")[:1]])
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(ValueError, match="failed without any fault"):
        asyncio.run(undisturbed([f"http://127.0.0.1:{server.server_port}"], [CASE], 1))
    server.shutdown()
    server.server_close()


def test_pauses_are_those_that_overlap_the_fault() -> None:
    def outcome(*arrivals: float) -> Outcome:
        return Outcome("", "", 0, 0, "right", "", list(arrivals), 0)

    calm, hit, earlier = outcome(9, 10, 11, 12), outcome(9, 10.2, 13), outcome(1, 8, 9)
    assert longest_pauses([calm, hit, earlier], 10.5, 12) == pytest.approx([2.8, 1])


def test_a_report_passes_only_if_all_is_well() -> None:
    fine = FaultRecord("stage", "pid 1", 0.0, 0.1, "died", 2.0)
    assert Report({}, 0, faults=[fine]).passed
    assert not Report({}, 0, faults=[FaultRecord("stage", "pid 1", 0.0, 0.1, "died", None)]).passed
    for name in ("failed", "truncated", "wrong", "hung"):
        assert not Report({}, 0, **{name: 1}).passed
    assert not Report({}, 0, leftovers={"kv blocks in use": 1.0}).passed
    assert not Report({}, 0, leftovers={"placement groups too many": "unknown"}).passed


def test_a_stream_is_excused_by_what_carried_it_alone() -> None:
    faults = [
        Fault("gateway", "pid 1", 100.0, cuts_clients="gateway"),
        Fault("proxy", "pid 2", 106.0, cuts_clients="http://a"),
        Fault("stage", "pid 3", 130.0),
    ]

    def excused(ended: float, url: str, seen: set[str]) -> bool:
        return is_excused(Outcome("id", url, 0, ended, "truncated", "", [], 0), faults, seen)

    assert excused(101, "http://b", set())  # no gateway that lives has heard of its end
    assert not excused(101, "http://b", {"id"})
    assert excused(107, "http://a", {"id"})  # the proxy's, though a gateway was killed shortly before
    assert not excused(107, "http://b", {"id"})
    assert not excused(131, "http://a", set())
    assert not excused(99, "http://a", set())


def test_cases_are_a_function_of_their_seed_and_mixed() -> None:
    cases = make_cases(8, "test", 2048, (4, 9), seed=3)
    assert cases == make_cases(8, "test", 2048, (4, 9), seed=3) != make_cases(8, "test", 2048, (4, 9), seed=4)
    assert [case.body["temperature"] > 0 for case in cases] == [True, False] * 4
    assert sum("repetition_penalty" in case.body for case in cases) == 4


def test_log_lines_are_told_from_others() -> None:
    line = parse_line(
        b'{"time": "2026-11-24T09:00:00.250Z", "level": "ERROR", "logger": "cluster.engine", "message": "m"}', 7
    )
    assert line is not None
    assert (line.time % 60, line.level, line.pid) == (0.25, "ERROR", 7)
    assert parse_line(b"Traceback (most recent call last):", 7) is None
    assert parse_line(b'{"time": "now"}', 7) is None


def test_silences_are_those_of_the_streams_that_were_hit_or_of_all_others() -> None:
    def outcome(name: str, *arrivals: float) -> Outcome:
        return Outcome(name, "", 0, 0, "right", "", list(arrivals), 0)

    outcomes = [
        outcome("on a", 98, 99, 103, 104),
        outcome("on b", 98, 99, 99.5, 100.5, 101, 102, 103),
        outcome("from b to a", 98, 99, 99.2),  # it was on b when that was hit no more
        outcome("later", 104, 110, 110.5),
        outcome("over", 90, 102.5),
    ]
    stays = {
        "on a": [Stay("a", 101, True), Stay("b", 104, False)],
        "on b": [Stay("b", 103, False)],
        "from b to a": [Stay("b", 99, True), Stay("a", 99.2, False)],
        "later": [Stay("a", 111, False)],
        "over": [Stay("b", 99.9, False)],
    }
    record = FaultRecord("stage", "pid 1", 0.0, 0.1, "died", 3.0)
    measure(record, Fault("stage", "pid 1", 100.0, pipelines=frozenset({"a"})), (100.0, 103.0), outcomes, stays)
    assert (record.streams_hit, record.longest_pause_s, record.others_longest_gap_s) == (1, 4, 1)
    measure(record, Fault("controller", "pid 1", 100.0), (102.0, 103.0), outcomes[:-1], stays)
    assert (record.streams_hit, record.longest_pause_s, record.others_longest_gap_s) == (0, None, 4)
    through = {"on a": [Stay("a", 104, False, 7)], "on b": [Stay("b", 103, False, 8)]}
    measure(record, Fault("gateway-stop", "pid 7", 100.0, gateway=7), (100.0, 103.0), outcomes[:2], through)
    assert (record.streams_hit, record.longest_pause_s, record.others_longest_gap_s) == (1, 4, 1)
    assert calm_gap(outcomes[:-1], [(100.0, 103.0)]) == 6


def test_what_a_fault_may_not_cost_fails_the_run() -> None:
    report = Report({}, 0, faults=[FaultRecord("gateway-stop", "pid 1", 0.0, 0.1, "", 3.0)])
    assert report.passed
    report.faults[0].replaced = 1
    assert not report.passed


def test_logs_say_where_stages_are_and_where_streams_were(tmp_path: Path) -> None:
    """In the words of cluster/ray_pipeline.py, deployments/gateway/resume.py and deployments/gateway/gateway.py."""

    def line(second: int, message: str, **fields: str) -> str:
        entry = {
            "time": f"2026-11-24T09:00:{second:02}.000Z",
            "level": "ERROR",
            "logger": "cluster",
            "message": message,
            **fields,
        }
        return json.dumps(entry) + "\n"

    def placed(stage: int, pid: int, seconds: float) -> str:
        return (
            f"stage {stage} (pid {pid} on 10.0.0.{stage}): layers 0-1, 0.5 M parameters, room for 9 KV blocks; "
            f"started and loaded in {seconds} s"
        )

    logs = tmp_path / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-1-2-77.err").write_text(
        line(1, placed(0, 11, 2.5), replica="a")
        + line(2, placed(1, 12, 3.5), replica="a")
        + line(5, "stage 1 (pid 12 on 10.0.0.2) was killed or lost; 7 sequences are recomputed", replica="a")
        + "half a li"
    )
    (logs / "worker-3-4-88.err").write_text(
        line(5, "a stream lost its engine (gone) after 3 tokens; resuming it", request_id="x", replica="a")
        + line(6, "engine b rebuilds its pipeline; its stream moves on after 5 tokens", request_id="x", replica="b")
        + line(7, "request finished", request_id="x", replica="c")
    )
    found = Logs(cast(Nodes, SimpleNamespace(all=[SimpleNamespace(directory=tmp_path)])))
    found.follow()
    found.follow()
    assert found.stages_of(77) == {0: 11, 1: 12}
    assert found.replica_of(77) == "a"
    assert len(found.lines) == 6
    start = found.lines[0].time
    assert found.finished_requests() == {"x"}
    assert found.stays() == {
        "x": [Stay("a", start + 4, True, 88), Stay("b", start + 5, True, 88), Stay("c", start + 6, False, 88)]
    }
    assert (found.stage_start(start, start + 1), found.stage_start(start + 2, start + 9)) == (3.5, None)
    notice = found.first_notice(start + 3)
    assert notice is not None
    assert notice.time == start + 4


def test_every_fault_that_is_offered_can_be_made() -> None:
    assert set(INJECTORS) == set(FAULTS)
    assert wrong_options(["stage"], "processes", "head") == []
    assert len(wrong_options(["stge", "partition"], "clouds", "left")) == 4
    assert "namespaces" in wrong_options(["partition"], "processes", "head")[0]


def test_the_service_is_configured_as_any_other() -> None:
    setting = Setting(args={"gateway": {"resume_attempts": 0}})
    config = parse_app_config(service_config(setting, "127.0.0.1", 8000)["applications"][0]["args"])
    assert (config.gateway.resume_attempts, config.gateway.replicas, config.pipeline.stages) == (0, 2, 2)


def test_the_parts_of_a_run_are_added_up() -> None:
    def part(failed: int, *pauses: float | None) -> dict[str, Any]:
        faults = [FaultRecord("stage", "pid 1", 0.0, 0.1, "died", 2.0, 9, pause, 0.5, 3.0, 0.7) for pause in pauses]
        report = Report({"hold_s": 15.0, "engines": 2, "streams": 64}, 0, requests=600, failed=failed, faults=faults)
        return cast(dict[str, Any], json.loads(report.as_json()))

    (row,) = table({"chaos-kills": [part(0, 1.0, 3.0), part(1, 1.5, None)]}).splitlines()[2:]
    counts, times = "| stage, kill -9 | 4 | 64, 1,200 | 1, 0, 0", "0.1, 0.1 s | 2.0, 2.0 s | 1.5, 3.0 s | 0.5, 0.5 s"
    assert row == f"{counts} | {times} | 0.7, 0.7 s | `chaos-kills` |"


def test_the_table_is_that_of_the_results() -> None:
    text = (Path(__file__).parents[2] / "ops" / "runbook.md").read_text()
    shown = text.partition("<!-- chaos -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == table(recorded()), "put in what `python -m ops.chaos.table` prints"


def test_the_runbook_names_what_there_is() -> None:
    text = (Path(__file__).parents[2] / "ops" / "runbook.md").read_text()
    known = {metric.name for metric in METRICS}
    known |= {
        f"{metric.name}_{part}" for metric in METRICS if metric.kind == "histogram" for part in ("bucket", "count")
    }
    named = set(re.findall(r"ray_caravan_([a-z_]+)", text))
    assert named
    assert named <= known, named - known
    for name, value in PATIENCE.items():
        if name != "RAY_agent_register_timeout_ms":  # for machines that do much at once
            assert re.search(rf"`{name}` \| {value} \|", text), name
    for key in re.findall(r"`((?:gateway|pipeline|admission)\.[a-z_]+)`", text):
        assert f"| `{key}` |" in markdown_table(), key


# -- namespaces -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        check_possible()
    except NamespaceError as error:
        pytest.skip(str(error))
    with Network(2) as made:
        yield made
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(space.name in names for space in made.spaces)


LISTEN = (
    "import socket; s = socket.create_server(('', 5000)); print('up', flush=True)\nwhile 1: s.accept()[0].send(b'x')"
)
CONNECT = (
    "import socket, sys, time; t = time.monotonic(); s = socket.create_connection((sys.argv[1], 5000), 1.5);"
    "s.settimeout(1.5); s.recv(1); print(time.monotonic() - t)"
)


def test_a_network_can_be_delayed_cut_and_healed(network: Network) -> None:
    one, two = network.spaces
    python = [sys.executable, "-c"]
    with subprocess.Popen([*two.prefix, *python, LISTEN], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()

        def connect(prefix: list[str]) -> float | None:
            done = subprocess.run([*prefix, *python, CONNECT, two.address], capture_output=True, text=True)
            return float(done.stdout) if done.returncode == 0 else None

        try:
            assert connect(one.prefix) is not None
            network.set_link(1, 2, Link(delay_s=0.2))
            slow = connect(one.prefix)
            assert slow is not None
            assert slow >= 0.8  # two round trips
            network.cut(1, 2)
            assert connect(one.prefix) is None
            assert connect([]) is not None, "others still get through"
            network.heal(1, 2)
            assert connect(one.prefix) is not None
        finally:
            listener.kill()


def test_namespaces_go_with_their_owner(network: Network) -> None:
    """Even if it is killed: the switch sees the end of its orders."""
    code = "import ops.chaos.namespaces as o, time; n = o.Network(1, 'cvtest'); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        os.kill(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while "cvtest" in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, "the namespace is still there"
        time.sleep(0.1)

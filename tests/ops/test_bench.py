"""Benchmarks: their arithmetic against figures worked out by hand, their commands against a server that only counts."""

import io
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cluster.engine import StepReport
from deployments.check import check_file
from deployments.config import parse_app_config
from deployments.metrics import EXPORTED_PREFIX
from model.batch import StageTiming
from model.config import split_layers
from model.families import SHAPES
from model.roofline import Rates, StageWork, measure
from ops.bench.engine.offline import Floor, steady_window
from ops.bench.engine.run import Run, stage_shares
from ops.bench.plot import PlotError, check_matplotlib, scaling
from ops.bench.scaling import rows as bench_scaling
from ops.bench.scaling.plan import PLANS, is_row, serve_config, too_few
from ops.bench.service import watched
from ops.bench.service.deployed import all_served
from ops.bench.service.load import Summary
from ops.bench.service.sweep import Load
from ops.bench.service.watched import middle_half, moved, watching
from ops.cli import app
from ops.local import LocalError
from ops.watch.top import Sample

H200 = Rates(4.27e12, 610e12, 1220e12)
CPU = torch.device("cpu")


def floor(stages: int = 2, **model: Any) -> Floor:
    args = {
        "model": {"path": "shape:llama-2-70b", "name": "x", "load_format": "dummy", **model},
        "pipeline": {"stages": stages},
    }
    return Floor(parse_app_config(args), SHAPES["llama-2-70b"], [H200] * stages)


def test_the_floor_of_a_70b_stage_is_what_was_measured_for_its_linear_layers() -> None:
    """40 layers on one H200: 16.0 ms to read the weights; 910 ms for 8,192 tokens, all multiplications."""
    first, last = floor().step_s(1, 1)
    assert first == pytest.approx(16.0e-3, rel=0.01)
    assert last == pytest.approx(first + 2 * 32_000 * 8192 / 4.27e12, rel=0.01)  # the head
    assert floor().step_s(8192, 0)[0] == pytest.approx(910e-3, rel=0.02)


def test_in_8_bits_half_is_read() -> None:
    scales = 1e-3  # one for each row, of 8,192 or more weights; and norms, which stay in 16 bits
    assert floor(quantization="fp8").step_s(1, 1)[0] == pytest.approx(floor().step_s(1, 1)[0] / 2, rel=scales)
    assert floor(quantization="fp8").step_s(8192, 0)[0] == pytest.approx(floor().step_s(8192, 0)[0] / 2, rel=scales)
    without_wqkv = floor(quantization="fp8", quantization_ignore=["wqkv"]).step_s(1, 1)[0]
    assert without_wqkv == pytest.approx(floor().step_s(1, 1)[0] * (0.5 + 0.049), rel=2 * scales)  # a tenth of a layer


def test_keys_and_values_count_by_context() -> None:
    """128 sequences of 450 tokens: 160 KiB of each token lie on a stage of 40 layers."""
    more = floor().step_s(128, 128, 128 * 450)[0] - floor().step_s(128, 128)[0]
    assert more == pytest.approx(128 * 450 * 160 * 1024 / 4.27e12, rel=1e-6)


def test_the_limit_of_the_list_is_the_arithmetic_one() -> None:
    """698,203 tokens through 70B on two GPUs at 610 TFLOP/s: 78 s, which is 4,380 output tokens a second."""
    limit = floor().limit({"prompt_tokens": 698_203 - 343_617, "output_tokens": 343_617})
    assert limit == pytest.approx(4_380, rel=0.03)


def test_work_of_stages_adds_up() -> None:
    model = SHAPES["llama-2-7b"]
    works = [StageWork.of(model, part, torch.bfloat16) for part in split_layers(model, 4)]
    read = model.num_parameters - model.embedding_parameters - model.dim - 32 * 2 * model.dim  # no lookup, no norms
    assert sum(w.weight_bytes for w in works) == pytest.approx(2 * read, rel=1e-3)


def test_rates_of_this_machine_are_plausible() -> None:
    rates = measure(torch.float32, CPU, fp8=False)
    assert 1e8 < rates.bytes_per_s < 1e13
    assert 1e9 < rates.flops < 1e16


def timing(stage: int, step: int, started: float, seconds: float, wait: float) -> StageTiming:
    return StageTiming(0, step, stage, started, started + seconds, wait, 0.0)


def test_a_bubble_is_what_is_not_busy_between_the_first_step_and_the_last() -> None:
    timings = [timing(0, i, i, 0.75, 100.0 if i == 0 else 0.25) for i in range(100)]
    (share,) = stage_shares(timings, 1)
    assert share["busy"] == pytest.approx(0.75, abs=0.005), "the wait for the run to begin does not count"
    assert share["bubble"] == pytest.approx(0.25, abs=0.005)


def test_a_steady_window_counts_its_own_steps_only() -> None:
    run = Run(first_step=1000)
    for i in range(300):
        slow = i < 100
        run.on_step(StepReport(128, 128, 0.001, []))
        run.ended[-1] = 0.5 * min(i, 100) + 0.025 * max(0, i - 100)
        for stage in (0, 1):
            run.on_timing(timing(stage, 1000 + i, float(i), 0.02, 0.48 if slow else 0.005))
    found = steady_window(run, floor(), 101, 300, 2, 450)
    assert found["ms_per_step"] == pytest.approx(25)
    assert found["output_throughput"] == pytest.approx(128 / 0.025)
    assert (found["num_seqs"], found["all_decode"], found["steps"]) == (256, True, 199)
    assert [s["bubble"] for s in found["stages"]] == pytest.approx([0.2, 0.2], abs=0.002)
    assert found["floor_ms_per_step"] == pytest.approx(16.2 + 2.2, rel=0.02)
    assert found["scheduler_ms"]["p99"] == pytest.approx(1.0)
    assert found["step_ms"]["longest"] == pytest.approx(25)


def test_layers_are_weighed_by_the_time_that_steps_took() -> None:
    """70B on two devices, one of which is slower than its weights say; the head weighs as much as 0.3 layers."""
    assert floor().layers == [40, 40]
    assert floor().measured_split([16.0, 16.13]) == [40, 40]
    assert floor().measured_split([20.0, 16.13]) == [36, 44]  # a layer takes 0.5 here, 0.4 there: 18.0 and 17.7
    assert floor().measured_split([16.0, 20.16]) == [45, 35]  # 18.0 and 17.7, the head's 0.15 included
    assert floor(stages=1).measured_split([30.0]) == [80]


def test_a_late_step_is_told_from_steps_that_are_all_slow() -> None:
    run = Run(first_step=0)
    for i in range(101):
        run.on_step(StepReport(128, 128, 0.001, []))
        run.ended[-1] = 0.01 * i + (0.25 if i >= 50 else 0.0)
        run.on_timing(timing(0, i, 0.01 * i, 0.01, 0.0))
    found = steady_window(run, floor(stages=1), 1, 101, 1, 450)
    assert found["ms_per_step"] == pytest.approx(12.5)
    assert found["step_ms"]["p50"] == pytest.approx(10)
    assert found["step_ms"]["longest"] == pytest.approx(260)


# -- commands ---------------------------------------------------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Serves a model called tiny, as many tokens as are asked for."""

    most_at_once = open_now = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.answer(json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            type(self).open_now += 1
            type(self).most_at_once = max(self.most_at_once, self.open_now)
        chunks: list[dict[str, Any]] = [{"choices": [{"text": "x"}]}] * body["max_tokens"]
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": len(body["prompt"])}
        lines = [json.dumps(c) for c in [*chunks, {"choices": [], "usage": usage}]]
        with self.lock:
            type(self).open_now -= 1
        self.answer("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode())

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def caravan(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_a_sweep_gives_a_table_a_line_a_file_and_a_plot(url: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output, plot = tmp_path / "sweep.json", tmp_path / "sweep.png"
    done = caravan(
        "sweep", "--url", url, "--concurrency", "1,3", "--rates", "200", "--requests", "6", "--max-tokens", "12",
        "--output", str(output), "--plot", str(plot),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["points"] == json.loads(output.read_text())["points"]
    assert [(p["concurrency"], p["rate"]) for p in line["points"]] == [(1, 0.0), (3, 0.0), (0, 200.0)]
    for point in line["points"]:
        assert (point["requests"], point["failed"]) == (6, 0)
        assert point["output_throughput"] == pytest.approx(point["output_tokens"] / point["seconds"])
        assert point["ttft_s"]["p50"] <= point["end_to_end_latency_s"]["p50"]
    assert all(word in done.stdout for word in ("TTFT", "TPOT", "200/s"))
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep"], "--concurrency or --rates"),
        (["sweep", "--concurrency", "1,zwei"], "--concurrency 1,zwei"),
        (["sweep", "--offline", "ray_config.yaml", "--rates", "1"], "--batch-sizes"),
        (["offline", "ray_config.yaml", "--steady", "256"], "256x450"),
        (["offline", "nothing.yaml"], "nothing.yaml"),
        (["scaling", "x.json", "--rows", "fp9x1"], "fp9x1"),
        (["scaling", "x.json", "--device", "abacus"], "abacus"),
        (["perplexity", "ray_config.yaml", "--quantizations", "int3"], "int3"),
        (["perplexity", "ray_config.yaml", "--quantization-ignore", "w2,w4"], "'w4' names nothing"),
        (["perplexity", "ray_config.yaml", "--skip", "900000"], "fewer than --skip 900,000"),
        (["serve", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_what_is_asked_wrongly_is_one_clear_sentence(arguments: list[str], says: str) -> None:
    done = caravan(*arguments)
    assert done.exit_code == 1
    assert says in done.output
    assert "Traceback" not in done.output


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install '\.\[bench\]'"):
        check_matplotlib()
    done = caravan("sweep", "--concurrency", "1", "--plot", "x.png")
    assert done.exit_code == 1
    assert "pip install" in done.output


def test_a_scaling_plot_has_its_ideal_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scaling({"fp8": {1: 10.0, 2: 19.0, 4: 36.0}, "bf16": {2: 9.0}}, "scaling", "tok/s", tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000


# -- scaling ----------------------------------------------------------------------------------------------------------


def offline_result(throughput: float, stages: int) -> dict[str, Any]:
    row: dict[str, Any] = {"stages": stages, "precision": "fp8", "kv_tokens": 1000, "start_s": 2.0}
    row["list"] = {"requests": 600 * stages, "output_throughput": throughput, "total_token_throughput": 2 * throughput}
    row["batches"] = [{"ms_per_token": 20.0}, {"ms_per_token": 22.0}]
    row["steady"] = {"stages": [{"bubble": 0.012}] * stages}
    return row


def test_a_scaling_run_skips_what_is_too_large_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[int] = []

    def row(plan: Any, precision: str, stages: int, timeout_s: float) -> dict[str, Any]:
        measured.append(stages)
        return offline_result(1000.0 * stages**0.9, stages)

    monkeypatch.setattr(bench_scaling, "offline_row", row)
    file, plan = tmp_path / "scaling.json", PLANS["cuda"]
    result = bench_scaling.bench_scaling(plan, 2, ["fp8x1", "fp8x2", "fp8x4"], file, 1.0)
    assert measured == [1, 2]
    assert result["rows"]["fp8x4"]["skipped"] == "needs 4 GPUs, this machine has 2"
    assert json.loads(file.read_text())["speedup"] == {"fp8": {"1": 1.0, "2": 1.87}}
    alone = bench_scaling.bench_scaling(plan, 1, ["http-2x1"], tmp_path / "one.json", 1.0)
    assert alone["rows"]["http-2x1"]["skipped"] == "needs 2 GPUs, this machine has 1"
    shared = PLANS["one-gpu"]
    assert [too_few(shared, 8, gpus) is None for gpus in (1, 0)] == [True, False]
    again = bench_scaling.bench_scaling(plan, 4, ["fp8x2", "fp8x4"], file, 1.0)  # on a larger machine
    assert measured == [1, 2, 4], "what was measured stays, what was skipped is tried again"
    assert again["speedup"]["fp8"][4] == pytest.approx(4**0.9, abs=0.01)
    with pytest.raises(ValueError, match="measured by another plan"):
        bench_scaling.bench_scaling(shared, 1, [], file, 1.0)
    console = Console(record=True, width=180, file=io.StringIO())
    console.print(bench_scaling.scaling_table(again))
    lines = console.export_text().splitlines()
    (two,) = (line for line in lines if "fp8, 2 stages" in line)
    assert two.split("|")[2].strip() == "1,200"
    assert two.split("|")[5].strip() == "1.87"
    assert two.split("|")[8].strip() == "1.2 %"


@pytest.mark.parametrize("name", PLANS)
def test_every_row_of_a_plan_has_a_valid_configuration(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    for precision, stages in plan.rows:
        file = tmp_path / f"{precision}{stages}.yaml"
        file.write_text(yaml.safe_dump(serve_config(plan, precision, stages, pipelines=2)))
        assert check_file(file) == []
    assert {stages for _, stages in plan.rows} == {1, 2, 4, 8}


def test_one_pipeline_is_set_beside_its_engine() -> None:
    row = {"pipelines": 1, "stages": 2, "streams": 256, "requests": 1200}
    row |= {"output_throughput": 95.0, "total_token_throughput": 190.0}
    result = {"rows": {"http-1x2": row | {"share_of_engine": 0.95}, "http-1x1": row | {"stages": 1}}}
    watched = [{"stages": [{"busy": 0.97}]}, {"stages": [{"busy": 0.99}]}]
    two = {"pipelines": 2, "stages": 1, "output_throughput": 184.0, "replicas": watched}
    result["rows"]["http-2x1"] = row | two
    console = Console(record=True, width=180, file=io.StringIO())
    console.print(bench_scaling.scaling_table(result))
    text = console.export_text()
    assert "95% of the engine alone" in text
    assert text.count("1.94") == 1, "of the two pipelines, not of the one they are set beside"
    assert "1.0 to 3.0 %" in text


def metrics_of(running: float, busy: float, waiting: float) -> Sample:
    """What one pipeline of one stage has reported."""
    who = ("application", "x"), ("replica", "a")
    gauges = ("kv_blocks_used", "kv_blocks_total", "last_token_age_seconds", "weights_loaded_ratio", "waiting")
    totals = ("preemptions_total", "generated_tokens_total")
    sample: Sample = {(name, who): 1.0 for name in (*gauges, *totals)} | {("running", who): running}
    stage = {"stage_busy_seconds_total": busy, "stage_wait_seconds_total": waiting}
    return sample | {(name, (*who, ("stage", "0"))): value for name, value in stage.items()}


def test_what_a_pipeline_did_in_the_middle_of_a_load() -> None:
    """Of 8 looks the 3rd to the 6th: it waits before and after, and is busy for 3 of 4 s meanwhile."""
    looks = [(9, 0.0, 0.0), (9, 0.0, 5.0), (3, 0.0, 10.0), (4, 1.5, 10.5), (5, 2.25, 10.75), (6, 3.0, 11.0)]
    looks += [(9, 3.0, 20.0), (9, 3.0, 30.0)]
    seen = [(float(at), metrics_of(*look)) for at, look in enumerate(looks)]
    (replica,) = middle_half(seen)
    assert replica["stages"] == [{"busy": 0.75, "waiting": 0.25, "transfer": 0.0}]
    assert (replica["running"], replica["waiting"]) == (4.5, 1.0)
    assert middle_half(seen[:1]) == []


def test_how_long_streams_had_no_engine() -> None:
    def look(moves: float, waits: list[float]) -> Sample:
        buckets = {(("le", str(edge)),): float(sum(w <= edge for w in waits)) for edge in (1.0, 5.0, 10.0, math.inf)}
        sample = {("stream_pause_seconds_bucket", labels): count for labels, count in buckets.items()}
        return sample | {("streams_resumed_total", (("cause", "lost"), ("gateway", g))): moves for g in "ab"}

    def between(*samples: Sample) -> dict[str, Any]:
        return moved([(float(at), sample) for at, sample in enumerate(samples)])

    found = between(look(1, [0.5, 0.5]), look(9, []), look(3, [0.5, 0.5, 3, 3, 3, 11]))
    assert found == {"streams_moved": {"lost": 4}, "stream_pause_s": {"p50": 5.0, "p95": None, "p99": None}}
    assert between(look(3, [9]), look(3, [9]))["streams_moved"] == {}
    assert between(look(3, [9])) == {}


class ReadMetrics(BaseHTTPRequestHandler):
    """Answers every second read only."""

    reads = 0

    def do_GET(self) -> None:
        type(self).reads += 1
        self.send_response(500 if self.reads % 2 else 200)
        self.end_headers()
        self.wfile.write(f"{EXPORTED_PREFIX}running {self.reads}\n".encode())

    def log_message(self, *args: Any) -> None:
        pass


def test_a_look_at_metrics_that_fails_is_left_out() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ReadMetrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with watching(f"http://127.0.0.1:{server.server_address[1]}/metrics", period_s=0.01) as seen:
            while ReadMetrics.reads < 5:
                time.sleep(0.005)
    finally:
        server.shutdown()
        server.server_close()
    assert [sample for _, sample in seen[:2]] == [{("running", ()): 2.0}, {("running", ()): 4.0}]


def test_a_load_that_is_soon_over_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "scrape", lambda urls: {("running", ()): 1.0})
    with watching("") as seen:
        pass
    assert len(seen) == 2


def test_rows_of_pipelines_may_say_how_many_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def row(plan: Any, stages: int, pipelines: int, timeout_s: float) -> dict[str, Any]:
        seen.append((pipelines, stages))
        return {"stages": stages, "pipelines": pipelines, "output_throughput": 1.0}

    monkeypatch.setattr(bench_scaling, "http_row", row)
    rows, plan = ["http-1x1", "http-1x2", "http-2x1", "http-2x2"], PLANS["cuda"]
    result = bench_scaling.bench_scaling(plan, 2, rows, tmp_path / "s.json", 1.0)
    assert seen == [(1, 1), (1, 2), (2, 1)]
    assert all(is_row(plan, name) for name in (*rows, "http-2x4"))
    assert not any(is_row(plan, name) for name in ("http-1", "http-3x2", "http-1x", "fp8x3"))
    assert result["rows"]["http-2x2"]["skipped"] == "needs 4 GPUs, this machine has 2"
    assert result["two_pipelines"] == {1: 1.0}


def test_a_service_that_refused_has_not_shown_what_it_can_take() -> None:
    times = {"p50": 0.0, "p95": 0.0, "p99": 0.0}
    served = Summary(128, 0, 1.0, 1, 6.8, 1.0, 1.0, times, times, times, times, 0.5)
    assert all_served(served).request_throughput == 6.8
    with pytest.raises(LocalError, match=r"112 of 128 requests failed .*admission.target_ttft_s"):
        all_served(replace(served, failed=112))


@dataclass
class Clients:
    """What they would have seen, in place of a service."""

    throughput: float
    took_s: float

    def measure(self, url: str, requests: list[dict[str, Any]], how: Load, processes: int) -> Summary:
        time.sleep(self.took_s)
        tokens = sum(body["max_tokens"] for body in requests)
        none = {"p50": 0.0, "p95": 0.0, "p99": 0.0}
        return Summary(len(requests), 0, 1.0, tokens, 1.0, self.throughput, 1.0, none, none, none, none, 0.5)


@pytest.mark.parametrize(("throughput", "killed"), [(1e6, 1), (10.0, 0)])
def test_a_stage_is_killed_while_clients_wait(
    throughput: float, killed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a third of what the requests take; where they are done sooner, the row says so instead."""
    kills: list[Any] = []

    @contextmanager
    def serving(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(head=SimpleNamespace(metrics="metrics"), url="", start_s=1.0)

    def scrape(url: str) -> Sample:
        assert url == "metrics"
        return {("streams_resumed_total", (("cause", "rebuilding"),)): 2.0 + 3 * len(kills)}

    monkeypatch.setattr(bench_scaling, "serving", serving)
    monkeypatch.setattr(watched, "scrape", scrape)
    monkeypatch.setattr(bench_scaling, "kill_stage", lambda head: kills.append(head.metrics))
    monkeypatch.setattr(bench_scaling, "measure", Clients(throughput, 0.3).measure)
    result = bench_scaling.bench_scaling(PLANS["cpu"], 0, ["killed-2x1"], tmp_path / "s.json", 1.0)
    Console(file=io.StringIO()).print(bench_scaling.scaling_table(result))
    row = result["rows"]["killed-2x1"]
    assert kills == ["metrics"] * killed
    assert ("all requests were done" in row.get("error", "")) == (not killed)
    if killed:
        assert (row["streams"], row["wanted_tokens"], row["pipelines"]) == (8, row["output_tokens"], 2)
        assert row["streams_moved"] == {"rebuilding": 3}


def test_several_runs_fill_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, plan = tmp_path / "scaling.json", PLANS["cuda"]

    def row(plan: Any, precision: str, stages: int, timeout_s: float) -> dict[str, Any]:
        if stages == 2:  # while it is measured, another run, which began with no file either, is done with its own
            bench_scaling.bench_scaling(plan, 1, ["fp8x1"], file, 1.0)
        return offline_result(1000.0 * stages, stages)

    monkeypatch.setattr(bench_scaling, "offline_row", row)
    result = bench_scaling.bench_scaling(plan, 2, ["fp8x2"], file, 1.0)
    assert result == json.loads(file.read_text(), object_hook=numbered)
    assert sorted(result["rows"]) == ["fp8x1", "fp8x2"]
    assert result["speedup"]["fp8"] == {1: 1.0, 2: 2.0}


def numbered(value: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are text: numbers again."""
    return {int(key) if key.isdigit() else key: item for key, item in value.items()}


def test_two_pipelines_are_compared_with_one_of_as_many_stages() -> None:
    speeds = {"http-1x1": 100.0, "http-2x1": 200.0, "http-1x2": 200.0, "http-2x2": 390.0, "http-2x4": 800.0}
    rows = {name: {"pipelines": int(name[5]), "output_throughput": speed} for name, speed in speeds.items()}
    assert bench_scaling.two_pipelines({"rows": rows}) == {1: 2.0, 2: 1.95}
    assert bench_scaling.two_pipelines({"rows": rows | {"http-2x2": {"error": "x"}}}) == {1: 2.0}


def test_kernels_need_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    result = caravan("kernels")
    assert result.exit_code == 1
    assert "needs a CUDA device" in result.output

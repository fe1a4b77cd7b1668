"""`caravan bench scaling`: one pipeline on more and more stages, then two pipelines behind one endpoint.

A table of rows, each measured in processes of its own and written to the result file as soon as it is done: a run that
is cut short goes on where it stopped, a row that fails says why, and several runs may fill one file, each with GPUs of
its own. What the machine has too few GPUs for is skipped, and the file says so. The work grows with the stages, so that
each has the same to do.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Column, Table

from model.families import SHAPES
from ops import interrupt
from ops.bench import plot, workload
from ops.bench.scaling.plan import Plan, serve_config, too_few
from ops.bench.service.deployed import Deployed, serving
from ops.bench.service.sweep import Load, bodies, measure
from ops.bench.service.watched import middle_half, moved, watching
from ops.local import Head, LocalError, session_processes

Json = dict[str, Any]
BATCH_SIZES = "1,64"


# -- one pipeline, the engine alone -----------------------------------------------------------------------------------


def offline_row(plan: Plan, precision: str, stages: int, timeout_s: float) -> Json:
    """The list at once, single batches, steady decode."""
    steady = f"{plan.seqs_per_stage * stages}x{plan.context}"
    result = measure_offline(plan, precision, stages, ["--batch-sizes", BATCH_SIZES, "--steady", steady], timeout_s)
    return result if "error" in result else {"stages": stages, "precision": precision, **result}


def measure_offline(plan: Plan, precision: str, stages: int, options: list[str], timeout_s: float) -> Json:
    """`caravan bench offline` in processes of its own; what it measured, or why not."""
    with tempfile.TemporaryDirectory() as directory:
        config, output = Path(directory) / "config.yaml", Path(directory) / "result.json"
        config.write_text(yaml.safe_dump(serve_config(plan, precision, stages)))
        command = [
            sys.executable, "-m", "ops.cli", "bench", "offline", str(config),
            "--requests", str(plan.requests_per_stage * stages), "--max-tokens", str(plan.longest), *options,
            "--output", str(output),
        ]  # fmt: skip
        try:
            done = interrupt.run(command, timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"was not done within {timeout_s:g} s"}
        if done.returncode:
            words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"error": words[-1]}
        result: Json = json.loads(output.read_text())
    del result["command"]
    for part in ("list", "steady"):
        result.get(part, {}).pop("trace", None)
    return result


# -- pipelines behind one endpoint ------------------------------------------------------------------------------------


def http_row(plan: Plan, stages: int, pipelines: int, timeout_s: float) -> Json:
    """`pipelines` of `stages` each, deployed, under so many streams; one is set beside its engine alone."""
    streams = plan.streams_per_pipeline * pipelines
    alone: Json = {}
    if pipelines == 1:
        alone = measure_offline(plan, plan.precision, stages, ["--concurrency", str(streams)], timeout_s)
        if "error" in alone:
            return alone

    def load(service: Deployed, todo: list[Json]) -> Json:
        with watching(service.head.metrics) as seen:
            result = under_load(plan, service, todo, streams, pipelines)
        return {**result, "replicas": middle_half(seen)}

    row = deployed_row(plan, stages, pipelines, load)
    if alone and "error" not in row:
        row["engine_output_throughput"] = alone["list"]["output_throughput"]
        row["share_of_engine"] = round(row["output_throughput"] / row["engine_output_throughput"], 3)
    return row


def killed_row(plan: Plan, stages: int, pipelines: int) -> Json:
    """The same under the streams of one, of which a stage is killed: what clients see."""

    def load(service: Deployed, todo: list[Json]) -> Json:
        streams = plan.streams_per_pipeline
        first = under_load(plan, service, todo[: 2 * streams], streams, pipelines)
        if first["failed"]:
            return {"error": f"{first['failed']} requests failed before a stage was killed"}
        killed: list[int] = []
        wanted = sum(int(body["max_tokens"]) for body in todo)
        third_s = wanted / first["output_throughput"] / 3
        killer = threading.Timer(third_s, lambda: killed.append(kill_stage(service.head)))
        killer.start()
        with watching(service.head.metrics) as seen:
            result = under_load(plan, service, todo, streams, pipelines)
        killer.cancel()
        killer.join()
        if not killed:
            return {"error": f"no stage was killed after {third_s:.1f} s, and now all requests were done"}
        return {"wanted_tokens": wanted, **result, **moved(seen)}

    return deployed_row(plan, stages, pipelines, load)


def deployed_row(plan: Plan, stages: int, pipelines: int, load: Callable[[Deployed, list[Json]], Json]) -> Json:
    """What `load` finds in a service with these pipelines, once they are warm; it gets all requests."""
    vocab_size = min(workload.VOCAB_SIZE, SHAPES[plan.shape].vocab_size)
    todo = bodies(plan.shape, plan.requests_per_stage * stages * pipelines, vocab_size, plan.longest)
    cpus = max(os.cpu_count() or 1, 2 if plan.device == "cpu" else 2 * pipelines * (stages + 3))
    config = serve_config(plan, plan.precision, stages, pipelines)
    about = {"stages": stages, "pipelines": pipelines, "precision": plan.precision}
    try:
        with serving(config, plan.haproxy, cpus, pipelines) as service:
            warm = todo[: plan.streams_per_pipeline * pipelines]
            under_load(plan, service, warm, len(warm), pipelines)
            result = load(service, todo)
    except LocalError as error:
        return {"error": str(error)}
    return result if "error" in result else {**about, "start_s": service.start_s, **result}


def under_load(plan: Plan, service: Deployed, requests: list[Json], streams: int, pipelines: int) -> Json:
    """What clients see who keep so many streams open until all requests are done."""
    processes = min(os.cpu_count() or 1, 4 * pipelines) if plan.device == "cuda" else 1
    summary = measure(service.url, requests, Load(streams), processes)
    return {"streams": streams, "processes": processes, **asdict(summary)}


def kill_stage(head: Head) -> int:
    """End one of the stage processes of `head` without warning; returns its pid. Raises `LocalError` without any."""
    for pid in session_processes(head):
        # Ray names its workers after what they run.
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::StageActor"):
            os.kill(pid, signal.SIGKILL)
            return pid
    raise LocalError("no stage process was found to be killed")


# -- the whole table --------------------------------------------------------------------------------------------------


def bench_scaling(plan: Plan, gpus: int, rows: Sequence[str], file: Path, timeout_s: float) -> Json:
    """Measure those of `rows` that `file` does not hold yet; each is written as soon as it is done.

    Raises `ValueError` for a file whose rows were measured by another plan: they cannot be compared.
    """
    result = _rows_of(file, plan)
    for name in rows:
        if _is_measured(result["rows"].get(name)):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        load = round(os.getloadavg()[0], 1)
        about = {"date": date.today().isoformat(), "gpus": gpus, "cores": os.cpu_count(), "load_average_before": load}
        result = _write(file, plan, name, {**about, **_row(plan, name, gpus, timeout_s)})
    return result


def _rows_of(file: Path, plan: Plan) -> Json:
    """What `file` holds, of this plan; nothing yet if there is none."""
    its_plan = json.loads(json.dumps(asdict(plan)))
    result: Json = json.loads(file.read_text()) if file.exists() else {"plan": its_plan, "rows": {}}
    if result["plan"] != its_plan:
        raise ValueError(f"{file}: its rows were measured by another plan: name another file, or move this one away")
    return result


def _write(file: Path, plan: Plan, name: str, row: Json) -> Json:
    """Add `row` to what `file` holds by now: another run may have added its own meanwhile."""
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        result = _rows_of(file, plan)
        result["rows"][name] = row
        result |= {"speedup": speedup(result), "two_pipelines": two_pipelines(result)}
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(file)  # at once: whoever reads it, or is ended meanwhile, has the old rows or all
    finally:
        os.close(directory)
    return result


def _is_measured(row: Json | None) -> bool:
    """A row that failed or was skipped is tried again: the machine may be another one."""
    return row is not None and not {"error", "skipped"} & set(row)


def _row(plan: Plan, name: str, gpus: int, timeout_s: float) -> Json:
    what, _, count = name.rpartition("x")
    kind, _, number = what.partition("-")
    stages, pipelines = int(count), int(number or 1)
    if (skipped := too_few(plan, stages * pipelines, gpus)) is not None:
        return skipped
    if kind == "killed":
        return killed_row(plan, stages, pipelines)
    if kind == "http":
        return http_row(plan, stages, pipelines, timeout_s)
    return offline_row(plan, kind, stages, timeout_s)


def speedup(result: Json) -> dict[str, dict[int, float]]:
    """Of each precision: output throughput on n stages over that on the fewest, by n."""
    found: dict[str, dict[int, float]] = {}
    for precision, values in throughputs(result).items():
        first = values[min(values)]
        found[precision] = {n: round(value / first, 2) for n, value in sorted(values.items())}
    return found


def throughputs(result: Json) -> dict[str, dict[int, float]]:
    """Output tok/s of the list by precision and number of stages, of the rows that were measured."""
    found: dict[str, dict[int, float]] = {}
    for row in result["rows"].values():
        if "list" in row:
            found.setdefault(row["precision"], {})[row["stages"]] = row["list"]["output_throughput"]
    return found


def two_pipelines(result: Json) -> dict[int, float]:
    """HTTP throughput of two pipelines over that of one, by their stages, where both rows were measured."""
    done = {name: row["output_throughput"] for name, row in result["rows"].items() if "pipelines" in row}
    stages = sorted(int(name.removeprefix("http-2x")) for name in done if name.startswith("http-2x"))
    return {n: round(done[f"http-2x{n}"] / done[f"http-1x{n}"], 2) for n in stages if f"http-1x{n}" in done}


def scaling_table(result: Json) -> Table:
    """For people, and for a README: a table in Markdown."""
    table = Table(
        Column(no_wrap=True), "requests", "output tok/s", "total", "speed-up", "batch 1, ms", "batch 64",
        "bubble of a stage", "KV tokens", "ready, s", box=box.MARKDOWN,
    )  # fmt: skip
    for name, row in result["rows"].items():
        if not _is_measured(row):
            table.add_row(name, "", " ".join(f"{k}: {v}" for k, v in row.items() if k in ("skipped", "error")))
        elif "pipelines" in row:
            _add_http(table, row, two_pipelines(result).get(row["stages"]) if row["pipelines"] == 2 else None)
        else:
            _add_offline(table, row, speedup(result)[row["precision"]][row["stages"]])
    return table


def _add_offline(table: Table, row: Json, times: float) -> None:
    done, (one, many) = row["list"], row["batches"]
    table.add_row(
        f"{row['precision']}, {row['stages']} stage{'s' if row['stages'] > 1 else ''}",
        f"{done['requests']:,}",
        f"{done['output_throughput']:,.0f}",
        f"{done['total_token_throughput']:,.0f}",
        f"{times:.2f}",
        f"{one['ms_per_token']:.2f}",
        f"{many['ms_per_token']:.2f}",
        _range([stage["bubble"] for stage in row["steady"]["stages"]]),
        f"{row['kv_tokens']:,}",
        f"{row['start_s']:.0f}",
    )


def _add_http(table: Table, row: Json, ratio: float | None) -> None:
    what = f"HTTP, {row['pipelines']} x {row['stages']}, {row['streams']} streams"
    speeds = f"{row['requests']:,}", f"{row['output_throughput']:,.0f}", f"{row['total_token_throughput']:,.0f}"
    if "wanted_tokens" in row:
        seen = f"{row['failed']} failed, {row['output_tokens']:,} of {row['wanted_tokens']:,} tokens"
        table.add_row(f"{what}, a stage killed", *speeds, seen, f"longest gap {row['longest_gap_s']:.1f} s")
        return
    compared = f"{row['share_of_engine']:.0%} of the engine alone" if "share_of_engine" in row else ""
    bubbles = _range([1 - stage["busy"] for replica in row.get("replicas", []) for stage in replica["stages"]])
    table.add_row(what, *speeds, f"{ratio:.2f}" if ratio else compared, "", "", bubbles)


def _range(shares: list[float]) -> str:
    """From the least to the largest; empty if there are none."""
    ends = list(dict.fromkeys(f"{100 * share:.1f}" for share in (min(shares), max(shares)))) if shares else []
    return " to ".join(ends) + " %" if ends else ""


def draw(result: Json, path: Path) -> None:
    """Throughput by stages, with the ideal line."""
    plot.scaling(throughputs(result), f"{result['plan']['shape']}, one pipeline", "the fixed list at once", path)

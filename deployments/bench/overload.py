"""`caravan bench overload`: a service of its own on this machine, with what it can take, then with ten times as much.

What must hold: accepted requests have their first token within twice the target, refused ones know it within 50 ms, and
the gateway's memory stays as it was.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.table import Table

from deployments.local import Head, LocalError, await_ready, free_port, ray_head, session_processes
from ops import load, overload, workload

PROMPT_TOKENS, NEW_TOKENS = 100, 32
VOCAB = 49_000
Json = dict[str, Any]


def bodies(model: str, count: int, first: int) -> list[Json]:
    """Requests of one length, with prompts that share nothing."""
    return [
        {
            "model": model,
            "prompt": workload.prompt(first + i, PROMPT_TOKENS, VOCAB),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(count)
    ]


def adapted(config: Path, target_ttft_s: float, directory: Path) -> tuple[Path, str, str]:
    """The configuration on a free port, one pipeline of one stage, with this target; its file, address and model."""
    content = yaml.safe_load(config.read_text("utf-8"))
    port = free_port()
    content["http_options"] = {**(content.get("http_options") or {}), "host": "127.0.0.1", "port": port}
    args = content["applications"][0]["args"]
    # One stage, so that a small machine has a core left for the gateway and for the clients.
    args["pipeline"] |= {"stages": 1, "split": "auto"}
    args["admission"] = {"target_ttft_s": target_ttft_s}
    args["autoscaling"] = {"min_replicas": 1, "max_replicas": 1}
    file = directory / "overload.yaml"
    file.write_text(yaml.safe_dump(content))
    return file, f"http://127.0.0.1:{port}", args["model"]["name"]


@contextmanager
def haproxy(directory: Path, wanted: bool) -> Iterator[None]:
    """Serve's ingress is HAProxy while this lasts, with files and ports of its own."""
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
    if wanted:
        os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def gateway_process(head: Head) -> psutil.Process:
    for pid in session_processes(head):
        process = psutil.Process(pid)
        if "ServeReplica" in (line := " ".join(process.cmdline())) and "Gateway" in line:
            return process
    raise LocalError("no gateway process was found")


def bench_overload(config: Path, target_ttft_s: float, seconds: float, factor: float, use_haproxy: bool) -> Json:
    """Capacity, then `factor` times as much for so many seconds."""
    with tempfile.TemporaryDirectory(prefix="cv") as temporary, haproxy(Path(temporary), use_haproxy):
        file, url, model = adapted(config, target_ttft_s, Path(temporary))
        with ray_head(2) as head:
            deployed = head.serve("deploy", str(file))
            if deployed.returncode:
                raise LocalError(f"serve deploy failed:\n{deployed.stderr.strip()}")
            await_ready(head, url)
            try:
                return {
                    "target_ttft_s": target_ttft_s,
                    "haproxy": use_haproxy,
                    **_measure(head, url, model, seconds, factor),
                }
            finally:
                head.serve("shutdown", "-y")


def _measure(head: Head, url: str, model: str, seconds: float, factor: float) -> Json:
    path = f"{url}/v1/completions"
    asyncio.run(load.run(path, bodies(model, 32, 50_000), 32))  # warm
    capacity, _ = asyncio.run(load.run(path, bodies(model, 192, 0), 48))
    rate = factor * capacity.request_throughput
    gateway = gateway_process(head)
    memory: list[tuple[float, float]] = []

    def sample(at: float) -> None:
        memory.append((round(at, 1), round(gateway.memory_info().rss / 1e6, 1)))

    sample(-1.0)
    offered = asyncio.run(overload.offer(path, bodies(model, 500, 1000), rate, seconds, sample))
    after, _ = asyncio.run(load.run(path, bodies(model, 8, 90_000), 1))
    rss = [mb for _, mb in memory]
    return {
        "capacity_requests_per_s": round(capacity.request_throughput, 2),
        "capacity_ttft_s": capacity.ttft_s,
        "factor": factor,
        **overload.summary(offered, seconds),
        "gateway_rss_mb": {"before": rss[0], "lowest": min(rss), "highest": max(rss), "trace": memory},
        "ttft_alone_after_s": after.ttft_s,
        "machine_load": os.getloadavg()[0],
    }


def overload_table(result: Json) -> Table:
    """Each figure beside its aim."""
    table = Table(
        "",
        "measured",
        "aim",
        title=f"{result['factor']:g} times the capacity of {result['capacity_requests_per_s']} requests/s",
    )
    rss, target = result["gateway_rss_mb"], result["target_ttft_s"]
    rows = (
        (
            "offered",
            f"{result['offered_per_s']} a second, {result['offered_over_accepted']} times what was accepted",
            "",
        ),
        ("neither answered nor refused", str(result["broken"]), "0"),
        ("first token of accepted, p50", f"{result['accepted_ttft_s']['p50']:.2f} s", ""),
        ("first token of accepted, p99", f"{result['accepted_ttft_s']['p99']:.2f} s", f"{2 * target:g} s"),
        ("refused within, p50", f"{1000 * result['refused_seconds']['p50']:.0f} ms", ""),
        ("refused within, p99", f"{1000 * result['refused_seconds']['p99']:.0f} ms", "50 ms"),
        ("Retry-After, longest", f"{result['longest_retry_after_s']:.0f} s", "120 s"),
        ("gateway memory", f"{rss['before']:.0f} MB, {rss['lowest']:.0f} to {rss['highest']:.0f} under load", "+-10%"),
    )
    for row in rows:
        table.add_row(*row)
    return table

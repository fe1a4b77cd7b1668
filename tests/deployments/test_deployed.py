"""The real thing: a private Ray head, `serve deploy`, real clients, load, scaling, and a clean end."""

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
import yaml

from deployments import serve_file
from ops.bench.service import load
from ops.local import Head, LocalError, await_ready, check_http_port, free_port, ray_head, session_processes
from ops.watch import top
from tests.conftest import eventually
from tests.deployments.test_transport import Server, head, statuses

ROOT = Path(__file__).parents[2]
NAME = "smollm2-135m-instruct"
pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


class Service:
    """A deployed application and how to reach it."""

    def __init__(self, head: Head, url: str, file: Path) -> None:
        self.head, self.url, self.file = head, url, file
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=url, timeout=120)

    def gauge(self, name: str, **labels: str) -> float:
        """Sum of a metric over all replicas that report it with these labels."""
        samples = top.scrape(self.head.metrics)
        wanted = set(labels.items())
        return sum(value for (sample, has), value in samples.items() if sample == name and wanted <= set(has))

    def replicas(self) -> int:
        """Engine replicas that are running, as Serve says."""
        status = yaml.safe_load(self.head.serve("status").stdout)
        engine = status["applications"]["caravan"]["deployments"]["Engine"]
        return int(engine["replica_states"].get("RUNNING", 0))

    def processes(self, word: str) -> list[int]:
        return [pid for pid in session_processes(self.head) if word in cmdline(pid)]


def cmdline(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def write_config(file: Path, **args: Any) -> str:
    """ray_config.yaml on a free port, with shortened delays; returns the service's address."""
    config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
    port = free_port()
    config["http_options"]["port"] = port
    application = config["applications"][0]
    sections = {
        "autoscaling": {"upscale_delay_s": 1.0, "downscale_delay_s": 4.0, "look_back_period_s": 11.0},
        "resources": {"drain_timeout_s": 60.0},
        "admission": {"target_ttft_s": 600.0},  # what is slow here is the machine
        **args,
    }
    for section, values in sections.items():
        serve_file.put(application, section, values)
    file.write_text(yaml.safe_dump(config))
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("deployed") / "config.yaml"
    # Arithmetic in float32: what is computed again after a death, in other batches, then gives the same tokens.
    url = write_config(file, model={"dtype": "float16"})
    os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "1"
    try:
        with ray_head(2) as head:
            deployed = head.serve("deploy", str(file))
            assert deployed.returncode == 0, deployed.stderr
            await_ready(head, url)
            yield Service(head, url, file)
        assert session_processes(head) == []
        assert not head.directory.exists()
    finally:
        del os.environ["RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"]


# -- real clients -----------------------------------------------------------------------------------------------------


def test_openai_chat(service: Service) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = service.openai.chat.completions.create(model=NAME, messages=question, temperature=0, max_tokens=30)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = service.openai.chat.completions.create(
        model=NAME, messages=question, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage or chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_openai_completions_with_a_seed_and_logprobs(service: Service) -> None:
    def complete(**options: Any) -> Any:
        return service.openai.completions.create(model=NAME, prompt="Once upon a time", max_tokens=12, **options)

    first, second, other = (complete(seed=s, temperature=0.9, logprobs=2) for s in (5, 5, 6))
    assert first.choices[0].text == second.choices[0].text != other.choices[0].text
    assert len(first.choices[0].logprobs.tokens) == 12
    assert "".join(c.choices[0].text for c in complete(seed=5, temperature=0.9, stream=True)) == first.choices[0].text
    assert [m.id for m in service.openai.models.list()] == [NAME]


@pytest.mark.slow
def test_constrained_answers_even_if_a_stage_dies(service: Service) -> None:
    """Two answers in one stream; the stages compute them again and they stay what they were."""
    schema = {"type": "array", "items": {"enum": ["camel", "llama", "dromedary"]}, "minItems": 25, "maxItems": 25}
    ask: Any = {
        "model": NAME, "messages": [{"role": "user", "content": "Name animals."}], "n": 2, "seed": 5, "max_tokens": 300,
        "response_format": {"type": "json_schema", "json_schema": {"name": "animals", "schema": schema}},
    }  # fmt: skip
    whole = service.openai.chat.completions.create(**ask)
    expected = [choice.message.content or "" for choice in whole.choices]
    assert all(len(json.loads(text)) == 25 for text in expected)
    assert expected[0] != expected[1]
    texts = ["", ""]
    for i, chunk in enumerate(service.openai.chat.completions.create(**ask, stream=True)):
        if i == 20:
            os.kill(service.processes("StageActor")[0], signal.SIGKILL)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == expected


FREEZES = """
import gc, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False)
for actor in ray.util.list_named_actors(all_namespaces=True):
    if "#Engine#" in actor["name"] or "#Gateway#" in actor["name"]:
        replica = ray.get_actor(actor["name"], namespace=actor["namespace"])
        print(ray.get(replica.__ray_call__.remote(lambda self: gc.get_freeze_count())))
"""


def test_the_garbage_collector_leaves_alone_what_engine_and_gateway_started_with(service: Service) -> None:
    """To look through it takes a tenth of a second, in which no token is passed on: Serve sees to it."""
    lines = " ".join(cmdline(pid) for pid in session_processes(service.head))
    found = re.search(r"--gcs-address=(\S+)", lines)
    assert found is not None, lines
    asked = subprocess.run(
        [sys.executable, "-c", FREEZES, found[1]], env=service.head.environment, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    counts = [int(line) for line in asked.stdout.split()]
    assert len(counts) >= 2
    assert min(counts) > 50_000


def test_only_engine_and_stages_have_torch(service: Service) -> None:
    """Beside a gateway's own some 200 MB, which it would never use."""
    names = {pid: cmdline(pid) for pid in session_processes(service.head)}
    gateways = [pid for pid, name in names.items() if "Gateway" in name]
    engines = [pid for pid, name in names.items() if "Engine" in name and "Gateway" not in name]
    assert gateways
    assert engines
    assert not any(has_torch(pid) for pid in gateways)
    assert all(has_torch(pid) for pid in engines)


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_openai_errors_are_its_exception_classes(service: Service) -> None:
    ask = {"messages": [{"role": "user", "content": "hi"}], "model": NAME}
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        service.openai.chat.completions.create(**{**ask, "model": "gpt-4"})  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError) as caught:
        service.openai.chat.completions.create(**ask, max_tokens=100_000)  # type: ignore[call-overload]
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        service.openai.chat.completions.create(**ask, temperature=-1)  # type: ignore[call-overload]
    assert caught.value.param == "temperature"


def test_request_ids_come_back_once(service: Service) -> None:
    response = service.http.get("/health", headers={"X-Request-Id": "find-me"})
    assert response.headers.get_list("x-request-id") == ["find-me"]
    assert len(service.http.get("/health").headers.get_list("x-request-id")) == 1
    assert service.http.get("/ready").json()["ready"] is True


# -- bad input and bad luck -------------------------------------------------------------------------------------------


def test_bad_input_leaves_the_engine_as_it_was(service: Service) -> None:
    bodies: list[tuple[bytes, int]] = [
        (b"", 400), (b"{not json", 400), (b'{"model": "%s"}' % NAME.encode(), 400),
        (json.dumps({"model": NAME, "messages": []}).encode(), 400),
        (json.dumps({"model": "other", "messages": [{"role": "user", "content": "x"}]}).encode(), 404),
        (json.dumps({"model": NAME, "messages": [{"role": "user", "content": "word " * 9000}]}).encode(), 400),
        (b'{"model": "%s", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}' % NAME.encode(), 400),
        (json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x"}], "top_k": -7}).encode(), 400),
        (json.dumps({"model": NAME, "messages": [{"role": "user", "content": "x"}], "n": 10**9}).encode(), 400),
    ]  # fmt: skip
    for content, status in bodies:
        response = service.http.post("/v1/chat/completions", content=content)
        assert response.status_code == status, (content[:60], response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    eventually(lambda: service.gauge("kv_blocks_used") == 0, 15, "no block is in use")
    assert service.http.get("/ready").status_code == 200


def test_a_client_that_leaves_frees_its_sequence(service: Service) -> None:
    body = {"model": NAME, "prompt": "Count: 1, 2, 3,", "max_tokens": 1500, "temperature": 0, "stream": True}
    with service.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        eventually(lambda: service.gauge("running") >= 1, 15, "the sequence runs")
    eventually(lambda: service.gauge("running") == 0, 15, "the sequence is gone")
    eventually(lambda: service.gauge("kv_blocks_used") == 0, 15, "its blocks are free")
    whole = {**body, "stream": False}
    with pytest.raises(httpx.ReadTimeout):
        service.http.post("/v1/completions", json=whole, timeout=2)
    eventually(lambda: service.gauge("running") == 0, 15, "a request that is not streamed is cancelled too")


def test_a_model_that_is_not_there_is_said_in_the_status(service: Service, tmp_path: Path) -> None:
    """Deployed beside the service that runs, which goes on."""
    config = yaml.safe_load(service.file.read_text())
    broken = yaml.safe_load(yaml.safe_dump(config["applications"][0]))
    broken |= {"name": "broken", "route_prefix": "/broken"}
    broken["args"]["model"]["path"] = "/no/such/model.gguf"
    config["applications"].append(broken)
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(config))
    assert service.head.serve("deploy", str(file)).returncode == 0

    def failed() -> bool:
        status = yaml.safe_load(service.head.serve("status").stdout)["applications"].get("broken", {})
        return "/no/such/model.gguf" in json.dumps(status)

    eventually(failed, 60, "the status names the missing file")
    assert service.http.get("/ready").status_code == 200
    assert service.head.serve("deploy", str(service.file)).returncode == 0


def test_a_port_in_use_is_one_clear_error(service: Service) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ops.local", "--config", str(service.file)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    words = " ".join(done.stdout.split())
    assert "is in use" in words
    assert "http_options.port" in words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        file = service.file.with_name("taken.yaml")
        file.write_text(yaml.safe_dump({"http_options": {"port": taken.getsockname()[1]}}))
        with pytest.raises(LocalError, match="is in use"):
            check_http_port(file)


# -- metrics and scaling ----------------------------------------------------------------------------------------------


def test_metrics_have_their_labels(service: Service) -> None:
    text = httpx.get(service.head.metrics).text
    line = next(x for x in text.splitlines() if x.startswith("ray_caravan_stage_busy_seconds_total{"))
    assert all(f'{label}="' in line for label in ("application", "deployment", "replica", "stage"))
    for name in ("ttft_seconds_bucket", "inter_token_seconds_bucket", "e2e_seconds_bucket", "queue_wait_seconds_bucket",
                 "kv_blocks_total", "requests_total", "last_token_age_seconds", "generated_tokens_total"):  # fmt: skip
        assert f"ray_caravan_{name}{{" in text, name
    assert re.search(r'ray_caravan_requests_total\{[^}]*outcome="cancelled"', text)
    for name in ("tenant_requests_total", "tenant_prompt_tokens_total", "tenant_generated_tokens_total"):
        values = re.findall(rf'ray_caravan_{name}\{{[^}}]*tenant="anonymous"[^}}]*\}} (\S+)', text)
        assert sum(map(float, values)) > 0, name


def listening(pid: int) -> list[tuple[str, int]]:
    """Addresses and ports at which a process listens."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return []
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]


def test_ports_are_as_the_security_page_says(service: Service) -> None:
    """Whatever of ours listens everywhere is Ray's and wants its token; our own sockets are bound to one address."""
    anywhere = {"0.0.0.0", "::"}
    dashboard = int(service.head.dashboard.rpartition(":")[2])
    found = {pid: listening(pid) for pid in session_processes(service.head)}
    assert {ip for sockets in found.values() for ip, port in sockets if port == dashboard} == {"127.0.0.1"}
    ours = service.processes("ServeReplica:caravan") + service.processes("ray::StageActor")
    open_ports = {port for pid in ours for ip, port in found[pid] if ip in anywhere}
    assert len(open_ports) >= 4
    assert any(ip not in anywhere for pid in ours for ip, _ in found[pid]), "the links' sockets"
    for port in open_ports:
        codes = {ask_grpc(port, method) for method in PICKLED}
        assert grpc.StatusCode.UNAUTHENTICATED in codes, (port, codes)  # without the token nothing is unpickled
        assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}, (port, codes)
    token = service.head.environment["RAY_AUTH_TOKEN"]
    with_token = {ask_grpc(port, PICKLED[0], token) for port in open_ports}
    assert with_token - {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}, "this test can fail"
    assert httpx.get(f"{service.head.dashboard}/api/version").status_code == 401


# Calls whose arguments are pickles: between Serve's replicas, and between Ray's workers.
PICKLED = ("/ray.serve.ASGIService/HandleRequest", "/ray.rpc.CoreWorkerService/PushTask")


def ask_grpc(port: int, method: str, token: str = "") -> grpc.StatusCode:
    """What a call without a message gets at this port."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


@pytest.mark.slow
def test_transport_abuse_through_serves_own_proxy(service: Service) -> None:
    """What test_transport.py does to the gateway in a uvicorn, as far as Serve's proxy lets it through."""
    server = Server(int(service.url.rpartition(":")[2]), psutil.Process(service.processes("Gateway")[0]))
    body = json.dumps({"model": NAME, "prompt": "hi", "max_tokens": 3}).encode()
    stream = json.dumps({"model": NAME, "prompt": "hi", "max_tokens": 200, "stream": True}).encode()
    before = server.megabytes()

    def served() -> None:
        started = time.monotonic()
        assert service.http.post("/v1/completions", content=body).status_code == 200
        assert time.monotonic() - started < 20

    served()
    smuggled = head("Host: x", path="/health", method="GET")
    for lengths in ((f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"), ("Content-Length: 5, 6",)):
        assert 200 not in statuses(server.send(head(*lengths) + b"0\r\n\r\n" + smuggled))
    assert statuses(server.send(head("Content-Encoding: gzip", f"Content-Length: {len(body)}") + body)) == [415]
    assert service.http.post("/v1/completions", content=bytes(30_000_000)).status_code == 413
    assert statuses(server.send(head("X: " + "x" * 70_000, "Content-Length: 0"))) in ([431], [400])
    for method in ("PUT", "OPTIONS", "DELETE"):
        answer = service.http.request(method, "/v1/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    with ExitStack() as stack:
        for i in range(1000):  # idle ones, and bodies that dawdle
            connection = stack.enter_context(server.connect())
            connection.sendall(head("Content-Length: 100") + b"{" if i % 50 == 0 else b"POST /v1")
        for _ in range(10):
            connection = stack.enter_context(server.connect())
            connection.sendall(head(f"Content-Length: {len(stream)}") + stream)
            connection.recv(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        served()
    served()
    eventually(lambda: service.gauge("running") == 0, 30, "streams that were reset are gone")
    assert server.megabytes() - before < 100


@pytest.mark.slow
def test_scaling_up_and_down_under_load_loses_nothing(service: Service) -> None:
    """1 -> 2 -> 1 replicas while requests run; each gets all of its tokens."""
    bodies = [
        {
            "model": NAME, "prompt": [1000 + (7 * i + j) % 20_000 for j in range(120)], "max_tokens": 48,
            "temperature": 0, "logit_bias": {"2": -100, "0": -100}, "stream_options": {"include_usage": True},
        }
        for i in range(10_000)
    ]  # fmt: skip
    url = f"{service.url}/v1/completions"

    async def main() -> tuple[list[load.Stream], int]:
        results: list[load.Stream] = []
        queue = iter(bodies)
        enough = asyncio.Event()

        async def worker(client: httpx.AsyncClient, last_one_long: bool) -> None:
            while not enough.is_set():
                results.append(await load.stream(client, url, next(queue)))
            if last_one_long:  # still running when the second replica is told to go
                results.append(await load.stream(client, url, {**next(queue), "max_tokens": 400}))

        async with httpx.AsyncClient(timeout=None) as client:
            workers = [asyncio.ensure_future(worker(client, i < 2)) for i in range(16)]
            deadline = time.monotonic() + 120
            most = 1
            while most < 2 and time.monotonic() < deadline:
                await asyncio.sleep(1)
                most = max(most, await asyncio.to_thread(service.replicas))
            await asyncio.sleep(5)  # both serve
            enough.set()
            await asyncio.gather(*workers)
        return results, most

    results, most = asyncio.run(main())
    assert most == 2
    assert [r.error for r in results if r.error] == []
    assert {r.output_tokens for r in results} == {48, 400}
    eventually(lambda: service.replicas() == 1, 90, "back to one replica")
    eventually(lambda: len(service.processes("StageActor")) == 2, 30, "the second pipeline's stages are gone")
    assert service.http.get("/ready").status_code == 200


@pytest.mark.slow
def test_a_stream_survives_the_death_of_its_whole_pipeline(service: Service) -> None:
    """kill -9 of the engine process, which takes its stages with it: Serve makes another, and the stream goes on."""
    body = {
        "model": NAME, "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0.8, "seed": 5,
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    url = f"{service.url}/v1/completions"

    async def main() -> tuple[load.Stream, load.Stream]:
        async with httpx.AsyncClient(timeout=None) as client:
            undisturbed = await load.stream(client, url, body)
            stages = service.processes("StageActor")
            running = asyncio.ensure_future(load.stream(client, url, body))
            await asyncio.sleep(undisturbed.end_to_end_latency_s / 3)
            (engine,) = service.processes("ServeReplica:caravan:Engine")
            assert not running.done()
            os.kill(engine, signal.SIGKILL)
            disturbed = await running
            assert not set(stages) & set(service.processes("StageActor")), "stages of the dead engine are left"
        return undisturbed, disturbed

    undisturbed, disturbed = asyncio.run(main())
    assert (undisturbed.error, disturbed.error) == ("", "")
    assert undisturbed.output_tokens == disturbed.output_tokens == 400
    assert disturbed.text == undisturbed.text
    eventually(lambda: service.gauge("streams_resumed_total", cause="lost") == 1, 30, "the metric counts it")
    assert service.gauge("streams_broken_total") == 0


@pytest.mark.faults
def test_an_update_hands_its_streams_to_the_new_replica(service: Service) -> None:
    """`serve deploy` of a changed configuration with one replica: the new one is ready before the old one goes.

    Greedy: in 16 bits, what is computed again rounds otherwise, and one of 400 draws may fall on the other side.
    Sampled streams that move are compared in float32 (`tests/deployments/gateway/test_resume.py`).
    """
    body = {
        "model": NAME, "prompt": "Long ago", "max_tokens": 400, "temperature": 0.0, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    url = f"{service.url}/v1/completions"
    changed = yaml.safe_load(service.file.read_text())
    changed["applications"][0]["args"]["scheduler"]["max_num_seqs"] = 32
    (before,) = service.processes("ServeReplica:caravan:Engine")

    async def one_after_another(client: httpx.AsyncClient) -> list[load.Stream]:
        """One is open whenever the old replica goes, however long the new one takes to start."""
        streams = []
        while before in service.processes("ServeReplica:caravan:Engine"):
            streams.append(await load.stream(client, url, body))
        return streams

    async def main() -> tuple[load.Stream, list[load.Stream], list[str]]:
        async with httpx.AsyncClient(timeout=None) as client:
            undisturbed = await load.stream(client, url, body)
            running = asyncio.ensure_future(one_after_another(client))
            await asyncio.sleep(undisturbed.end_to_end_latency_s / 5)
            service.file.with_name("changed.yaml").write_text(yaml.safe_dump(changed))
            deployed = await asyncio.to_thread(
                service.head.serve, "deploy", str(service.file.with_name("changed.yaml"))
            )
            assert deployed.returncode == 0
            errors = []
            while before in service.processes("ServeReplica:caravan:Engine"):  # short requests all along
                short = await load.stream(client, url, {**body, "max_tokens": 4})
                errors += [short.error] if short.error else []
                await asyncio.sleep(0.2)
            return undisturbed, await running, errors

    undisturbed, disturbed, errors = asyncio.run(main())
    assert (undisturbed.error, errors) == ("", [])
    assert {(stream.error, stream.text) for stream in disturbed} == {("", undisturbed.text)}
    assert service.gauge("streams_broken_total") == 0
    moved = lambda: service.gauge("streams_resumed_total", cause="leaving")  # noqa: E731
    eventually(lambda: moved() >= 1, 15, "the old replica should have handed its stream over")


# -- the end ----------------------------------------------------------------------------------------------------------


def test_shutdown_leaves_no_process_and_no_placement_group(service: Service) -> None:
    assert len(service.processes("StageActor")) == 2
    assert service.head.serve("shutdown", "-y").returncode == 0
    eventually(lambda: not service.processes("StageActor"), 60, "no stage process is left")
    headers = {"Authorization": f"Bearer {service.head.environment['RAY_AUTH_TOKEN']}"}

    def groups() -> list[dict[str, Any]]:
        answer = httpx.get(f"{service.head.dashboard}/api/v0/placement_groups", headers=headers, timeout=30).json()
        found = answer["data"]["result"]["result"]
        return [group for group in found if group["state"] != "REMOVED"]

    eventually(lambda: groups() == [], 30, "no placement group is left")


@pytest.mark.slow
def test_serving_in_the_foreground_ends_with_ctrl_c(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    url = write_config(file)
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.local", "--config", str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        eventually(lambda: ready(url), 150, "the service answers")
        process.send_signal(signal.SIGINT)
        words, _ = process.communicate(timeout=120)
        assert "no process of the session is left" in words
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=120)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False

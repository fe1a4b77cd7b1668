"""Every answer is counted and logged once, whatever its status; the parts of a request add up to its time."""

import asyncio
import json
import logging
from typing import Any

import httpx
import prometheus_client
import pytest

from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from deployments.gateway.tenants import add_key
from deployments.metrics import Recorder
from deployments.telemetry.answers import outcome_of
from tests.deployments.gateway.test_gateway import ARGS, ScriptedEngine, tokenizer
from tests.deployments.local_engine import default_model, running
from tests.ops.test_ops import Backend

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
# What is sent, and the endpoint, outcome and status of its answer.
CASES: list[tuple[tuple[str, str, Any], tuple[str, str, str]]] = [
    (("POST", "/v1/chat/completions", CHAT), ("chat", "stop", "200")),
    (("POST", "/v1/chat/completions", CHAT | {"max_tokens": 1}), ("chat", "length", "200")),
    (("POST", "/v1/chat/completions", CHAT | {"stream": True}), ("chat", "stop", "200")),
    (("POST", "/v1/chat/completions", CHAT | {"model": "other"}), ("chat", "rejected", "404")),
    (("POST", "/v1/chat/completions", {}), ("chat", "rejected", "400")),
    (("POST", "/v1/completions", {"prompt": "x", "temperature": 9}), ("completions", "rejected", "400")),
    (("POST", "/v1/completions", "x" * 9_000), ("completions", "rejected", "413")),
    (("GET", "/v1/completions", None), ("completions", "rejected", "405")),
    (("POST", "/v1/responses", {"model": "tiny", "input": "hi"}), ("responses", "stop", "200")),
    (("POST", "/invocations", {"inputs": "hi"}), ("sagemaker", "stop", "200")),
    (("POST", "/invocations", {"input": "hi"}), ("sagemaker", "rejected", "422")),
    (("POST", "/tokenize", {"prompt": "x"}), ("tokens", "ok", "200")),
    (("GET", "/v1/models", None), ("models", "ok", "200")),
    (("GET", "/v1/models/none", None), ("models", "rejected", "404")),
    (("GET", "/nowhere", None), ("other", "rejected", "404")),
    (("GET", "/docs", None), ("other", "ok", "200")),
    (("GET", "/health", None), ("probe", "ok", "200")),
    (("GET", "/ready", None), ("probe", "error", "503")),
]  # fmt: skip


def client_of(engine: Any, recorder: Recorder, **args: Any) -> httpx.AsyncClient:
    config = parse_app_config({**ARGS, **args})
    app = create_gateway(config, engine, recorder)
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://gateway", timeout=60
    )


def counted(registry: prometheus_client.CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    """Samples of a counter by endpoint, outcome and status."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            if sample.name == f"ray_caravan_{name}":
                found[tuple(sample.labels.get(k, "") for k in ("endpoint", "outcome", "status"))] = sample.value
    return found


def test_every_answer_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = Backend()
    recorder = Recorder(backend, "gateway")
    engine = ScriptedEngine()
    engine.script = [*tokenizer().encode("Hello there", add_bos=False), 2]
    limits = {"routes": ["sagemaker"], "max_body_bytes": 8_000, "resume_attempts": 0}
    before: dict[tuple[str, ...], float] = {}

    async def main() -> None:
        async with client_of(engine, recorder, gateway=limits) as client:
            before.update(counted(backend.registry, "requests_total"))
            for (method, path, body), _ in CASES:
                content = body if isinstance(body, str) else json.dumps(body) if body is not None else None
                await client.request(method, path, content=content)
            engine.script = [None]
            for stream in (False, True):
                assert (await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})).status_code == 503
            engine.script = [500, 501, None]
            assert "error" in (await client.post("/v1/chat/completions", json=CHAT | {"stream": True})).text
            engine.script = 5  # type: ignore[assignment]
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 500

    with caplog.at_level(logging.DEBUG, "deployments"):
        asyncio.run(main())
    wanted = (
        [key for _, key in CASES]
        + [("chat", "error", "503")] * 2
        + [("chat", "error", "200"), ("chat", "error", "500")]
    )
    after = counted(backend.registry, "requests_total")
    assert {key: n for key, n in after.items() if n} == {key: wanted.count(key) for key in set(wanted)}
    lines = [r for r in caplog.records if r.message == "request finished"]
    seen = [(r.endpoint, r.outcome, str(r.status)) for r in lines]  # type: ignore[attr-defined]
    assert seen == wanted
    assert set(wanted) - {("sagemaker", "rejected", "422")} <= set(before), "a series was born with its first event"
    assert set(before.values()) == {0.0}


def test_who_is_refused_is_counted_for_the_tenant_that_was_known_before(tmp_path: Any) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "small", requests_per_minute=1)
    backend = Backend()

    async def main() -> list[int]:
        async with client_of(ScriptedEngine(), Recorder(backend, "gateway"), auth={"keys_file": str(file)}) as client:
            assert counted(backend.registry, "tenant_requests_total")["", "refused", ""] == 0
            whose = {"Authorization": f"Bearer {key}"}
            answers = [await client.post("/v1/chat/completions", headers=whose, json={}) for _ in range(2)]
            return [a.status_code for a in [*answers, await client.post("/v1/chat/completions", json=CHAT)]]

    assert asyncio.run(main()) == [400, 429, 401]
    found = counted(backend.registry, "requests_total")
    assert [found["chat", o, s] for o, s in (("rejected", "400"), ("refused", "429"), ("refused", "401"))] == [1, 1, 1]


def test_the_parts_of_a_request_add_up_to_its_time(caplog: pytest.LogCaptureFixture) -> None:
    """A body that takes 0.2 s to arrive and a long prompt: both are in the time to the first token."""
    prompt = "word " * 1200

    async def body() -> Any:
        whole = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0}).encode()
        yield whole[:100]
        await asyncio.sleep(0.2)
        yield whole[100:]

    with running(default_model(2048)) as engine, caplog.at_level(logging.INFO, "deployments"):

        async def main() -> None:
            backend = Backend()
            model = ARGS["model"] | {"max_model_len": 2048}
            async with client_of(engine, Recorder(backend, "gateway"), model=model) as client:
                answer = await client.post("/v1/completions", content=body())
                assert answer.status_code == 200, answer.text
            families = {f.name: f for f in backend.registry.collect()}
            parts = {s.labels["part"] for s in families["ray_caravan_request_part_seconds"].samples}
            assert parts >= {"body", "tokenise", "route", "queue", "prefill", "decode", "detokenise"}

        asyncio.run(main())
    (line,) = [r for r in caplog.records if r.message == "request finished"]
    spent = line.parts_s  # type: ignore[attr-defined]
    before = sum(spent[part] for part in ("body", "tokenise", "route", "queue", "prefill"))
    assert spent["body"] >= 0.2
    assert before == pytest.approx(line.ttft_s, abs=0.05)  # type: ignore[attr-defined]
    assert before + spent["decode"] == pytest.approx(line.e2e_s, abs=0.1)  # type: ignore[attr-defined]
    assert spent["prefill"] > spent["queue"]


@pytest.mark.parametrize(("status", "outcome"), [(200, "ok"), (404, "rejected"), (429, "refused"), (502, "error")])
def test_outcomes_of_statuses(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome

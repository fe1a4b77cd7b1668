"""API keys and per-tenant limits: files, reloading, headers, and what a request without a key gets."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from deployments.asgi import create_gateway
from deployments.config import AuthArgs, ConfigError, parse_app_config
from deployments.gateway import tenants
from deployments.gateway.tenants import ANONYMOUS, KeyRing, Tenant, add_key, sha256
from deployments.limits.buckets import Limits, duration
from ops.cli import app
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class Guarded:
    """A gateway that asks for keys, in front of an engine that says a few tokens."""

    def __init__(self, **args: Any) -> None:
        self.engine, self.metrics = ScriptedEngine(), Recorded()
        self.engine.script = [500, 501, 502, 2]
        self.app = create_gateway(parse_app_config({**ARGS, **args}), self.engine, self.metrics)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def chat(self, key: str | None = None, header: str = "Authorization", **body: Any) -> httpx.Response:
        headers = {} if key is None else {header: f"Bearer {key}" if header == "Authorization" else key}
        return await self.client.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers)

    async def post(self, path: str, key: str | None) -> httpx.Response:
        return await self.client.post(path, headers={"Authorization": f"Bearer {key}"} if key else {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_opens_and_nothing_else_does(file: Path) -> None:
    key, second = add_key(file, "search"), add_key(file, "search")
    text = file.read_text()
    assert key not in text
    assert sha256(key) in text
    assert oct(file.stat().st_mode)[-3:] == "600"

    async def test() -> None:
        service = Guarded(auth={"keys_file": str(file)})
        for right in (key, second):
            assert (await service.chat(right)).status_code == 200
            assert (await service.chat(right, "x-api-key")).status_code == 200
        for wrong in (None, "", "cv-wrong", key[:-1], key + "x", sha256(key), "Bearer", "x" * 5000):
            response = await service.chat(wrong)
            assert response.status_code == 401, wrong
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            if wrong and len(wrong) > 8:
                assert wrong not in response.text, "what was sent is not repeated"
        assert (await service.client.get("/v1/models")).status_code == 401
        for path in ("/health", "/ready", "/version"):
            assert (await service.client.get(path)).status_code in (200, 503)
        assert service.metrics.counts["refused_total", "anonymous", "invalid_api_key"] == 9
        assert service.metrics.counts["tenant_requests_total", "search", "stop"] == 4
        assert service.metrics.counts["tenant_generated_tokens_total", "search"] == 16
        assert {r.tenant for r in service.engine.requests} == {"search"}

    asyncio.run(test())


def test_a_file_that_is_cut_loses_no_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every length, whether it was cut for good or is still being written."""
    monkeypatch.setattr(tenants, "LOOK_AGAIN_S", 0.0)
    keys = [add_key(file, name) for name in ("one", "two", "three")]
    whole = file.read_text()
    ring = KeyRing(AuthArgs(keys_file=str(file)))
    for length in range(0, len(whole) - 5, 7):
        file.write_text(whole[:length])
        for _ in range(3):
            assert [ring.find(key) is not None for key in keys] == [True] * 3, length
        with pytest.raises(ConfigError):
            KeyRing(AuthArgs(keys_file=str(file)))
    file.write_text(whole.replace(sha256(keys[1]), "f" * 64))
    assert [ring.find(key) is not None for key in keys] == [True, False, True]


def test_a_file_written_by_hand_is_taken_once_it_has_settled(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "LOOK_AGAIN_S", 0.0)
    key = add_key(file, "one")
    ring = KeyRing(AuthArgs(keys_file=str(file)))
    file.write_text(f"tenants:\n- name: one\n  keys: [{sha256(key)}]\n")
    assert ring.find("new") is None
    beginning = file.read_text() + "- name: two\n  keys:\n"
    for extent in range(10, len(beginning), 10):  # somebody writes it, piece by piece
        file.write_text(beginning[:extent])
        assert ring.find(key) is not None
    file.write_text(beginning + f"  - {sha256('new')}\n")
    assert ring.find("new") is None, "it may not be whole yet"
    assert ring.find("new") is not None


def test_a_change_is_seen_whatever_the_files_size_and_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "LOOK_AGAIN_S", 0.0)
    key = add_key(file, "one")
    ring = KeyRing(AuthArgs(keys_file=str(file)))
    before = file.stat()
    file.write_text(file.read_text().replace(sha256(key), sha256("other")))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    assert ring.find(key) is None
    assert ring.find("other") is not None


def test_every_key_can_be_revoked_and_a_deleted_file_revokes_none(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tenants, "LOOK_AGAIN_S", 0.0)
    tenants.log.propagate = True
    logging.getLogger("deployments").propagate = True
    key = add_key(file, "one")
    ring = KeyRing(AuthArgs(keys_file=str(file)))
    file.unlink()
    with caplog.at_level(logging.ERROR):
        assert ring.find(key) is not None
        assert ring.find(key) is not None
    assert [record.message[:32] for record in caplog.records] == ["the API keys stay as they were: "], "once"
    file.write_text("---\ntenants:\n- name: one\n...\n")
    assert ring.find(key) is None
    assert ring.required, "still no one comes in without a key"
    with pytest.raises(ConfigError, match="no tenant has a key"):
        KeyRing(AuthArgs(keys_file=str(file)))
    assert ring.find(add_key(file, "one")) is not None


def test_a_changed_file_counts_without_a_restart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "LOOK_AGAIN_S", 0.0)
    first = add_key(file, "one")
    ring = KeyRing(AuthArgs(keys_file=str(file)))
    second = add_key(file, "two", weight=3.0)
    assert [t.name if t else None for t in (ring.find(first), ring.find(second))] == ["one", "two"]
    assert ring.find(second).weight == 3.0  # type: ignore[union-attr]
    whole = file.read_text()
    for broken in ("tenants: [", "", "tenants: []", "tenants: [{name: one, keys: [xyz]}]"):
        file.write_text(broken)
        assert ring.find(first) is not None, "what cannot be read changes nothing"
    file.unlink()
    assert ring.find(second) is not None
    file.write_text(whole.replace(sha256(second), "f" * 64))
    assert ring.find(second) is None, "a key that was taken out is refused"
    assert ring.find(first) is not None


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read"),
        ("", "holds no tenants"),
        ("tenants: []", "tenants"),
        ("tenants: [{name: a}]", "no tenant has a key"),
        ("tenants: [{name: A B, keys: []}]", "tenants.0.name"),
        ("tenants: [{name: a, keys: [plain-key]}]", "tenants.0.keys.0"),
        (f"tenants: [{{name: a, keys: [{'f' * 64}], wieght: 2}}]", "unknown key"),
        (f"tenants: [{{name: a, keys: [{'f' * 64}]}}, {{name: a}}]", "twice"),
        (f"tenants: [{{name: a, keys: [{'f' * 64}]}}, {{name: b, keys: [{'f' * 64}]}}]", "twice"),
        ("[", "not valid YAML"),
    ],
)
def test_keys_that_are_asked_for_and_not_there_stop_the_start(file: Path, content: str | None, word: str) -> None:
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=word):
        create_gateway(parse_app_config({**ARGS, "auth": {"keys_file": str(file)}}), ScriptedEngine(), Recorded())


def test_asking_for_keys_without_any_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"set auth\.keys_file"):
        parse_app_config({**ARGS, "auth": {"required": True}})
    monkeypatch.delenv("OUR_KEYS", raising=False)
    with pytest.raises(ConfigError, match="OUR_KEYS"):
        KeyRing(AuthArgs(keys_env="OUR_KEYS"))
    monkeypatch.setenv("OUR_KEYS", f"tenants: [{{name: a, keys: [{sha256('k')}]}}]")
    found = KeyRing(AuthArgs(keys_env="OUR_KEYS")).find("k")
    assert found is not None
    assert found.name == "a"


def test_keys_add_on_the_command_line(file: Path) -> None:
    run = CliRunner()
    result = run.invoke(app, ["keys", "add", "batch", "--file", str(file), "--weight", "0.5", "--priority", "5"])
    assert result.exit_code == 0, result.output
    key = result.stdout.strip().splitlines()[0]
    tenant = KeyRing(AuthArgs(keys_file=str(file))).find(key)
    assert tenant is not None
    assert (tenant.name, tenant.weight, tenant.priority) == ("batch", 0.5, 5)
    for arguments in (["Bad Name"], ["ok", "--weight", "-1"]):
        result = run.invoke(app, ["keys", "add", *arguments, "--file", str(file)])
        assert result.exit_code == 1
        assert "tenants." in result.output
    file.write_text("junk: [")
    assert run.invoke(app, ["keys", "add", "x", "--file", str(file)]).exit_code == 1
    assert file.read_text() == "junk: [", "a file that is not understood is left alone"
    assert os.listdir(file.parent) == [file.name]


def test_limits_of_requests_and_tokens_a_minute() -> None:
    limits, tenant = Limits(), Tenant(name="t", requests_per_minute=3, tokens_per_minute=600)
    for _ in range(3):
        limits.take_request(tenant, 0.0)
    with pytest.raises(Exception, match="requests per minute: limit 3") as caught:
        limits.take_request(tenant, 0.0)
    assert caught.value.status == 429  # type: ignore[attr-defined]
    assert caught.value.headers["Retry-After"] == "20"  # type: ignore[attr-defined]
    limits.take_request(tenant, 20.0)
    limits.take_prompt(tenant, 500, 20.0)
    with pytest.raises(Exception, match="tokens per minute"):
        limits.take_prompt(tenant, 200, 20.0)
    limits.spend(tenant, 300, 20.0)  # an answer longer than what was left: a debt of 200
    with pytest.raises(Exception, match=r"try again in 20\.1s"):
        limits.take_request(tenant, 20.0)
    assert limits.headers(tenant, 40.0) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "40s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }
    limits.take_prompt(tenant, 10_000, 200.0)  # more than a minute's worth is let through when nothing is owed
    assert [duration(s) for s in (0.0121, 3.5, 360.0)] == ["13ms", "3.5s", "6m0s"]


def test_a_limit_is_shared_by_the_gateways_and_follows_the_file() -> None:
    limits = Limits(gateways=2)
    for _ in range(2):
        limits.take_request(Tenant(name="t", requests_per_minute=4), 0.0)
    with pytest.raises(Exception, match="limit 2"):
        limits.take_request(Tenant(name="t", requests_per_minute=4), 0.0)
    limits.take_request(Tenant(name="t", requests_per_minute=4000), 1.0)
    limits.take_request(ANONYMOUS, 0.0)
    assert limits.headers(ANONYMOUS, 0.0) == {}


def test_limits_over_http(file: Path) -> None:
    key = add_key(file, "small", requests_per_minute=2, tokens_per_minute=600)
    other = add_key(file, "other")

    async def test() -> None:
        service = Guarded(auth={"keys_file": str(file)})
        first, second, third = [await service.chat(key) for _ in range(3)]
        assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        error = third.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 0 < int(third.headers["retry-after"]) <= 30
        assert third.headers["x-ratelimit-remaining-requests"] == "0"
        spent = 600 - int(third.headers["x-ratelimit-remaining-tokens"])
        usage = [r.json()["usage"]["total_tokens"] for r in (first, second)]
        assert -30 <= spent - sum(usage) <= 1, "prompt and output, once; a little has come back since"
        assert (await service.chat(other)).status_code == 200, "and nobody else"
        assert "x-ratelimit-limit-requests" not in (await service.chat(other)).headers
        assert service.metrics.counts["refused_total", "small", "rate_limit_exceeded"] == 1
        assert len(service.engine.requests) == 4

    asyncio.run(test())


def test_a_priority_is_bounded_by_the_key(file: Path) -> None:
    key, urgent = add_key(file, "normal"), add_key(file, "urgent", priority=-5)

    async def test() -> None:
        service = Guarded(auth={"keys_file": str(file)})
        response = await service.chat(key, priority=-1)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
        assert (await service.chat(key, priority=7)).status_code == 200
        assert (await service.chat(urgent, priority=-5)).status_code == 200
        assert [r.priority for r in service.engine.requests] == [7, -5]

    asyncio.run(test())


def test_what_is_cached_is_shared_with_the_same_salt_alone(file: Path) -> None:
    """The key's and the request's own; who has none shares with all who have none."""
    plain, other = add_key(file, "plain"), add_key(file, "other")
    apart, within = add_key(file, "apart", cache_salt="a"), add_key(file, "within", cache_salt="a")

    async def test() -> None:
        service = Guarded(auth={"keys_file": str(file)})
        for key, given in ((plain, {}), (other, {}), (apart, {}), (within, {}), (plain, {"cache_salt": "a"}),
                           (apart, {"cache_salt": "b"}), (plain, {"cache_salt": "b"})):  # fmt: skip
            assert (await service.chat(key, **given)).status_code == 200
        roots = [request.chain_root for request in service.engine.requests]
        assert roots[0] == roots[1]
        assert roots[2] == roots[3]
        assert len(set(roots)) == 5
        refused = await service.chat(plain, cache_salt="")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")

    asyncio.run(test())


def test_only_operators_reset_the_cache(file: Path) -> None:
    user, operator = add_key(file, "user"), add_key(file, "ops", operator=True)

    async def test() -> None:
        service = Guarded(auth={"keys_file": str(file)})
        refused = await service.post("/v1/cache/reset", user)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_an_operator")
        assert (await service.post("/v1/cache/reset", operator)).status_code == 202
        assert service.engine.resets == 1
        without_keys = Guarded()
        assert (await without_keys.post("/v1/cache/reset", None)).status_code == 403

    asyncio.run(test())

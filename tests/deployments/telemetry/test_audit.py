"""The audit log: what becomes of keys and of the configuration, and nothing that is secret."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.experimental import internal_kv

from deployments import logs
from deployments.asgi import create_gateway
from deployments.config import parse_app_config
from deployments.gateway import tenants
from deployments.gateway.tenants import add_key, sha256
from deployments.telemetry import audit
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [json.loads(logs.JsonFormatter().format(r)) for r in caplog.records if r.name == audit.__name__]
    return [line["audit"] for line in lines]


def test_keys_are_told_when_they_are_added_used_refused_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(audit, "REFUSED_AGAIN_S", 60.0)
    file = tmp_path / "keys.yaml"
    first = add_key(file, "search")
    engine = ScriptedEngine()
    app = create_gateway(parse_app_config({**ARGS, "auth": {"keys_file": str(file)}}), engine, Recorded())

    async def ask(key: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            return (
                await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
            ).status_code

    async def main() -> list[int]:
        answers = [await ask(first), await ask(first), await ask("wrong"), await ask(""), await ask("wrong")]
        second = add_key(file, "search", requests_per_minute=7)
        answers.append(await ask(second))
        whole = yaml.safe_load(file.read_text())
        whole["tenants"][0]["keys"] = [sha256(second)]
        file.write_text(yaml.safe_dump(whole, explicit_start=True, explicit_end=True))
        return [*answers, await ask(first)]

    with caplog.at_level(logging.INFO):
        assert asyncio.run(main()) == [200, 200, 401, 401, 401, 200, 401]
    found = told(caplog)
    assert [line["event"] for line in found] == [
        "key_used", "key_refused", "key_added", "limits_changed", "key_used", "key_removed",
    ]  # fmt: skip
    assert found[0]["tenant"] == "search"
    assert sha256(first).startswith(found[0]["key"])
    assert found[1]["key"] == sha256("wrong")[:12]
    assert found[3]["is"] == {"requests_per_minute": 7}
    whole = "".join(record.getMessage() + str(vars(record)) for record in caplog.records)
    assert first not in whole
    assert "wrong" not in whole


def test_a_changed_configuration_is_told_once_with_what_it_was(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: dict[bytes, bytes] = {}
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, namespace: store.get(key))
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda key, value, namespace: store.update({key: value}))
    with caplog.at_level(logging.INFO):
        for waiting in (30.0, 30.0, 5.0, 5.0):
            audit.configuration("caravan", {"admission": {"target_ttft_s": waiting}, "model": {"name": "m"}})
    first, second = told(caplog)
    assert (first["event"], first["is"]["model.name"]) == ("configuration_changed", "m")
    assert (second["was"], second["is"]) == ({"admission.target_ttft_s": 30.0}, {"admission.target_ttft_s": 5.0})


def test_the_audit_log_is_written_whatever_the_level_of_the_others() -> None:
    logs.configure("ERROR")
    try:
        assert audit.log.isEnabledFor(logging.INFO)
        assert not logging.getLogger("deployments.gateway").isEnabledFor(logging.INFO)
    finally:
        logs.configure("INFO")
        for package in ("model", "cluster", "deployments", "ops"):
            logger = logging.getLogger(package)
            logger.handlers.clear()
            logger.propagate = True

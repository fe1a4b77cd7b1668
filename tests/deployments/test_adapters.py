"""Names of adapters at a gateway: where they come from, what they lead to, who may change them."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import RequestRejected
from cluster.scheduling.sequence import AdapterRef
from deployments.adapters import names
from deployments.asgi import create_gateway
from deployments.config import ConfigError, parse_app_config
from deployments.gateway.tenants import add_key
from model.adapters import CONFIG, SAFE, AdapterFiles
from tests.deployments.gateway.test_gateway import ARGS, Recorded, ScriptedEngine


class AdapterEngine(ScriptedEngine):
    """Says a few tokens whatever is asked; what is in `broken` cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.script = [500, 501, 502, 2]
        self.read: list[AdapterRef] = []
        self.broken: set[str] = set()
        self.named: dict[str, AdapterRef] = {}

    async def load_adapter(self, adapter: AdapterRef) -> None:
        if Path(adapter.path).name in self.broken:
            raise RequestRejected(f"adapter {adapter.path}: is damaged")
        self.read.append(adapter)

    async def named_adapters(self) -> Mapping[str, AdapterRef]:
        return self.named

    async def name_adapters(self, named: Mapping[str, AdapterRef]) -> None:
        self.named = dict(named)


def make(path: Path, content: bytes = b"weights") -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (path / SAFE).write_bytes(content)
    return AdapterFiles(path).digest()


class Service:
    def __init__(self, engine: AdapterEngine | None = None, **args: Any) -> None:
        self.engine = engine or AdapterEngine()
        model = {**ARGS["model"], **args.pop("model", {})}
        app = create_gateway(parse_app_config({**ARGS, **args, "model": model}), self.engine, Recorded())
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def chat(self, model: str, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        return await self.client.post("/v1/chat/completions", json={"model": model, "messages": messages, **body})

    async def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return await self.client.post(path, json=body, headers=headers)


def test_a_configured_adapter_is_asked_for_by_its_name(tmp_path: Path) -> None:
    digest = make(tmp_path / "a")

    async def test() -> None:
        service = Service(model={"adapters": {"shouts": str(tmp_path / "a")}})
        plain, adapted = await service.chat("tiny"), await service.chat("shouts")
        assert (plain.json()["model"], adapted.json()["model"]) == ("tiny", "shouts")
        assert plain.json()["system_fingerprint"] != adapted.json()["system_fingerprint"]
        text = await service.post("/v1/completions", {"model": "shouts", "prompt": "hi"})
        answers = await service.post("/v1/responses", {"model": "shouts", "input": "hi"})
        assert (text.json()["model"], answers.json()["model"]) == ("shouts", "shouts")
        expected = AdapterRef(digest, str(tmp_path / "a"))
        assert [r.adapter for r in service.engine.requests] == [None, expected, expected, expected]
        assert service.engine.read == [expected], "an engine has read it before the first request, and once"
        assert (await service.post("/tokenize", {"model": "shouts", "prompt": "hi"})).status_code == 200
        listed = (await service.client.get("/v1/models")).json()["data"]
        assert [(card["id"], card["parent"]) for card in listed] == [("tiny", None), ("shouts", "tiny")]
        assert (await service.client.get("/v1/models/shouts")).json()["parent"] == "tiny"
        assert (await service.client.get("/v1/models/other")).status_code == 404
        unknown = await service.chat("other")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")

    asyncio.run(test())


def test_a_new_version_counts_from_the_next_request_on(tmp_path: Path) -> None:
    before = make(tmp_path / "a")

    async def test() -> None:
        service = Service(model={"adapter_dir": str(tmp_path)})
        first = await service.chat("a")
        after = make(tmp_path / "a", b"other weights")
        second = await service.chat("a")
        assert [r.adapter and r.adapter.digest for r in service.engine.requests] == [before, after]
        assert first.json()["system_fingerprint"] != second.json()["system_fingerprint"]

    asyncio.run(test())


def test_a_directory_offers_what_is_in_it_and_nothing_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    make(inside / "good")
    make(inside / "broken", b"spoilt")
    make(outside)
    (inside / "link").symlink_to(outside)
    (inside / "within").symlink_to(inside / "good")
    (inside / "half").mkdir()
    (inside / "half" / CONFIG).symlink_to(outside / CONFIG)
    (inside / "half" / SAFE).symlink_to(outside / SAFE)
    (inside / "notes.txt").write_text("no adapter")
    (inside / "other.gguf").write_bytes(b"GGUF....")

    async def test() -> None:
        service = Service(model={"adapter_dir": str(inside)})
        service.engine.broken = {"broken"}
        for name in ("good", "within", "other"):
            assert (await service.chat(name)).status_code == 200, name
        for name in (
            "../outside",
            "..",
            ".",
            "good/../good",
            f"{outside}",
            "",
            "good\0",
            "nothing",
            "x" * 300,
            "%2e%2e",
        ):
            assert (await service.chat(name)).status_code == 404, name
        for name in ("link", "half", "broken", "notes.txt"):
            answer = await service.chat(name)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_error"), name
        assert (await service.chat("tiny")).status_code == 200
        listed = [card["id"] for card in (await service.client.get("/v1/models")).json()["data"]]
        assert listed == ["tiny", "broken", "good", "other", "within"]

    asyncio.run(test())


def test_operators_name_adapters_for_all_gateways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LOOK_AGAIN_S", 0.0)
    digest = make(tmp_path / "a")
    make(tmp_path / "broken")
    keys = tmp_path / "keys.yaml"
    user, operator = add_key(keys, "user"), add_key(keys, "ops", operator=True)
    body = {"lora_name": "new", "lora_path": str(tmp_path / "a")}

    async def test() -> None:
        engine = AdapterEngine()
        engine.broken = {"broken"}
        args = {"model": {"max_loaded_adapters": 2}, "auth": {"keys_file": str(keys)}}
        one, other = Service(engine, **args), Service(engine, **args)

        async def ask(service: Service) -> int:
            body = {"model": "new", "messages": [{"role": "user", "content": "hi"}]}
            return (await service.post("/v1/chat/completions", body, user)).status_code

        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        assert (await one.post(load, body)).status_code == 401
        assert (await one.post(load, body, user)).status_code == 403
        assert await ask(one) == 404
        for wrong in ({"lora_path": str(tmp_path / "broken")}, {"lora_path": "/nowhere"}, {"lora_name": "../x"},
                      {"lora_name": "tiny"}, {"lora_name": 5}, {"lora_path": None}):  # fmt: skip
            answer = await one.post(load, {**body, **wrong}, operator)
            assert answer.status_code == 400, wrong
        assert engine.named == {}
        answer = await one.post(load, body, operator)
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
        assert await ask(one) == await ask(other) == 200
        assert {r.adapter and r.adapter.digest for r in engine.requests} == {digest}
        assert (await other.post(load, body, operator)).status_code == 400, "it is there already"
        assert (await other.post(load, {**body, "load_inplace": True}, operator)).status_code == 200
        assert (await other.post(unload, {"lora_name": "new"}, user)).status_code == 403
        assert (await other.post(unload, {"lora_name": "new"}, operator)).status_code == 200
        assert (await other.post(unload, {"lora_name": "new"}, operator)).status_code == 404
        assert await ask(one) == await ask(other) == 404

    asyncio.run(test())


def test_without_keys_nobody_is_an_operator(tmp_path: Path) -> None:
    async def test() -> None:
        service = Service(model={"max_loaded_adapters": 2})
        answer = await service.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": str(tmp_path)})
        assert answer.status_code == 403
        without = Service()
        assert (await without.post("/v1/load_lora_adapter", {})).status_code == 404

    asyncio.run(test())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"adapters": {"tiny": "/x"}}, "model.adapters: tiny: is the model's own name"),
        ({"adapters": {"a": "/x"}, "max_loaded_adapters": 0}, "model.max_loaded_adapters: is 0"),
        ({"adapters": {"../a": "/x"}}, "model.adapters"),
        ({"max_adapter_rank": 1000}, "model.max_adapter_rank"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_app_config({**ARGS, "model": {**ARGS["model"], **model}})

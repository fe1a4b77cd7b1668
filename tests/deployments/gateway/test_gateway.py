"""The HTTP side in front of a scripted engine: formats, stops, bad input, disconnects. No Ray."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.errors import EngineStopped
from cluster.scheduling.sequence import Request, TokenEvent
from deployments import logs
from deployments.asgi import create_gateway
from deployments.config import AppConfig, parse_app_config
from deployments.engine.board import ReplicaStatus
from model.text.tokenizer import Tokenizer, load_tokenizer
from model.weights import resolve_path
from tests import golden
from tests.model.text.checkpoints import SIZE
from tests.model.text.test_checkpoint_files import directory

ARGS = {
    "model": {"path": golden.MODEL, "name": "tiny", "max_model_len": 256},
    "pipeline": {"device": "cpu"},
    "cache": {"memory_gb": 0.1},
    "gateway": {"resume_attempts": 0},
}


class Recorded:
    """A metrics recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], float] = {}

    def create(self, name: str, **labels: str) -> None:
        pass

    def inc(self, name: str, value: float = 1.0, **labels: str) -> None:
        key = (name, *labels.values())
        self.counts[key] = self.counts.get(key, 0) + value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.inc(name)


class ScriptedEngine:
    """Answers every request with the tokens of a text, then `finish`; `None` in the script breaks the engine."""

    def __init__(self) -> None:
        self.script: list[int | None] = []
        self.finish: str = "stop"
        self.pause = asyncio.Event()
        self.pause.set()
        self.requests: list[Request] = []
        self.open = self.resets = 0
        self.statuses: list[ReplicaStatus] = []
        self.looks = 0

    async def generate(self, request: Request) -> AsyncGenerator[list[TokenEvent], None]:
        self.requests.append(request)
        self.open += 1
        try:
            budget = request.sampling.max_tokens
            for n, token in enumerate(self.script, 1):
                if token is None:
                    raise EngineStopped("a stage died")
                last = n == len(self.script) or n == budget
                reason = ("length" if n == budget else self.finish) if last else None
                logprob = None if request.sampling.logprobs is None else -0.5
                yield [TokenEvent(request.request_id, token, reason, logprob, [(token, -0.5)], 0)]  # type: ignore[arg-type]
                if last:
                    return
                await asyncio.sleep(0)
                await self.pause.wait()
        finally:
            self.open -= 1

    async def reset_cache(self) -> None:
        self.resets += 1

    async def replicas(self) -> list[ReplicaStatus]:
        self.looks += 1
        return self.statuses


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_path(golden.MODEL))


class Service:
    """The gateway with its engine and a client."""

    def __init__(self, keepalive_s: float = 15.0, **model: Any) -> None:
        self.engine, self.metrics = ScriptedEngine(), Recorded()
        gateway, served = {**ARGS["gateway"], "keepalive_s": keepalive_s}, {**ARGS["model"], **model}
        config: AppConfig = parse_app_config({**ARGS, "gateway": gateway, "model": served})
        self.app = create_gateway(config, self.engine, self.metrics)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        self.tokenizer = tokenizer()
        self.say("Hello there, world!")

    def say(self, text: str) -> None:
        self.engine.script = [*self.tokenizer.encode(text, add_bos=False), 2]  # 2: <|im_end|>

    async def chat(self, **body: Any) -> httpx.Response:
        whole = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **body}
        return await self.client.post("/v1/chat/completions", json=whole)

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", **body})

    async def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """All chunks; the stream must end with [DONE] or an error."""
        response = await self.client.post(path, json={"model": "tiny", "stream": True, **body})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        lines = [line for line in response.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        if lines[-1] == "data: [DONE]":
            lines.pop()
        else:
            assert "error" in lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines]


Run = Callable[[Callable[[Service], Any]], Any]


def test_a_silent_stream_is_kept_open_by_comments() -> None:
    async def main() -> str:
        service = Service(keepalive_s=0.05)
        service.engine.pause.clear()
        asked = asyncio.ensure_future(service.complete(stream=True))
        await asyncio.sleep(0.3)
        service.engine.pause.set()
        return (await asked).text

    lines = asyncio.run(main()).split("\n\n")
    assert lines[0].startswith("data: "), "never before the first chunk"
    assert lines.count(": waiting") >= 2
    assert lines[-2] == "data: [DONE]"


@pytest.fixture(scope="module")
def run() -> Run:
    """Run a coroutine with a fresh service."""

    def run(test: Callable[[Service], Any]) -> Any:
        async def main() -> Any:
            return await test(Service())

        return asyncio.run(main())

    return run


def test_chat_whole(run: Run) -> None:
    async def test(service: Service) -> None:
        response = await service.chat(temperature=0)
        body = response.json()
        assert response.status_code == 200
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello there, world!", "refusal": None}
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len(service.engine.script)
        assert body["usage"]["total_tokens"] == sum(body["usage"][f"{k}_tokens"] for k in ("prompt", "completion"))
        assert response.headers.get_list("x-request-id") != []

    run(test)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_stream_adds_up_to_the_whole(run: Run, path: str) -> None:
    async def test(service: Service) -> None:
        service.say("Grüße aus Kyōto 京都 🌸! " * 3)
        ask = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        ask |= {"max_tokens": 100, "logprobs": True if "chat" in path else 1}
        whole = (await service.client.post(path, json={"model": "tiny", **ask})).json()
        chunks = await service.stream(path, stream_options={"include_usage": True}, **ask)
        *chunks, last = chunks
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert len({chunk["id"] for chunk in chunks}) == 1
        reasons = [c["choices"][0]["finish_reason"] for c in chunks]
        assert reasons[-1] == whole["choices"][0]["finish_reason"] == "stop"
        assert not any(reasons[:-1])
        if "chat" in path:
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
            assert text == whole["choices"][0]["message"]["content"]
            logprobs = [x for c in chunks for x in (c["choices"][0]["logprobs"] or {}).get("content", [])]
            assert logprobs == whole["choices"][0]["logprobs"]["content"]
        else:
            assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
            offsets = [x for c in chunks for x in (c["choices"][0]["logprobs"] or {}).get("text_offset", [])]
            assert offsets == whole["choices"][0]["logprobs"]["text_offset"]

    run(test)


@pytest.mark.parametrize("stop", ["world", "there, w", "lo the", "!", ["zzz", "wor"], "Hello"])
def test_stop_strings_across_token_boundaries(run: Run, stop: str | list[str]) -> None:
    async def test(service: Service) -> None:
        text = "Hello there, world! And more that nobody asked for"
        service.say(text)
        wanted = text[: min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)]
        choice = (await service.chat(stop=stop)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (wanted, "stop")
        chunks = await service.stream("/v1/completions", prompt="x", stop=stop, max_tokens=50)
        assert "".join(c["choices"][0]["text"] for c in chunks) == wanted
        assert service.engine.open == 0, "the sequence is freed as soon as the stop string is seen"

    run(test)


def test_length_and_defaults(run: Run) -> None:
    async def test(service: Service) -> None:
        service.say("one two three four five six seven eight nine ten " * 4)
        choice = (await service.complete()).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert service.engine.requests[-1].sampling.max_tokens == 16  # OpenAI's default
        await service.chat()
        prompt = len(service.engine.requests[-1].token_ids)
        assert service.engine.requests[-1].sampling.max_tokens == 256 - prompt  # chat: the rest of the context
        assert service.engine.requests[-1].sampling.temperature == 1.0
        await service.chat(max_completion_tokens=3, max_tokens=9, seed=7, temperature=None, user="me", unknown=1)
        assert service.engine.requests[-1].sampling.max_tokens == 3
        assert service.engine.requests[-1].sampling.seed == 7

    run(test)


BAD: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("chat", {"messages": []}, "messages", "messages"),
    ("chat", {"messages": "hi"}, "messages", "messages"),
    ("chat", {"messages": [{"role": "wizard", "content": "x"}]}, "messages", "role"),
    ("chat", {"messages": [{"content": "x"}]}, "messages", "role"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ("chat", {"temperature": -1}, "temperature", "temperature"),
    ("chat", {"temperature": 1e9}, "temperature", "temperature"),
    ("chat", {"temperature": "0.5"}, "temperature", "number"),
    ("chat", {"temperature": True}, "temperature", "number"),
    ("chat", {"top_p": 1.5}, "top_p", "top_p"),
    ("chat", {"top_k": 2**64}, "top_k", "top_k"),
    ("chat", {"max_tokens": 0}, "max_tokens", "max_tokens"),
    ("chat", {"max_tokens": -5}, "max_tokens", "max_tokens"),
    ("chat", {"max_tokens": 1.5}, "max_tokens", "whole"),
    ("chat", {"presence_penalty": 3}, "presence_penalty", "presence_penalty"),
    ("chat", {"seed": 2**70}, "seed", "seed"),
    ("chat", {"stop": ["a"] * 5}, "stop", "4 strings"),
    ("chat", {"stop": ""}, "stop", "stop"),
    ("chat", {"logit_bias": {"1": 101}}, "logit_bias", "logit_bias"),
    ("chat", {"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ("chat", {"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
    ("chat", {"top_logprobs": 3}, "top_logprobs", "logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 50}, "top_logprobs", "top_logprobs"),
    ("chat", {"n": 0}, "n", "n: "),
    ("chat", {"n": 129}, "n", "n: "),
    ("chat", {"n": 10**9}, "n", "n: "),
    ("chat", {"n": True}, "n", "whole"),
    ("chat", {"best_of": 2}, "best_of", "not supported"),
    ("chat", {"echo": True}, "echo", "not supported"),
    ("chat", {"min_tokens": 9, "max_tokens": 8}, "min_tokens", "between 0 and 8"),
    ("chat", {"min_tokens": 10**6}, "min_tokens", "min_tokens"),
    ("chat", {"min_tokens": -1}, "min_tokens", "min_tokens"),
    ("chat", {"repetition_penalty": 0.001}, "repetition_penalty", "repetition_penalty"),
    ("chat", {"stop_token_ids": [10**7]}, "stop_token_ids", "not a token id"),
    ("chat", {"stop_token_ids": ["x"]}, "stop_token_ids", "whole"),
    ("chat", {"stop_token_ids": [1] * 65}, "stop_token_ids", "64"),
    ("chat", {"priority": 5000}, "priority", "priority"),
    ("chat", {"priority": "high"}, "priority", "whole"),
    ("chat", {"user": "x" * 2000}, "user", "user"),
    ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages", "tool_calls"),
    ("complete", {"n": 3, "best_of": 2}, "best_of", "best_of"),
    ("complete", {"n": 1, "best_of": 2, "stream": True}, "best_of", "best_of"),
    ("complete", {"best_of": 21}, "best_of", "best_of"),
    ("complete", {"prompt": ["a"] * 50, "n": 3}, "n", "150 answers"),
    ("complete", {"prompt": ["a", 5]}, "prompt", "prompt"),
    ("complete", {"prompt": ["a", ""]}, "prompt", "empty"),
    ("complete", {"prompt": [[1], []]}, "prompt", "empty"),
    ("complete", {"prompt": [[1], [-1]]}, "prompt", "token ids"),
    ("complete", {"max_tokens": 0}, "max_tokens", "echo"),
    ("complete", {"echo": True, "suffix": "x"}, "echo", "suffix"),
    ("complete", {"use_beam_search": True}, "use_beam_search", "not supported"),
    ("chat", {"tools": [{"type": "function"}]}, "tools", "function: is required"),
    ("chat", {"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ("chat", {"response_format": "json"}, "response_format", "dictionary"),
    ("chat", {"response_format": {"type": "json_schema"}}, "response_format", "schema in it"),
    ("chat", {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "only one"),
    ("chat", {"guided_regex": ""}, "guided_regex", "not empty"),
    ("chat", {"guided_regex": "a" * 70_000}, "guided_regex", "65536"),
    ("chat", {"guided_choice": []}, "guided_choice", "strings"),
    ("chat", {"guided_choice": ["a", 1]}, "guided_choice", "strings"),
    ("chat", {"guided_json": 5}, "guided_json", "guided_json"),
    ("chat", {"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
    ("chat", {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
    ("chat", {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "only one"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ("complete", {"prompt": ""}, "prompt", "empty"),
    ("complete", {"prompt": []}, "prompt", "empty"),
    ("complete", {"prompt": [1, -1]}, "prompt", "token ids"),
    ("complete", {"prompt": [1, 10**6]}, "prompt", "token ids"),
    ("complete", {"prompt": [1, True]}, "prompt", "token ids"),
    ("complete", {"prompt": 5}, "prompt", "prompt"),
    ("complete", {"logprobs": 6}, "logprobs", "logprobs"),
    ("complete", {"suffix": "x"}, "suffix", "this model cannot fill in text"),
    ("chat", {"suffix": "x"}, "suffix", "not supported"),
]


@pytest.mark.parametrize(("kind", "body", "param", "word"), BAD, ids=lambda x: str(x)[:40])
def test_bad_fields_are_400_and_named(run: Run, kind: str, body: dict[str, Any], param: str | None, word: str) -> None:
    async def test(service: Service) -> None:
        response = await (service.chat if kind == "chat" else service.complete)(**body)
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert word in error["message"]
        assert service.engine.requests == []

    run(test)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "an array"),
        (b'"x"', "a string"),
        (b"null", "null"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "not valid JSON"),
        (b'{"messages": []}', "messages"),
    ],
)
def test_bodies_that_are_no_request(run: Run, content: bytes, word: str) -> None:
    async def test(service: Service) -> None:
        response = await service.client.post("/v1/chat/completions", content=content)
        assert response.status_code == 400
        assert word in response.json()["error"]["message"]

    run(test)


def test_a_body_that_is_too_long_is_413(run: Run) -> None:
    async def test(service: Service) -> None:
        response = await service.chat(messages=[{"role": "user", "content": "x" * 9_000_000}])
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"

    run(test)


def test_context_overflow_in_the_words_clients_match(run: Run) -> None:
    async def test(service: Service) -> None:
        for body in ({"messages": [{"role": "user", "content": "word " * 400}]}, {"max_tokens": 5000}):
            error = (await service.chat(**body)).json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert error["message"].startswith(
                "This model's maximum context length is 256 tokens. However, you requested"
            )
        error = (await service.complete(prompt=[5] * 256)).json()["error"]
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")

    run(test)


@pytest.mark.parametrize(("switch", "drawn"), [("none", (1.0, 1.0, 0, 1.0)), ("checkpoint", (0.6, 0.9, 50, 1.1))])
def test_sampling_defaults_of_the_checkpoint_are_used_if_the_configuration_says_so(
    switch: str, drawn: tuple[float, ...], tmp_path: Path
) -> None:
    path = directory(tmp_path, chat_template="{{ messages[0].content }}")
    shape = {
        "vocab_size": SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "intermediate_size": 96,
    }
    (path / "config.json").write_text(json.dumps(shape | {"architectures": ["LlamaForCausalLM"]}))
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "max_new_tokens": 3}
    (path / "generation_config.json").write_text(json.dumps(given))

    async def main() -> None:
        service = Service(path=str(path), sampling_defaults=switch)
        (card,) = (await service.client.get("/v1/models")).json()["data"]
        del given["max_new_tokens"]
        assert card["sampling_defaults"] == (given if switch == "checkpoint" else {})
        for ask in (service.chat, service.complete):
            await ask()
            one = service.engine.requests[-1].sampling
            assert (one.temperature, one.top_p, one.top_k, one.repetition_penalty) == drawn
            await ask(temperature=0, top_k=0)  # said is said
            one = service.engine.requests[-1].sampling
            assert (one.temperature, one.top_p, one.top_k) == (0, drawn[1], 0)

    asyncio.run(main())


def test_unknown_models_and_routes(run: Run) -> None:
    async def test(service: Service) -> None:
        response = await service.chat(model="gpt-4")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert "gpt-4" in response.json()["error"]["message"]
        assert (await service.client.get("/v1/models/other")).status_code == 404
        assert (await service.client.get("/v1/models/tiny")).json()["id"] == "tiny"
        assert [m["id"] for m in (await service.client.get("/v1/models")).json()["data"]] == ["tiny"]
        for response in (await service.client.get("/nowhere"), await service.client.get("/v1/completions")):
            assert response.status_code in (404, 405)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert (await service.client.get("/health")).json() == {"status": "ok"}
        assert "version" in (await service.client.get("/version")).json()

    run(test)


def test_tokenize_shows_what_the_model_sees(run: Run) -> None:
    async def test(service: Service) -> None:
        async def post(path: str, **body: Any) -> httpx.Response:
            return await service.client.post(path, json=body)

        text = "Grüße, 京都! <|im_end|>"  # the control token's name is text here
        body = (await post("/tokenize", prompt=text, model="tiny", return_token_strs=True)).json()
        assert body["tokens"] == service.tokenizer.encode(text, add_bos=True)
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["max_model_len"] == 256
        assert (await post("/detokenize", tokens=body["tokens"])).json() == {"prompt": text}
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|> hi"}]
        body = (await post("/tokenize", messages=messages)).json()
        await service.chat(messages=messages)
        assert service.engine.requests[-1].token_ids == body["tokens"]
        assert "<|im_start|>user\n<|im_end|> hi<|im_end|>" in body["prompt"]
        assert body["tokens"].count(2) == 2, "what the user typed is no control token"
        for path, bad, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "x", "messages": messages}, "prompt"),
            ("/tokenize", {"messages": []}, "messages"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [10**9]}, "tokens"),
            ("/detokenize", {"tokens": ["x"]}, "tokens"),
        ):
            response = await post(path, **bad)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), (path, bad)
        assert (await post("/tokenize", prompt="x", model="other")).status_code == 404
        assert (await post("/detokenize", tokens=[])).json() == {"prompt": ""}

    run(test)


def test_a_broken_engine_is_503_before_the_stream_and_said_in_it_after(run: Run) -> None:
    async def test(service: Service) -> None:
        service.engine.script = [None]
        for body in ({}, {"stream": True}):
            response = await service.chat(**body)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
            assert response.json()["error"]["code"] == "engine_unavailable"
        service.engine.script = [500, 501, None]
        *_, error = await service.stream("/v1/completions", prompt="x")
        assert error["error"]["type"] == "server_error"
        assert service.metrics.counts["streams_broken_total",] == 1
        assert service.metrics.counts["requests_total", "completions", "error", "200"] == 1

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_sequence(run: Run, stream: bool) -> None:
    async def test(service: Service) -> None:
        service.engine.pause.clear()
        body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream}).encode()
        left = asyncio.Event()
        sent = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in sent:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip
        task = asyncio.ensure_future(service.app(scope, receive, send))
        while not service.engine.open:
            await asyncio.sleep(0.001)
        left.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)
        for _ in range(100):
            await asyncio.sleep(0.001)
        assert service.engine.open == 0
        assert service.metrics.counts["requests_total", "completions", "cancelled", "200" if stream else "499"] == 1

    run(test)


def test_ready_says_why_not(run: Run) -> None:
    async def test(service: Service) -> None:
        def status(state: str, reason: str, age: float = 0.0) -> ReplicaStatus:
            counts = dict.fromkeys(
                ("running", "waiting", "waiting_tokens", "kv_blocks_used", "kv_blocks_total", "max_model_len"), 0
            )
            return ReplicaStatus(
                replica="r", state=state, reason=reason, loaded=0.43, updated_at=0.0, age_s=age, **counts  # type: ignore[arg-type]
            )  # fmt: skip

        for statuses, code, word in (
            ([], 503, "no engine runs"),
            ([status("loading", "loading 43 %")], 503, "loading 43 %"),
            ([status("stalled", "no step has finished for 80 s")], 503, "80 s"),
            ([status("ready", "", age=60)], 503, "not been heard of"),
            ([status("loading", "loading 43 %"), status("ready", "")], 200, ""),
        ):
            service.engine.statuses = statuses
            response = await service.client.get("/ready")
            assert response.status_code == code
            assert word in response.json()["reason"]
            assert ("retry-after" in response.headers) == (code == 503)

    run(test)


def test_request_ids(run: Run) -> None:
    async def test(service: Service) -> None:
        response = await service.client.get("/health", headers={"X-Request-Id": "my-id"})
        assert response.headers.get_list("x-request-id") == ["my-id"]
        for unfit in ("a b", "x" * 200):
            response = await service.client.get("/health", headers={"X-Request-Id": unfit})
            assert response.headers["x-request-id"] != unfit

    run(test)


def test_prompts_are_logged_only_where_that_is_switched_on(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        for on in (False, True):
            engine = ScriptedEngine()
            engine.script = [*tokenizer().encode("An answer", add_bos=False), 2]
            app = create_gateway(parse_app_config({**ARGS, "logging": {"log_prompts": on}}), engine, Recorded())
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                await client.post("/v1/completions", json={"model": "tiny", "prompt": "A question"})

    with caplog.at_level(logging.INFO, "deployments"):
        asyncio.run(test())
    off, on = (r for r in caplog.records if r.message == "request finished")
    shown = logs.JsonFormatter((*logs.FIELDS, *logs.PROMPT_FIELDS))
    assert "question" not in shown.format(off)
    line = json.loads(shown.format(on))
    assert (line["prompt"], line["answer"]) == ("A question", "An answer")
    assert "question" not in logs.JsonFormatter().format(on)


def test_logs_hold_the_request_id_and_no_prompt_text(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test(service: Service) -> None:
        secret = "the launch code is tangerine"
        service.say(secret)
        await service.client.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": secret}]},
            headers={"X-Request-Id": "abc"},
        )
        await service.chat(messages=[{"role": secret, "content": secret}])
        assert secret not in (await service.chat(messages=[{"role": secret, "content": secret}])).text

    with caplog.at_level(logging.DEBUG):
        run(test)
    lines = [logs.JsonFormatter().format(record) for record in caplog.records]
    finished = [json.loads(line) for line in lines if "request finished" in line]
    assert [(line["outcome"], line["status"]) for line in finished] == [("stop", 200), *[("rejected", 400)] * 2]
    assert finished[0]["request_id"] == "abc"
    assert "tangerine" not in "".join(lines)

"""OpenAI's endpoints in front of a real engine, asked by openai-python and by plain HTTP."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import pytest

from cluster.config import EngineConfig
from cluster.errors import EngineStopped
from cluster.scheduling.sequence import Request, TokenEvent
from deployments import fingerprint as fingerprints
from deployments.config import parse_app_config
from deployments.gateway import pieces as texts
from deployments.gateway import resume
from deployments.gateway.request import derived_seed
from model.text.tokenizer import Tokenizer
from tests.deployments.local_service import ARGS, Service, with_service

HOT: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 4}


def test_n_answers_each_by_its_own_seed() -> None:
    async def test(service: Service) -> None:
        answers = await service.complete(n=3, **HOT)
        assert [a["index"] for a in answers] == [0, 1, 2]
        found = [a["text"] for a in answers]
        assert len(set(found)) > 1
        for i, text in enumerate(found):  # each of them is what a request of its own would have got
            (alone,) = await service.complete(**HOT | {"seed": derived_seed(11, i)})
            assert alone["text"] == text
        assert derived_seed(11, 0) == 11

    with_service(test)


def test_several_prompts_as_text_and_as_ids() -> None:
    async def test(service: Service) -> None:
        prompts = ["The sea is", "One, two, three,"]
        tokenize = (await service.http.post("/tokenize", json={"prompt": prompts[1]})).json()
        alone = [await service.complete(p, n=2, **HOT) for p in prompts]
        expected = [a["text"] for answers in alone for a in answers]
        for given in (prompts, [prompts[0], tokenize["tokens"]]):
            body = await service.post("/v1/completions", prompt=given, n=2, **HOT)
            assert [c["text"] for c in body["choices"]] == expected
            assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
        single = [(await service.post("/v1/completions", prompt=p, **HOT))["usage"] for p in prompts]
        assert body["usage"]["prompt_tokens"] == sum(u["prompt_tokens"] for u in single), "each prompt counts once"
        assert body["usage"]["completion_tokens"] == 4 * HOT["max_tokens"]

    with_service(test)


def test_best_of_is_ranked_by_the_mean_logprob() -> None:
    async def test(service: Service) -> None:
        everything = await service.complete(n=8, logprobs=0, **HOT)
        ranked = sorted(everything, key=lambda a: mean(a["logprobs"]["token_logprobs"]), reverse=True)
        body = await service.post("/v1/completions", prompt="Once upon a time", n=4, best_of=8, **HOT)
        assert [a["text"] for a in body["choices"]] == [a["text"] for a in ranked[:4]]
        assert [a["index"] for a in body["choices"]] == [0, 1, 2, 3]
        assert all(a["logprobs"] is None for a in body["choices"]), "nobody asked for them"
        assert body["usage"]["completion_tokens"] == 8 * HOT["max_tokens"]

    with_service(test)


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_streams_of_several_answers_add_up_to_the_whole(path: str) -> None:
    async def test(service: Service) -> None:
        client: Any = service.openai.chat.completions if path == "chat" else service.openai.completions
        ask = {"messages": [{"role": "user", "content": "Say hi"}]} if path == "chat" else {"prompt": "Say hi"}
        ask |= {"model": "smol", "n": 3, **HOT}
        whole = await client.create(**ask)
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = [c async for c in await client.create(**ask, stream=True, stream_options=options)]
        texts, ends = ["", "", ""], [0, 0, 0]
        for chunk in chunks[:-1]:
            (choice,) = chunk.choices
            assert not ends[choice.index], "nothing comes after a terminal chunk"
            texts[choice.index] += (choice.delta.content or "") if path == "chat" else choice.text
            ends[choice.index] += choice.finish_reason is not None
        assert ends == [1, 1, 1]
        assert texts == [c.message.content if path == "chat" else c.text for c in whole.choices]
        assert chunks[-1].choices == []
        assert chunks[-1].usage == chunks[-2].usage
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        counts = [c.usage.completion_tokens for c in chunks if c.usage]
        assert counts == sorted(counts)
        assert chunks[0].system_fingerprint == whole.system_fingerprint
        if path == "chat":
            roles = [c.choices[0].index for c in chunks[:-1] if c.choices[0].delta.role == "assistant"]
            assert roles == [0, 1, 2]

    with_service(test)


def test_echo_and_the_prompts_logprobs() -> None:
    async def test(service: Service) -> None:
        prompt = "The capital of France is Paris, and 京都 is"
        (plain,) = await service.complete(prompt, max_tokens=4, temperature=0)
        (echo,) = await service.complete(prompt, max_tokens=4, temperature=0, echo=True, logprobs=2)
        assert echo["text"] == prompt + plain["text"]
        found = echo["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert all(value < 0 for value in found["token_logprobs"][1:])
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            if not token.startswith("bytes:"):
                assert echo["text"][offset:].startswith(token)
        for token, value, top in list(
            zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == value
            assert 2 <= len(top) <= 3
        (only,) = await service.complete(prompt, max_tokens=0, echo=True, logprobs=2)
        assert only["text"] == prompt
        n = len(only["logprobs"]["tokens"])
        assert only["logprobs"]["tokens"] == found["tokens"][:n]
        assert only["logprobs"]["token_logprobs"][1:] == pytest.approx(found["token_logprobs"][1:n], abs=1e-5)
        assert only["finish_reason"] == "length"
        (silent,) = await service.complete(prompt, max_tokens=4, temperature=0, echo=True)
        assert (silent["text"], silent["logprobs"]) == (echo["text"], None)
        ask: Any = {"model": "smol", "prompt": prompt, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2}
        chunks = [c async for c in await service.openai.completions.create(**ask, stream=True)]
        assert "".join(c.choices[0].text for c in chunks) == echo["text"]
        offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset or []]
        assert offsets == found["text_offset"]

    with_service(test)


def test_an_echo_of_as_many_tokens_as_the_context_holds() -> None:
    async def test(service: Service) -> None:
        ids = [i % 900 + 20 for i in range(256)]
        body = await service.post("/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=1)
        assert len(body["choices"][0]["logprobs"]["tokens"]) == 256
        assert body["usage"]["completion_tokens"] == 0

    with_service(test)


def test_min_tokens_stop_ids_and_shown_stops() -> None:
    async def test(service: Service) -> None:
        eos = next(iter(service.engine.requests[-1:]), None) or await _eos(service)
        eager = {"logit_bias": {str(eos): 100}, "temperature": 0, "max_tokens": 9}
        usage = (await service.post("/v1/completions", prompt="Hi", **eager))["usage"]
        assert usage["completion_tokens"] == 1
        body = await service.post("/v1/completions", prompt="Hi", min_tokens=5, **eager)
        assert body["usage"]["completion_tokens"] == 6
        assert body["choices"][0]["finish_reason"] == "stop"
        body = await service.post("/v1/completions", prompt="Hi", ignore_eos=True, **eager)
        assert body["usage"]["completion_tokens"] == 9
        (plain,) = await service.complete("1, 2, 3,", temperature=0, max_tokens=8, logprobs=0)
        third = plain["logprobs"]["tokens"][2]
        ids = (await service.http.post("/tokenize", json={"prompt": third})).json()["tokens"]
        (stopped,) = await service.complete("1, 2, 3,", temperature=0, max_tokens=8, stop_token_ids=ids)
        first = plain["logprobs"]["tokens"].index(third)
        assert stopped["text"] == "".join(plain["logprobs"]["tokens"][:first])
        assert stopped["finish_reason"] == "stop"
        options = {"temperature": 0, "max_tokens": 8, "stop": [plain["text"][3:5]]}
        (hidden,) = await service.complete("1, 2, 3,", **options)
        (shown,) = await service.complete("1, 2, 3,", include_stop_str_in_output=True, **options)
        assert shown["text"] == hidden["text"] + options["stop"][0]

    with_service(test)


async def _eos(service: Service) -> int:
    await service.complete("Hi", max_tokens=1)
    (eos, *_) = service.engine.requests[-1].sampling.stop_token_ids
    return eos


def test_each_of_several_streams_resumes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "FIRST_PAUSE_S", 0.01)

    async def test(service: Service) -> None:
        expected = [a["text"] for a in await service.complete(n=3, **HOT)]
        generate, lives = service.engine.generate, iter([2, 3, 99, 99, 1, 99])

        async def dying(request: Request) -> AsyncGenerator[list[TokenEvent], None]:
            life, stream = next(lives, 99), generate(request)
            try:
                async for events in stream:
                    yield events
                    life -= len(events)
                    if life <= 0:
                        raise EngineStopped("a node went down")
            finally:
                await stream.aclose()

        service.engine.generate = dying  # type: ignore[method-assign]
        assert [a["text"] for a in await service.complete(n=3, **HOT)] == expected
        assert service.metrics.counts["streams_resumed_total", "lost"] >= 2

    with_service(test)


def test_a_request_that_fails_alone_gets_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the detokeniser, the stop matcher and the writer of answers: others go on."""

    async def test(service: Service) -> None:
        from deployments.routes import openai_formats

        (healthy,) = await service.complete(temperature=0, max_tokens=3)

        def broken(*_: Any) -> Any:
            raise RuntimeError("injected")

        for owner, name, victim in (
            (texts.StopMatcher, "_overlap", {"stop": ["zzz"]}),
            (texts, "_token_logprob", {"logprobs": 1}),
            (openai_formats.CompletionFormat, "_top", {"logprobs": 1}),
        ):
            for stream in (False, True):
                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, staticmethod(broken))
                    ask = {"model": "smol", "prompt": "x", "max_tokens": 3, "stream": stream, **victim}
                    answer, company = await asyncio.gather(
                        service.http.post("/v1/completions", json=ask), service.complete(temperature=0, max_tokens=3)
                    )
                assert company[0]["text"] == healthy["text"]
                assert answer.text.count('"error"') == 1, answer.text
                assert "injected" not in answer.text
                if not stream:
                    assert answer.status_code == 500
                    assert answer.headers["x-should-retry"] == "false"

    with_service(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_in_the_detokeniser(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """At a chat's third token. A completion beside it goes on, and the engine keeps nothing of the chat."""

    class Faulty(texts.Detokenizer):
        def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
            super().__init__(tokenizer, at_start=at_start)
            self._left = 3 if at_start else 1000  # only chats begin a text

        def push(self, token_id: int) -> str:
            self._left -= 1
            if not self._left:
                raise RuntimeError("injected")
            return super().push(token_id)

    async def test(service: Service) -> None:
        (healthy,) = await service.complete(temperature=0, max_tokens=8)
        monkeypatch.setattr(texts, "Detokenizer", Faulty)
        messages = [{"role": "user", "content": "Tell me a story"}]
        chat = {"model": "smol", "messages": messages, "max_tokens": 200, "stream": stream, "ignore_eos": True}
        answer, (company,) = await asyncio.gather(
            service.http.post("/v1/chat/completions", json=chat), service.complete(temperature=0, max_tokens=8)
        )
        assert company["text"] == healthy["text"]
        assert answer.text.count('"error"') == 1, answer.text
        assert "injected" not in answer.text
        assert answer.text.count('"content":') == (3 if stream else 0), "the role, and the tokens before the fault"
        assert "[DONE]" not in answer.text
        assert answer.status_code == (200 if stream else 500)
        assert service.engine.kv_blocks_used == 0
        assert service.metrics.counts["requests_total", "chat", "error", "200" if stream else "500"] == 1

    with_service(test)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answers", [1, 3])
def test_a_client_that_leaves_frees_its_cache_within_two_steps(stream: bool, answers: int) -> None:
    async def test(service: Service) -> None:
        body = {
            "model": "smol",
            "prompt": "Once",
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": stream,
            "n": answers,
        }
        left, sent = asyncio.Event(), iter([{"type": "http.request", "body": msgspec.json.encode(body)}])

        async def receive() -> dict[str, Any]:
            for message in sent:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        answered: list[Any] = []

        async def send(message: Any) -> None:
            answered.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip
        task = asyncio.ensure_future(service.app(scope, receive, send))
        while service.engine.steps < 3:
            assert not task.done(), answered
            await asyncio.sleep(0.005)
        assert service.engine.kv_blocks_used > 0
        left.set()
        await asyncio.wait({task}, timeout=60)
        while service.engine.kv_blocks_used:
            await asyncio.sleep(0.001)
        assert 0 < service.engine.left_at <= service.engine.steps <= service.engine.left_at + 2
        assert service.metrics.counts["requests_total", "completions", "cancelled", "200" if stream else "499"] == 1

    with_service(test)


def test_the_fingerprint_changes_with_weights_code_and_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "w.gguf"
    weights.write_bytes(bytes(500_000))

    def of(**sections: dict[str, Any]) -> str:
        args = {**ARGS, "model": {**ARGS["model"], "path": str(weights)}}
        for name, section in sections.items():
            args[name] = {**args.get(name, {}), **section}
        fingerprints._weights.cache_clear()
        return fingerprints.fingerprint(parse_app_config(args))

    seen = [of()]
    assert of() == of(gateway={"replicas": 3}) == seen[0]
    changes: dict[str, Any] = {
        "split": [20, 10],
        "quantization": "fp8",
        "quantization_ignore": ["w2"],
        "dtype": "float16",
    }
    changes |= {"load_format": "dummy", "prompt_format": "llama2", "sampling_defaults": "checkpoint", "device": "cuda"}
    for section, fields in {name: info.annotation for name, info in EngineConfig.model_fields.items()}.items():
        for key, field in fields.model_fields.items():  # type: ignore[union-attr]
            silent = key in fingerprints.CHANGES_NO_TOKEN.get(section, ())
            if key == "path" or (silent and key not in ("name", "memory_gb", "max_num_seqs")):
                continue
            value = changes.get(key, "other" if key == "name" else None)
            if section == "cache" and key == "dtype":
                value = "fp8"
            if value is None:
                default = field.default
                value = not default if isinstance(default, bool) else 7
            found = of(**{section: {key: value}})
            assert (found == seen[0]) == silent, f"{section}.{key}"
            seen += [] if silent else [found]
    weights.write_bytes(bytes(250_000) + b"\1" + bytes(249_999))
    seen += [of()]
    monkeypatch.setattr(fingerprints, "code_digest", lambda: "another version")
    seen += [of()]
    assert len(set(seen)) == len(seen)

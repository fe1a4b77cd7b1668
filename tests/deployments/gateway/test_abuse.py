"""One client that does its worst, against the gateway alone; `caravan bench abuse` does it to a deployed service.

Each test fails if the gateway stops listening to others, or lets through what it should have refused unread.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.scheduling.sequence import Request, TokenEvent
from deployments.gateway.prompts import LONG_TEXT, Prompts
from deployments.gateway.tenants import ANONYMOUS, Tenant, add_key
from model.text.constraint import TOO_DEAR
from model.text.tokenizer import Tokenizer, longest_token
from tests.deployments.gateway.test_gateway import tokenizer
from tests.deployments.gateway.test_tenants import Guarded

pytestmark = pytest.mark.integration

Messages = list[dict[str, Any]]


class Counting:
    """A tokenizer that says what it was asked."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        self.characters += len(text)
        return self._inner.encode(text, add_bos=add_bos)


async def raw(service: Guarded, messages: Messages, **scope: Any) -> Messages:
    """What the application sends to a client that sends these messages, and leaves."""
    sent, arriving = list[dict[str, Any]](), iter([*messages, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(arriving)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    whole = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"",
        "http_version": "1.1", "scheme": "http", "server": ("gateway", 80), "asgi": {"version": "3.0"}, **scope,
    }  # fmt: skip
    await service.app(whole, receive, send)  # type: ignore[arg-type]
    return sent


PART = {"type": "text", "text": "9" * 600_000}
ARGUMENTS = json.dumps({"text": "9" * 1_000_000})
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}

# -- long texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "9" * 1_000_000}),
        ("/v1/completions", {"model": "tiny", "prompt": ["hello", "9" * 1_000_000]}),
        ("/v1/completions", {"model": "tiny", "prompt": [7] * 200_000}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "9" * 600_000}] * 2}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": [PART, PART]}]}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}, CALLS, RESULT]}),
        ("/tokenize", {"prompt": "9" * 1_000_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "9" * 1_000_000}]}),
        ("/detokenize", {"tokens": [7] * 200_000}),
        ("/generate", {"inputs": "9" * 1_000_000}),
        ("/generate", {"inputs": "9" * 1_000_000, "parameters": {"truncate": 5}}),
    ],
)
def test_what_no_context_can_hold_is_refused_without_a_look_at_it(path: str, body: dict[str, Any]) -> None:
    async def test() -> None:
        service = Guarded(gateway={"resume_attempts": 0, "routes": ["tgi"]})
        prompts = service.app.state.gateway.prompts
        prompts.tokenizer = counting = Counting(prompts.tokenizer)
        response = await service.client.post(path, json=body)
        assert response.status_code in (400, 422), response.text
        assert "maximum context length is 256 tokens" in response.text
        if path != "/generate":
            assert response.json()["error"]["code"] == "context_length_exceeded"
        assert counting.characters <= len("hello")
        assert len(response.content) < 1000
        assert service.engine.requests == []

    asyncio.run(test())


def test_no_text_that_fits_is_refused_for_its_length() -> None:
    """Of all texts with so many tokens none is longer than the bound: the longest token, as often as fits."""
    one, rng = tokenizer(), random.Random(2)
    prompts = Prompts(one, None, 10, 64)
    longest = max(range(one.vocab_size), key=lambda i: len(one.token_bytes(i)))
    texts = [one.decode([longest] * 63), one.decode([longest])]
    texts += [one.decode([rng.randrange(one.vocab_size) for _ in range(63)]) for _ in range(50)]
    for text in texts:
        if len(one.encode(text, add_bos=True)) <= 64:
            prompts.check_length(len(text), "prompt")
    assert prompts.max_chars == 64 * longest_token(one) < 64 * 200
    prompts.close()


def test_a_long_text_holds_nobody_up() -> None:
    """While it becomes ids in a thread, the event loop goes round as before."""

    async def test() -> None:
        prompts = Prompts(tokenizer(), None, 10, 10_000)
        text = "1234567890" * 20_000
        assert LONG_TEXT < len(text) < prompts.max_chars

        async def longest_pause(work: Awaitable[Any]) -> tuple[float, float]:
            task, started = asyncio.ensure_future(work), time.monotonic()
            longest, last = 0.0, started
            while not task.done():
                await asyncio.sleep(0.001)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
            assert len(await task) == len(text)
            return longest, time.monotonic() - started

        # Others on the machine may take the processor away from everybody: the best of three.
        pauses = [await longest_pause(prompts.encode(ANONYMOUS, text)) for _ in range(3)]
        assert min(longest / whole for longest, whole in pauses) < 0.25, pauses
        prompts.close()

    asyncio.run(test())


@pytest.mark.parametrize("value", ["7", "[]", "{}", '"a"', "[[[]]]", '{"a":0}', "null"])
def test_a_body_of_millions_of_values_is_refused_before_they_are_made(value: str) -> None:
    async def test() -> None:
        service = Guarded()
        count = 7_900_000 // (len(value) + 1)
        body = ('{"model": "tiny", "prompt": [' + ",".join([value] * count) + "]}").encode()
        started = time.thread_time()
        response = await service.client.post("/v1/completions", content=body)
        assert time.thread_time() - started < 0.3, "of this thread's time, with the client's"
        assert (response.status_code, response.json()["error"]["code"]) == (400, "request_too_large")

    asyncio.run(test())


def test_a_long_body_of_few_values_is_read() -> None:
    async def test() -> None:
        response = await Guarded().client.post("/v1/completions", json={"model": "tiny", "prompt": "a, b. " * 250_000})
        assert response.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(test())


def test_long_texts_leave_no_memory_behind() -> None:
    """Measured on the default model's vocabulary: 200 bytes for each character while it becomes ids."""

    async def test() -> None:
        prompts, text = Prompts(tokenizer(), None, 10, 10_000), "1234567890" * 30_000
        process = psutil.Process()
        await prompts.encode(ANONYMOUS, text)
        before = process.memory_info().rss
        for _ in range(4):
            await asyncio.gather(*(prompts.encode(Tenant(name=name), text) for name in ("a", "b")))
        assert process.memory_info().rss - before < 30e6
        prompts.close()

    asyncio.run(test())


# -- limits -----------------------------------------------------------------------------------------------------------


def test_everything_that_costs_counts(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "small", requests_per_minute=3)

    async def test() -> None:
        service = Guarded(auth={"keys_file": str(file)}, gateway={"resume_attempts": 0, "routes": ["watsonx"]})
        headers = {"Authorization": f"Bearer {key}"}

        async def post(path: str, **body: Any) -> int:
            return (await service.client.post(path, json=body, headers=headers)).status_code

        assert await post("/tokenize", prompt="hi") == 200
        assert await post("/detokenize", tokens=[5]) == 200
        assert await post("/v1/mytoken") == 404
        for path, body in (
            ("/tokenize", {"prompt": "hi"}),
            ("/detokenize", {"tokens": [5]}),
            ("/v1/completions", {"model": "tiny", "prompt": "hi"}),
            ("/v1/mytoken", {}),
            ("/ml/v1/text/tokenization?version=2024-01-01", {"model_id": "tiny", "input": "hi", "project_id": "x"}),
        ):
            assert await post(path, **body) == 429, path

    asyncio.run(test())


def test_text_becomes_ids_however_busy_engines_are() -> None:
    async def test() -> None:
        service = Guarded()
        admission = service.app.state.gateway.admission
        asked = list[str]()
        admission.check = lambda tenant: asked.append(tenant.name)
        await service.client.post("/tokenize", json={"model": "tiny", "prompt": "hi"})
        assert asked == []
        await service.client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"})
        assert asked == ["anonymous"]

    asyncio.run(test())


# -- HTTP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["9" * 4300, "9" * 5000, "0" * 5000 + "9" * 30, "8000001", "9" * 19])
def test_a_length_of_thousands_of_digits_is_too_long(length: str) -> None:
    async def test() -> None:
        service = Guarded()
        sent = await raw(service, [], headers=[(b"content-length", length.encode())])
        assert sent[0]["status"] == 413

    asyncio.run(test())


def test_leading_zeros_say_nothing() -> None:
    async def test() -> None:
        body = b'{"model": "tiny", "prompt": "hi"}'
        headers = [(b"content-length", b"0" * 5000 + str(len(body)).encode())]
        sent = await raw(Guarded(), [{"type": "http.request", "body": body}], headers=headers)
        assert sent[0]["status"] == 499, "its body is read, and then the client is gone"

    asyncio.run(test())


@pytest.mark.parametrize("beginning", [[], [{"type": "http.request", "body": b'{"pro', "more_body": True}]])
def test_a_client_that_leaves_is_no_internal_error(beginning: Messages, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        logging.getLogger("deployments").propagate = True
        with caplog.at_level(logging.DEBUG):
            await raw(Guarded(), beginning)
        assert [r for r in caplog.records if r.exc_info or r.levelno >= logging.WARNING] == []

    asyncio.run(test())


# -- web pages --------------------------------------------------------------------------------------------------------

OWN = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("origin", "host", "allowed", "status"),
    [
        (None, "anything", [], 200),  # no browser
        (OWN, "127.0.0.1:8000", [], 200),  # the page /docs of the service itself
        ("http://localhost:8000", "localhost:8000", [], 200),
        ("http://[::1]:8000", "[::1]:8000", [], 200),
        ("https://evil.example", "127.0.0.1:8000", [], 403),
        ("null", "127.0.0.1:8000", [], 403),
        ("http://evil.example:8000", "evil.example:8000", [], 403),  # a name that its owner points here
        ("http://127.0.0.1:9000", "127.0.0.1:8000", [], 403),
        ("http://127.0.0.1", "127.0.0.1:8000", [], 403),
        ("https://chat.example", "llm.example", ["https://chat.example"], 200),
        ("https://evil.example", "llm.example", ["https://chat.example"], 403),
        ("https://evil.example", "llm.example", ["*"], 200),
        ("http://[bad", "x", [], 403),
    ],
)
def test_pages_of_others_are_refused_where_no_key_is_asked_for(
    origin: str | None, host: str, allowed: list[str], status: int
) -> None:
    async def test() -> None:
        service = Guarded(gateway={"resume_attempts": 0, "allowed_origins": allowed})
        headers = {"Host": host, "Content-Type": "text/plain"} | ({} if origin is None else {"Origin": origin})
        response = await service.client.post(
            "/v1/completions", content=b'{"model": "tiny", "prompt": "hi"}', headers=headers
        )
        assert response.status_code == status
        assert len(service.engine.requests) == (status == 200)

    asyncio.run(test())


def test_a_key_is_enough_whatever_the_page(tmp_path: Path) -> None:
    async def test() -> None:
        key = add_key(tmp_path / "keys", "t")
        service = Guarded(auth={"keys_file": str(tmp_path / "keys")})
        headers = {"Origin": "https://a.example", "Authorization": f"Bearer {key}"}
        response = await service.client.post("/v1/completions", json={"model": "tiny", "prompt": "hi"}, headers=headers)
        assert response.status_code == 200

    asyncio.run(test())


# -- constraints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failure", "status"), [(TOO_DEAR, 400), ("its constraint failed: RuntimeError", 500)])
def test_an_answer_whose_constraint_becomes_too_dear_says_so(failure: str, status: int) -> None:
    async def test() -> None:
        service = Guarded()

        async def generate(request: Request) -> AsyncGenerator[list[TokenEvent], None]:
            yield [TokenEvent(request.request_id, 500, None, None, [], 0)]
            yield [TokenEvent(request.request_id, 0, "error", error=failure)]

        service.engine.generate = generate  # type: ignore[method-assign]
        response = await service.chat()
        assert response.status_code == status
        assert (TOO_DEAR in response.text) == (status == 400)
        assert (TOO_DEAR in (await service.chat(stream=True)).text) == (status == 400)

    asyncio.run(test())

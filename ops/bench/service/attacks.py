"""What one client without scruples does to a service: `python -m ops.bench.service.attacks URL MODEL KIND SECONDS`.

In a process of its own, so that whoever measures what others notice is not slowed by it. Writes one JSON object at the
end: how often each status came, or each way in which no answer came. A key is read from CARAVAN_ABUSE_KEY.
"""

import asyncio
import itertools
import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import urlsplit

import httpx

LONG_TEXT_BYTES, LONG_PROMPT_BYTES = 7_900_000, 1_000_000
FITTING_CHARS, FITTING = 160_000, 8
EXPRESSIONS, DEAR_STREAMS, CONNECTIONS, HALF_BODIES, RESETS = 40, 8, 2_000, 200, 20
# 1 ms a mask at first and beyond any bound after a hundred tokens: what belongs to which side stays open until the end.
DEAR_GRAMMAR = "root ::= [a-z ] root [a-z ]? | [a-z ]"

_numbers = itertools.count()
Counts = Counter[str]
Json = dict[str, object]


class Attacker:
    """One client of a service, until its time is up."""

    def __init__(self, url: str, model: str, seconds: float, key: str = "") -> None:
        self._url, self.model = url, model
        self._key = key
        self._deadline = time.monotonic() + seconds
        self.counts: Counts = Counter()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(300, connect=30),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def run(self, kind: str) -> Counts:
        """One of `ATTACKS`, or "all" of them together."""
        kinds = list(ATTACKS) if kind == "all" else [kind]
        async with self._client:
            await asyncio.gather(*(ATTACKS[one](self) for one in kinds))
        return self.counts

    @property
    def left(self) -> float:
        """Seconds."""
        return self._deadline - time.monotonic()

    async def again(self, work: Callable[[], Awaitable[None]], at_once: int) -> None:
        """So many of these at once, each again as soon as it has ended; what is open at the end is left behind."""

        async def worker() -> None:
            while self.left > 0:
                before = time.monotonic()
                try:
                    await work()
                except (httpx.HTTPError, OSError) as error:
                    self.counts[type(error).__name__] += 1
                if time.monotonic() - before < 0.01:
                    await asyncio.sleep(0.01)  # whoever is refused at once does not become a flood of its own

        workers = [asyncio.create_task(worker()) for _ in range(at_once)]
        _, late = await asyncio.wait(workers, timeout=max(0.1, self.left))
        for task in late:
            task.cancel()
        self.counts["left open"] += len(late)
        await asyncio.gather(*workers, return_exceptions=True)

    async def post(self, path: str, body: Json) -> None:
        response = await self._client.post(f"{self._url}{path}", json={"model": self.model, **body})
        self.counts[str(response.status_code)] += 1

    async def stream(self, body: Json) -> None:
        body = {"model": self.model, "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 1.0, **body}
        async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            broken = False
            async for line in response.aiter_lines():
                broken |= line.startswith('data: {"error"')
        self.counts["ended with an error" if broken else str(response.status_code)] += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._url)
        return await asyncio.open_connection(parts.hostname, parts.port)

    def head(self, *lines: str) -> bytes:
        key = [f"Authorization: Bearer {self._key}"] if self._key else []
        return "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: x", *key, *lines, "", ""]).encode()


async def long_texts(attacker: Attacker) -> None:
    """8 MB to be made token ids, three at once."""
    text = "1234567890" * (LONG_TEXT_BYTES // 10)
    await attacker.again(lambda: attacker.post("/tokenize", {"prompt": text}), 3)


async def long_prompts(attacker: Attacker) -> None:
    """A megabyte of prompt, which no context holds."""
    text = "1234567890" * (LONG_PROMPT_BYTES // 10)
    await attacker.again(lambda: attacker.post("/v1/completions", {"prompt": text}), 3)


async def fitting_texts(attacker: Attacker) -> None:
    """Texts as long as may fit the default model's context, which have to become ids, with all their names."""
    text = "12345 <|im_end|> " * (FITTING_CHARS // 17)
    chat: Json = {"messages": [{"role": "user", "content": text}]}
    names: Json = {"prompt": text, "return_token_strs": True}
    await asyncio.gather(
        attacker.again(lambda: attacker.post("/v1/chat/completions", chat), FITTING // 2),
        attacker.again(lambda: attacker.post("/tokenize", names), FITTING // 2),
    )


async def long_lists(attacker: Attacker) -> None:
    """Millions of numbers where token ids belong."""
    body: Json = {"prompt": [7] * (LONG_TEXT_BYTES // 3)}
    tokens: Json = {"tokens": [7] * (LONG_TEXT_BYTES // 3)}
    await asyncio.gather(
        attacker.again(lambda: attacker.post("/v1/completions", body), 1),
        attacker.again(lambda: attacker.post("/detokenize", tokens), 1),
    )


async def expressions(attacker: Attacker) -> None:
    """Regular expressions that take longer to compile than anybody waits, each another one."""

    def ask() -> Awaitable[None]:
        expression = rf"(\w|\W){{1,{5000 + next(_numbers)}}}"
        return attacker.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "guided_regex": expression})

    await attacker.again(ask, EXPRESSIONS)


async def dear_masks(attacker: Attacker) -> None:
    """Answers whose next token costs more to find out about with each one before it."""
    await attacker.again(lambda: attacker.stream({"prompt": "x", "guided_grammar": DEAR_GRAMMAR}), DEAR_STREAMS)


async def idle_connections(attacker: Attacker) -> None:
    """Connections that say nothing, or half a request line, opened again when they are closed."""

    async def hold() -> None:
        reader, writer = await attacker.connect()
        try:
            if next(_numbers) % 2:
                writer.write(b"POST /v1/comple")
            await reader.read(1)
            attacker.counts["closed by the service"] += 1
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    await attacker.again(hold, CONNECTIONS)


async def half_bodies(attacker: Attacker) -> None:
    """Requests whose bodies never come whole."""

    async def dawdle() -> None:
        reader, writer = await attacker.connect()
        try:
            writer.write(attacker.head("Content-Length: 100000") + b"{" * 1000)
            answer = await reader.read(100)
            attacker.counts[answer.split(b" ")[1].decode() if answer else "closed by the service"] += 1
        finally:
            writer.close()

    await attacker.again(dawdle, HALF_BODIES)


async def resets(attacker: Attacker) -> None:
    """Streams that are broken off by a reset after their first bytes."""
    body = json.dumps({"model": attacker.model, "prompt": "x", "max_tokens": 200, "stream": True}).encode()

    async def leave() -> None:
        reader, writer = await attacker.connect()
        writer.write(attacker.head(f"Content-Length: {len(body)}") + body)
        await reader.read(100)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        attacker.counts["reset"] += 1
        await asyncio.sleep(0.2)

    await attacker.again(leave, RESETS)


ATTACKS: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    "long-texts": long_texts,
    "long-prompts": long_prompts,
    "fitting-texts": fitting_texts,
    "long-lists": long_lists,
    "expressions": expressions,
    "dear-masks": dear_masks,
    "idle-connections": idle_connections,
    "half-bodies": half_bodies,
    "resets": resets,
}


def main() -> None:
    url, model, kind, seconds = sys.argv[1:]
    attacker = Attacker(url, model, float(seconds), os.environ.get("CARAVAN_ABUSE_KEY", ""))
    print(json.dumps(asyncio.run(attacker.run(kind))), flush=True)
    os._exit(0)  # thousands of half-open connections are for the kernel to end


if __name__ == "__main__":
    main()

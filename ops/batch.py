"""A list of requests, sent as fast as the service takes them, behind those of people who wait: `caravan batch`.

Lines are OpenAI's of batches, in and out. What has been answered stands in the output, so that a list that was cut goes
on where it was. A request that the service puts off is sent again when it says; one that is wrong is answered once.
"""

import asyncio
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx

Json = dict[str, Any]

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
PRIORITY = 100  # a lower one goes first; requests have 0 unless they say otherwise
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
PUT_OFF = frozenset({408, 409, 429})  # and all from 500 on
TIMEOUT = httpx.Timeout(3600.0, connect=10.0)


class BatchError(ValueError):
    """The list or its output cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a list is sent."""

    url: str
    key: str | None = None
    at_once: int = 32  # requests
    tries: int = 10  # of one request
    in_order: bool = False  # results stand in the order of requests, not as they come


@dataclass(slots=True)
class Summary:
    """What became of a list."""

    answered: int = 0
    earlier: int = 0  # that an earlier run has answered
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by kind: a status with its code, or what went wrong


def read_requests(path: Path) -> list[Json]:
    """The lines of a list. Raises `BatchError` that names the line."""
    requests: list[Json] = []
    seen = set[str]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise BatchError(f"{path}:{number}: is not JSON: {error}") from None
        problem = _problem(request)
        if problem is not None:
            raise BatchError(f"{path}:{number}: {problem}")
        if request["custom_id"] in seen:
            raise BatchError(f"{path}:{number}: the custom_id {request['custom_id']} stands there twice")
        seen.add(request["custom_id"])
        requests.append(request)
    return requests


def _problem(request: Any) -> str | None:
    if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
        return "must be an object with a custom_id"
    if request.get("method", "POST") != "POST" or request.get("url") not in PATHS:
        return f"method must be POST and url one of {', '.join(sorted(PATHS))}"
    if not isinstance(request.get("body"), dict):
        return "body must be an object"
    return "stream must not be true: results are whole" if request["body"].get("stream") else None


def take_up(path: Path) -> set[str]:
    """The requests that need not be sent again. What was put off to the end, or half written, leaves the output."""
    if not path.exists():
        return set()
    kept: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue  # cut in the middle
        if result["response"] is not None and not _is_put_off(result["response"]["status_code"]):
            kept[result["custom_id"]] = line
    new = path.with_name(f"{path.name}.new")
    new.write_text("".join(f"{line}\n" for line in kept.values()), "utf-8")
    os.replace(new, path)
    return set(kept)


async def run(
    requests: list[Json], output: Path, options: Options, progress: Callable[[Summary], None] = lambda _: None
) -> Summary:
    """Send every request that `output` has no answer to. `progress` is called after each."""
    done = take_up(output)
    summary = Summary(earlier=len(done))
    waiting = iter([request for request in requests if request["custom_id"] not in done])
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    limits = httpx.Limits(max_connections=options.at_once)
    with output.open("a", encoding="utf-8") as file:
        async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=TIMEOUT, limits=limits) as client:
            writer = _Writer(file, options.in_order)
            sender = _Sender(client, options, summary)
            jobs = enumerate(waiting)

            async def work() -> None:
                for place, request in jobs:
                    result = await sender.result(request)
                    _count(result, summary)
                    writer.write(place, result)
                    progress(summary)

            async with asyncio.TaskGroup() as group:
                for _ in range(options.at_once):
                    group.create_task(work())
    return summary


class _Writer:
    """Results as lines, each written at once or when it is its turn."""

    def __init__(self, file: TextIO, in_order: bool) -> None:
        self._file, self._in_order = file, in_order
        self._held: dict[int, Json] = {}
        self._next = 0

    def write(self, place: int, result: Json) -> None:
        self._held[place] = result
        for ready in self._ready(place):
            self._file.write(json.dumps(ready, ensure_ascii=False) + "\n")
        self._file.flush()

    def _ready(self, place: int) -> Iterator[Json]:
        if not self._in_order:
            yield self._held.pop(place)
            return
        while self._next in self._held:
            yield self._held.pop(self._next)
            self._next += 1


class _Sender:
    """One request at a time to its end, however often it is put off."""

    def __init__(self, client: httpx.AsyncClient, options: Options, summary: Summary) -> None:
        self._client, self._tries, self._summary = client, options.tries, summary

    async def result(self, request: Json) -> Json:
        body = {"priority": PRIORITY, **request["body"]}
        identity = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": request["custom_id"]}
        response: Json | None = None
        error: Json | None = None
        for attempt in range(self._tries):
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            try:
                answer = await self._client.post(request["url"], json=body)
            except httpx.TransportError as problem:
                response, error = None, {"code": type(problem).__name__, "message": str(problem)}
            else:
                response, error = _response(answer), None
                if not _is_put_off(answer.status_code) or answer.headers.get("x-should-retry") == "false":
                    break
                pause = _retry_after(answer, pause)
            if attempt < self._tries - 1:
                self._summary.retries += 1
                await asyncio.sleep(pause)
        return {**identity, "response": response, "error": error}


def _response(answer: httpx.Response) -> Json:
    try:
        body = answer.json()
    except ValueError:
        body = answer.text
    return {"status_code": answer.status_code, "request_id": answer.headers.get("x-request-id"), "body": body}


def _is_put_off(status: int) -> bool:
    return status in PUT_OFF or status >= 500


def _retry_after(answer: httpx.Response, pause: float) -> float:
    """Seconds, as the service says; never sooner."""
    said = answer.headers.get("retry-after", "")
    return float(said) if said.isdecimal() else pause


def _count(result: Json, summary: Summary) -> None:
    response, error = result["response"], result["error"]
    if response is None:
        summary.failures[error["code"]] += 1
    elif response["status_code"] != 200:
        body = response["body"]
        said = body.get("error", {}) if isinstance(body, dict) else {}
        summary.failures[f"{response['status_code']} {said.get('code') or said.get('param') or ''}".strip()] += 1
    else:
        summary.answered += 1
        usage = response["body"].get("usage") or {}
        summary.prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        summary.completion_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))

"""`caravan chat`: talk to a running endpoint from the terminal."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

Message = dict[str, str]


class ChatFailed(Exception):
    """The endpoint could not answer; the message says why in plain words."""


def stream_chat(url: str, model: str, messages: list[Message], **options: Any) -> Iterator[str]:
    """The answer, piece by piece. Raises `ChatFailed`."""
    body = {"model": model, "messages": messages, "stream": True, **options}
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(600, connect=5)) as r:
            if r.status_code != 200:
                r.read()
                raise ChatFailed(error_message(r))
            done = False
            for line in r.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise ChatFailed(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or ""
            if not done:
                raise ChatFailed("the answer was cut off: the server closed the connection")
    except httpx.HTTPError as error:
        raise ChatFailed(f"{url} does not answer ({error}): is it running, and is --url right?") from error


def served_model(url: str) -> str:
    """The first model the endpoint has. Raises `ChatFailed`."""
    try:
        response = httpx.get(f"{url}/v1/models", timeout=10)
    except httpx.HTTPError as error:
        raise ChatFailed(f"{url} does not answer ({error}): is it running, and is --url right?") from error
    if response.status_code != 200:
        raise ChatFailed(error_message(response))
    return str(response.json()["data"][0]["id"])


def error_message(response: httpx.Response) -> str:
    """The message in OpenAI's error form, or the status."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"

"""The JSON and the events of /v1/responses. The whole response is what its events add up to."""

import secrets
import time
from typing import Any

import msgspec

from deployments.errors import ApiError
from deployments.gateway.accounting import Usage
from deployments.gateway.exchange import Json
from deployments.gateway.pieces import Piece, TokenLogprob
from deployments.routes.openai_formats import call_id
from deployments.routes.responses_protocol import ResponsesRequest
from model.text.tool_calls import CallDelta


class ResponsesFormat:
    """One response: items of output, of which the last one may be open, and events numbered from 0."""

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self._request = request
        self._number = 0
        self._output: list[Json] = []
        self._open = False  # whether the last item is still growing
        self._logprobs: list[Json] = []  # of the open message
        self._untold: list[Json] = []  # of tokens whose text has not come yet
        self._cut = False
        self._response: Json = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": (request.text.format if request.text is not None else None) or {"type": "text"}},
            "tool_choice": "auto" if request.tool_choice is None else request.tool_choice,
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        for piece in pieces:
            self.chunk(piece, usage)
        return self._ended(usage)

    def opening(self) -> bytes:
        response = {"response": {**self._response, "output": []}}
        return self._event("response.created", response) + self._event("response.in_progress", response)

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        self._untold += map(_logprob, piece.logprobs)
        events = self._text(piece) if piece.text else b""
        for call in piece.calls:
            events += self._call(call)
        if piece.finish_reason is not None:
            self._cut = piece.finish_reason == "length"
            events += b"" if self._output else self._begin_message()
            events += self._close()
        return events

    def closing(self, usage: Usage) -> bytes:
        response = self._ended(usage)
        return self._event(f"response.{response['status']}", {"response": response})

    def broken(self, error: ApiError) -> bytes:
        said = error.body["error"]
        failure = {"code": said["code"] or "server_error", "message": said["message"]}
        response = {**self._response, "status": "failed", "error": failure, "output": self._output}
        return self._event("response.failed", {"response": response})

    def _ended(self, usage: Usage) -> Json:
        """A message or a call that was cut by the budget is part of an incomplete response."""
        details = {"reason": "max_output_tokens"} if self._cut else None
        status = "incomplete" if self._cut else "completed"
        ended = {"status": status, "incomplete_details": details, "output": self._output, "usage": _usage(usage)}
        return {**self._response, **ended, "completed_at": int(time.time())}

    # -- items --------------------------------------------------------------------------------------------------------

    def _begin(self, item: Json) -> bytes:
        events = self._close()
        self._output.append(item)
        self._open = True
        return events + self._event("response.output_item.added", {"item": item, "output_index": self._place})

    def _begin_message(self) -> bytes:
        identity = f"msg_{secrets.token_hex(24)}"
        item: Json = {"id": identity, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        events = self._begin(item)
        part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        self._logprobs = part["logprobs"]
        return events + self._event("response.content_part.added", {**self._in_text(), "part": part})

    def _text(self, piece: Piece) -> bytes:
        events = b"" if self._open and self._item["type"] == "message" else self._begin_message()
        logprobs, self._untold = self._untold, []
        self._item["content"][0]["text"] += piece.text
        self._logprobs += logprobs
        delta = {**self._in_text(), "delta": piece.text, "logprobs": logprobs}
        return events + self._event("response.output_text.delta", delta)

    def _call(self, call: CallDelta) -> bytes:
        if call.name is not None:
            item = {"id": f"fc_{secrets.token_hex(24)}", "type": "function_call", "status": "in_progress"}
            return self._begin({**item, "call_id": call_id(), "name": call.name, "arguments": ""})
        self._item["arguments"] += call.arguments
        return self._event("response.function_call_arguments.delta", {**self._in_item(), "delta": call.arguments})

    def _close(self) -> bytes:
        """End the item that is open, if one is."""
        if not self._open:
            return b""
        self._open = False
        item = self._item
        item["status"] = "incomplete" if self._cut else "completed"
        if item["type"] == "message":
            (part,) = item["content"]
            done = {**self._in_text(), "text": part["text"], "logprobs": part["logprobs"]}
            events = self._event("response.output_text.done", done)
            events += self._event("response.content_part.done", {**self._in_text(), "part": part})
        else:
            done = {**self._in_item(), "name": item["name"], "arguments": item["arguments"]}
            events = self._event("response.function_call_arguments.done", done)
        return events + self._event("response.output_item.done", {"item": item, "output_index": self._place})

    @property
    def _item(self) -> Json:
        return self._output[-1]

    @property
    def _place(self) -> int:
        return len(self._output) - 1

    def _in_item(self) -> Json:
        return {"item_id": self._item["id"], "output_index": self._place}

    def _in_text(self) -> Json:
        return {**self._in_item(), "content_index": 0}

    def _event(self, kind: str, body: Json) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **body}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _logprob(x: TokenLogprob) -> Json:
    def entry(y: TokenLogprob) -> Json:
        return {"token": y.token.decode("utf-8", "replace"), "logprob": y.logprob, "bytes": list(y.token)}

    top: list[Any] = [entry(t) for t in x.top]
    return {**entry(x), "top_logprobs": top}

"""The JSON of OpenAI's two endpoints. The whole answer is the stream, folded."""

import time
from typing import Any, Protocol

from deployments.text import Piece, TokenLogprob

Json = dict[str, Any]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Format(Protocol):
    """How one endpoint writes its answers."""

    def opening(self) -> Json | None:
        """A chunk to send before any text, or None."""
        ...

    def chunk(self, piece: Piece) -> Json: ...
    def usage_chunk(self, usage: Json) -> Json: ...
    def whole(self, pieces: list[Piece], usage: Json) -> Json: ...


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, response_id: str, model: str, with_usage: bool) -> None:
        self._head = {"id": response_id, "created": int(time.time()), "model": model, "system_fingerprint": None}
        self._tail: Json = {"usage": None} if with_usage else {}

    def opening(self) -> Json:
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        return self._chunk(delta, self._logprobs(piece.logprobs), piece.finish_reason)

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, pieces: list[Piece], usage: Json) -> Json:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
            "logprobs": self._logprobs([x for p in pieces for x in p.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def _chunk(self, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **self._tail}

    @staticmethod
    def _logprobs(logprobs: list[TokenLogprob]) -> Json | None:
        def entry(token: bytes, logprob: float) -> Json:
            return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

        content = [{**entry(x.token, x.logprob), "top_logprobs": [entry(*t) for t in x.top]} for x in logprobs]
        return {"content": content, "refusal": None} if content else None


class CompletionFormat:
    """text_completion, streamed or whole."""

    def __init__(self, response_id: str, model: str, with_usage: bool) -> None:
        self._head = {
            "id": response_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._tail: Json = {"usage": None} if with_usage else {}
        self._offset = 0

    def opening(self) -> None:
        return None

    def chunk(self, piece: Piece) -> Json:
        return {**self._head, "choices": [self._choice([piece])], **self._tail}

    def usage_chunk(self, usage: Json) -> Json:
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, pieces: list[Piece], usage: Json) -> Json:
        return {**self._head, "choices": [self._choice(pieces)], "usage": usage}

    def _choice(self, pieces: list[Piece]) -> Json:
        return {
            "index": 0,
            "text": "".join(p.text for p in pieces),
            "logprobs": self._logprobs([x for p in pieces for x in p.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json | None:
        if not logprobs:
            return None
        tokens = [x.token.decode("utf-8", "replace") for x in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [x.logprob for x in logprobs],
            "top_logprobs": [{t.decode("utf-8", "replace"): value for t, value in x.top} for x in logprobs],
            "text_offset": offsets,
        }

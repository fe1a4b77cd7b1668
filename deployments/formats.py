"""The JSON of OpenAI's two endpoints. The whole answer is the stream, folded."""

import time

from deployments.errors import ApiError
from deployments.exchange import Json, sse
from deployments.gateway import Usage
from deployments.text import Piece, TokenLogprob

DONE = b"data: [DONE]\n\n"


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class OpenAIFormat:
    """What both endpoints share: the head of every object, and usage in the last one of a stream if asked for."""

    def __init__(self, response_id: str, kind: str, model: str, with_usage: bool) -> None:
        self._head: Json = {
            "id": response_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }
        self._with_usage = with_usage

    def _sse(self, choice: Json) -> bytes:
        return sse({**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})})

    def closing(self, usage: Usage) -> bytes:
        last = sse({**self._head, "choices": [], "usage": usage_json(usage)}) if self._with_usage else b""
        return last + DONE

    def broken(self, error: ApiError) -> bytes:
        return sse(error.body)


class ChatFormat(OpenAIFormat):
    """chat.completion and chat.completion.chunk."""

    def __init__(self, response_id: str, model: str, with_usage: bool) -> None:
        super().__init__(response_id, "chat.completion.chunk", model, with_usage)

    def opening(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunk(self, piece: Piece) -> bytes:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        return self._chunk(delta, self._logprobs(piece.logprobs), piece.finish_reason)

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
            "logprobs": self._logprobs([x for p in pieces for x in p.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage_json(usage)}

    def _chunk(self, delta: Json, logprobs: Json | None, finish_reason: str | None) -> bytes:
        return self._sse({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason})

    @staticmethod
    def _logprobs(logprobs: list[TokenLogprob]) -> Json | None:
        def entry(x: TokenLogprob) -> Json:
            return {"token": x.token.decode("utf-8", "replace"), "logprob": x.logprob, "bytes": list(x.token)}

        content = [{**entry(x), "top_logprobs": [entry(t) for t in x.top]} for x in logprobs]
        return {"content": content, "refusal": None} if content else None


class CompletionFormat(OpenAIFormat):
    """text_completion, streamed or whole."""

    def __init__(self, response_id: str, model: str, with_usage: bool) -> None:
        super().__init__(response_id, "text_completion", model, with_usage)
        self._offset = 0

    def opening(self) -> bytes:
        return b""

    def chunk(self, piece: Piece) -> bytes:
        return self._sse(self._choice([piece]))

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        return {**self._head, "choices": [self._choice(pieces)], "usage": usage_json(usage)}

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
            "top_logprobs": [{t.token.decode("utf-8", "replace"): t.logprob for t in x.top} for x in logprobs],
            "text_offset": offsets,
        }

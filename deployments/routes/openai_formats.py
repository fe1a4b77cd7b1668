"""The JSON of OpenAI's two endpoints. The whole answer is the stream, folded."""

import time
from dataclasses import dataclass

from deployments.errors import ApiError
from deployments.gateway.accounting import Usage
from deployments.gateway.exchange import Json, sse
from deployments.gateway.pieces import Piece, TokenLogprob

DONE = b"data: [DONE]\n\n"


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every object of one answer begins with, and how often a stream tells the usage."""

    response_id: str
    model: str
    fingerprint: str
    usage: bool = False  # in a last chunk of its own
    continuous_usage: bool = False  # so far, in every chunk


class OpenAIFormat:
    """What both endpoints share."""

    def __init__(self, head: Head, kind: str) -> None:
        self._head: Json = {
            "id": head.response_id,
            "object": kind,
            "created": int(time.time()),
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._usage, self._continuous = head.usage, head.continuous_usage

    def _sse(self, choice: Json, usage: Usage | None) -> bytes:
        shown: Json = {}
        if self._continuous and usage is not None:
            shown = {"usage": usage_json(usage)}
        elif self._usage:
            shown = {"usage": None}
        return sse({**self._head, "choices": [choice], **shown})

    def closing(self, usage: Usage) -> bytes:
        last = sse({**self._head, "choices": [], "usage": usage_json(usage)}) if self._usage else b""
        return last + DONE

    def broken(self, error: ApiError) -> bytes:
        return sse(error.body)


class ChatFormat(OpenAIFormat):
    """chat.completion and chat.completion.chunk, with `answers` choices."""

    def __init__(self, head: Head, answers: int = 1) -> None:
        super().__init__(head, "chat.completion.chunk")
        self._answers = answers

    def opening(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(i, role, None, None, None) for i in range(self._answers))

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        return self._chunk(piece.index, delta, self._logprobs(piece.logprobs), piece.finish_reason, usage)

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        choices = [self._choice(i, own) for i, own in enumerate(by_answer(pieces, self._answers))]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_json(usage)}

    def _choice(self, index: int, pieces: list[Piece]) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
            "logprobs": self._logprobs([x for p in pieces for x in p.logprobs]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _chunk(
        self, index: int, delta: Json, logprobs: Json | None, finish_reason: str | None, usage: Usage | None
    ) -> bytes:
        return self._sse({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}, usage)

    @staticmethod
    def _logprobs(logprobs: list[TokenLogprob]) -> Json | None:
        def entry(x: TokenLogprob) -> Json:
            return {"token": x.token.decode("utf-8", "replace"), "logprob": x.logprob, "bytes": list(x.token)}

        content = [{**entry(x), "top_logprobs": [entry(t) for t in x.top]} for x in logprobs]
        return {"content": content, "refusal": None} if content else None


class CompletionFormat(OpenAIFormat):
    """text_completion, streamed or whole. To each prompt there are `best_of` answers, of which the best `n` are shown.

    `echoes` are the prompts' texts where they are to be shown, else "".
    """

    def __init__(self, head: Head, echoes: list[str], n: int = 1, best_of: int = 1, logprobs: bool = True) -> None:
        super().__init__(head, "text_completion")
        self._n, self._best_of, self._with_logprobs = n, best_of, logprobs
        self._echoes = echoes
        self._offsets: dict[int, int] = {}  # by choice, of its next token; a choice that has one has begun

    def opening(self) -> bytes:
        return b""

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        return self._sse(self._choice(piece.index, [piece]), usage)

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        answers = by_answer(pieces, len(self._echoes) * self._best_of)
        prompts = [answers[i : i + self._best_of] for i in range(0, len(answers), self._best_of)]
        shown = [answer for candidates in prompts for answer in best(candidates, self._n)]
        choices = [self._choice(i, answer) for i, answer in enumerate(shown)]
        return {**self._head, "choices": choices, "usage": usage_json(usage)}

    def _choice(self, index: int, pieces: list[Piece]) -> Json:
        echo = "" if index in self._offsets else self._echoes[index // self._n]
        self._offsets.setdefault(index, 0)
        logprobs = [x for p in pieces for x in (*p.prompt_logprobs, *p.logprobs)]
        return {
            "index": index,
            "text": echo + "".join(p.text for p in pieces),
            "logprobs": self._logprobs(index, logprobs) if self._with_logprobs and logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> Json:
        offsets = []
        for x in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(x.text)
        return {
            "tokens": [label(x) for x in logprobs],
            "token_logprobs": [x.logprob for x in logprobs],
            "top_logprobs": [self._top(x) for x in logprobs],
            "text_offset": offsets,
        }

    @staticmethod
    def _top(x: TokenLogprob) -> dict[str, float | None] | None:
        """The token's own is always there, as OpenAI has it, though it may not be among the best."""
        if x.logprob is None:
            return None
        return {label(t): t.logprob for t in x.top} | {label(x): x.logprob}


def label(x: TokenLogprob) -> str:
    r"""A token as a string, in OpenAI's way: bytes that are no text by themselves as `bytes:\xe2\x80`."""
    try:
        return x.token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in x.token)


def by_answer(pieces: list[Piece], answers: int) -> list[list[Piece]]:
    """The pieces of each answer."""
    found: list[list[Piece]] = [[] for _ in range(answers)]
    for piece in pieces:
        found[piece.index].append(piece)
    return found


def best(candidates: list[list[Piece]], n: int) -> list[list[Piece]]:
    """The `n` with the highest log probability per token (OpenAI's `best_of`), best first; all in order if all stay."""
    return sorted(candidates, key=_mean_logprob, reverse=True)[:n] if n < len(candidates) else candidates


def _mean_logprob(pieces: list[Piece]) -> float:
    """A stop token counts: it is one of the tokens that were drawn."""
    drawn = [x for p in pieces for x in (*p.logprobs, *([p.stop_token] if p.stop_token else []))]
    values = [x.logprob for x in drawn if x.logprob is not None]
    return sum(values) / len(values) if values else float("-inf")

"""The JSON of OpenAI's two endpoints. The whole answer is the stream, folded."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.errors import ApiError
from deployments.gateway.accounting import Usage
from deployments.gateway.exchange import Json, sse
from deployments.gateway.pieces import Piece, TokenLogprob
from deployments.routes.openai_tools import ToolUse
from model.text.tool_calls import CallDelta

DONE = b"data: [DONE]\n\n"


def usage_json(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"accepted_prediction_tokens": usage.accepted_tokens},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every object of one answer begins with, and how often a stream tells the usage."""

    response_id: str
    model: str
    fingerprint: str
    usage: bool = False  # in a last chunk of its own
    continuous_usage: bool = False  # so far, in every chunk
    token_ids: bool = False  # whether the ids of prompt and answer are told
    ids_as_tokens: bool = False  # tokens are named by their ids in log probabilities


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
        self._ids, self._ids_as_tokens = head.token_ids, head.ids_as_tokens

    def _sse(self, choice: Json, usage: Usage | None, more: Json | None = None) -> bytes:
        shown: Json = {}
        if self._continuous and usage is not None:
            shown = {"usage": usage_json(usage)}
        elif self._usage:
            shown = {"usage": None}
        return sse({**self._head, "choices": [choice], **shown, **(more or {})})

    def closing(self, usage: Usage) -> bytes:
        last = sse({**self._head, "choices": [], "usage": usage_json(usage)}) if self._usage else b""
        return last + DONE

    def broken(self, error: ApiError) -> bytes:
        return sse(error.body)


class ChatFormat(OpenAIFormat):
    """chat.completion and chat.completion.chunk, with `answers` choices, which may call the functions of `use`."""

    def __init__(self, head: Head, prompt: list[int], answers: int = 1, use: ToolUse | None = None) -> None:
        super().__init__(head, "chat.completion.chunk")
        self._answers, self._use = answers, use
        self._prompt = {"prompt_token_ids": prompt} if self._ids else {}
        self._called: set[int] = set()  # choices of a stream in which a function has been called

    def opening(self) -> bytes:
        role = {"role": "assistant", "content": None if self._use is not None and self._use.required else ""}
        return b"".join(self._chunk(i, role, None, None, None) for i in range(self._answers))

    def chunk(self, piece: Piece, usage: Usage) -> bytes:
        """Of a call first its id and name, in events of their own, then its arguments."""
        finish = piece.finish_reason
        deltas: list[Json] = [{"content": piece.text}] if piece.text or not (finish or piece.calls) else []
        deltas += [self._call_delta(call) for call in piece.calls]
        deltas += [{}] if finish and (piece.calls or not deltas) else []
        self._called |= {piece.index} if piece.calls else set()
        last = len(deltas) - 1
        events = []
        for i, delta in enumerate(deltas):
            logprobs, ids = (piece.logprobs, piece.token_ids) if i == 0 else ([], [])
            reason = self._finish(piece.index in self._called, finish) if i == last else None
            told = usage if i == last else None
            events.append(self._chunk(piece.index, delta, self._logprobs(logprobs), reason, told, ids))
        return b"".join(events)

    def whole(self, pieces: list[Piece], usage: Usage) -> Json:
        choices = [self._choice(i, own) for i, own in enumerate(by_answer(pieces, self._answers))]
        found = {**self._head, "object": "chat.completion", "choices": choices, "usage": usage_json(usage)}
        return found | self._prompt

    def _choice(self, index: int, pieces: list[Piece]) -> Json:
        text = "".join(p.text for p in pieces)
        calls = called_functions(pieces)
        message: Json = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls and self._use is not None and self._use.legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs([x for p in pieces for x in p.logprobs]),
            "finish_reason": self._finish(bool(calls), pieces[-1].finish_reason),
            **({"token_ids": [i for p in pieces for i in p.token_ids]} if self._ids else {}),
        }

    def _call_delta(self, call: CallDelta) -> Json:
        function: Json = {"arguments": call.arguments}
        if call.name is not None:
            function = {"name": call.name, "arguments": ""}
        if self._use is not None and self._use.legacy:
            return {"function_call": function}
        begun = {"id": call_id(), "type": "function"} if call.name is not None else {}
        return {"tool_calls": [{"index": call.index, **begun, "function": function}]}

    def _finish(self, called: bool, reason: str | None) -> str | None:
        if not called or reason != "stop":
            return reason
        return "function_call" if self._use is not None and self._use.legacy else "tool_calls"

    def _chunk(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None,
        finish_reason: str | None,
        usage: Usage | None,
        token_ids: Sequence[int] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if not self._ids:
            return self._sse(choice, usage)
        prompt, self._prompt = self._prompt, {}  # in the first chunk alone
        return self._sse(choice | ({"token_ids": token_ids} if token_ids else {}), usage, prompt)

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json | None:
        def entry(x: TokenLogprob) -> Json:
            name = f"token_id:{x.token_id}" if self._ids_as_tokens else x.token.decode("utf-8", "replace")
            return {"token": name, "logprob": x.logprob, "bytes": list(x.token)}

        content = [{**entry(x), "top_logprobs": [entry(t) for t in x.top]} for x in logprobs]
        return {"content": content, "refusal": None} if content else None


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def called_functions(pieces: list[Piece]) -> list[Json]:
    """The calls of one answer, each with an id."""
    calls: list[Json] = []
    for delta in (call for piece in pieces for call in piece.calls):
        if delta.name is not None:
            calls.append({"id": call_id(), "type": "function", "function": {"name": delta.name, "arguments": ""}})
        calls[delta.index]["function"]["arguments"] += delta.arguments
    return calls


class CompletionFormat(OpenAIFormat):
    """text_completion, streamed or whole. To each prompt there are `best_of` answers, of which the best `n` are shown.

    `echoes` are the prompts' texts where they are to be shown, else "".
    """

    def __init__(
        self,
        head: Head,
        prompts: list[list[int]],
        echoes: list[str],
        n: int = 1,
        best_of: int = 1,
        logprobs: bool = True,
    ) -> None:
        super().__init__(head, "text_completion")
        self._prompts = prompts
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
        begins = index not in self._offsets
        echo = self._echoes[index // self._n] if begins else ""
        self._offsets.setdefault(index, 0)
        ids: Json = {"token_ids": [i for p in pieces for i in p.token_ids]} if self._ids else {}
        if self._ids and begins:
            ids["prompt_token_ids"] = self._prompts[index // self._n]
        logprobs = [x for p in pieces for x in (*p.prompt_logprobs, *p.logprobs)]
        return {
            "index": index,
            "text": echo + "".join(p.text for p in pieces),
            "logprobs": self._logprobs(index, logprobs) if self._with_logprobs and logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
            **ids,
        }

    def _label(self, x: TokenLogprob) -> str:
        return f"token_id:{x.token_id}" if self._ids_as_tokens else label(x)

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> Json:
        offsets = []
        for x in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(x.text)
        return {
            "tokens": [self._label(x) for x in logprobs],
            "token_logprobs": [x.logprob for x in logprobs],
            "top_logprobs": [self._top(x) for x in logprobs],
            "text_offset": offsets,
        }

    def _top(self, x: TokenLogprob) -> dict[str, float | None] | None:
        """The token's own is always there, as OpenAI has it, though it may not be among the best."""
        if x.logprob is None:
            return None
        return {self._label(t): t.logprob for t in x.top} | {self._label(x): x.logprob}


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

"""From token events to the text a client sees: whole characters, and nothing from a stop string on."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.sequence import TokenEvent
from model.tokenizer import Detokenizer, Tokenizer, padded_bytes


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces; holds back what may be the beginning of one.

    The stop string itself is shown only with `include`.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of all text so far that is safe to show and was not shown before."""
        text = self._held + text
        found = min(((at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            at, self.matched = found
            self._held = ""
            return text[: at + len(self.matched) if self._include else at]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token, and its likeliest alternatives."""

    token_id: int
    token: bytes
    logprob: float
    text: str = ""  # what it adds to the answer before stop strings are looked for; "" until a character is whole
    top: list["TokenLogprob"] = field(default_factory=list)


@dataclass(slots=True)
class Piece:
    """What one or more tokens add to the answer."""

    text: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str | None = None  # that ended the answer
    stop_token: TokenLogprob | None = None  # that ended the answer, if logprobs were asked for


async def pieces(
    events: AsyncGenerator[list[TokenEvent], None],
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    stops: Sequence[str],
    include_stop: bool = False,
) -> AsyncGenerator[Piece, None]:
    """One piece per message of the engine; the last one has a finish_reason. Closing it cancels the request."""
    matcher = StopMatcher(stops, include=include_stop)
    try:
        async for batch in events:
            piece = Piece(num_tokens=len(batch), num_cached_tokens=batch[0].num_cached_tokens)
            for event in batch:
                if matcher.matched is None:
                    _add(piece, event, tokenizer, detokenizer, matcher)
            yield piece
            if piece.finish_reason is not None:
                return
    finally:
        await events.aclose()


def _add(piece: Piece, event: TokenEvent, tokenizer: Tokenizer, detokenizer: Detokenizer, matcher: StopMatcher) -> None:
    if event.finish_reason == "stop":  # a stop token ends the answer and is no part of it
        piece.stop_token = _logprob(event, tokenizer, "")
    else:
        text = detokenizer.push(event.token_id)
        piece.text += matcher.push(text)
        if (logprob := _logprob(event, tokenizer, text)) is not None:
            piece.logprobs.append(logprob)
    piece.finish_reason = event.finish_reason
    if event.finish_reason is not None and matcher.matched is None:
        piece.text += matcher.push(detokenizer.finish())
        piece.text += matcher.finish()
    if matcher.matched is not None:
        piece.finish_reason, piece.stop_string = "stop", matcher.matched


def _logprob(event: TokenEvent, tokenizer: Tokenizer, text: str) -> TokenLogprob | None:
    if event.logprob is None:
        return None
    top = [TokenLogprob(i, padded_bytes(tokenizer, i), value) for i, value in event.top_logprobs or []]
    return TokenLogprob(event.token_id, padded_bytes(tokenizer, event.token_id), event.logprob, text, top)

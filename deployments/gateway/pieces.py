"""From token events to the text a client sees: whole characters, and nothing from a stop string on."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import CaravanError, RequestFailed, RequestFatal, RequestRejected
from cluster.scheduling.sequence import Start, TokenEvent
from model.batch import TokenLogprobs
from model.text.constraint import TOO_DEAR
from model.text.tokenizer import Detokenizer, Tokenizer, padded_bytes
from model.text.tool_calls import MARKS, CallDelta, CallReader, CallSyntax

AT_ONCE = 64  # logprobs of a prompt that are put into words before others have their turn


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
    token: bytes  # see `token_name`
    logprob: float | None  # None: of a prompt's first token, which nothing precedes
    text: str = ""  # what it adds to the answer before stop strings are looked for; "" until a character is whole
    top: list["TokenLogprob"] = field(default_factory=list)


@dataclass(slots=True)
class Piece:
    """What one or more tokens add to an answer."""

    text: str = ""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_accepted_tokens: int = 0  # of num_tokens: they were drafted
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # with the first piece, if asked for
    finish_reason: Literal["stop", "length"] | None = None
    stop_string: str | None = None  # that ended the answer
    stop_token: TokenLogprob | None = None  # that ended the answer, if logprobs were asked for
    index: int = 0  # which of a request's answers it belongs to
    calls: list[CallDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    start: Start | None = None  # with the first piece
    detokenise_s: float = 0.0  # what its text took


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How the tokens of one answer become its text."""

    stops: Sequence[str] = ()
    include_stop: bool = False  # whether the stop string that ends the answer is shown
    min_tokens: int = 0  # stop strings are not looked for in the first so many tokens
    starts_text: bool = False  # see Detokenizer
    prompt_only: bool = False  # the prompt's logprobs are all that is wanted, not the token that comes with them
    calls: CallSyntax | None = None  # how functions are called in it
    control_tokens: bool = False  # whether their names are shown


async def pieces(
    events: AsyncGenerator[list[TokenEvent], None], tokenizer: Tokenizer, prompt: Sequence[int], rules: TextRules
) -> AsyncGenerator[Piece, None]:
    """One piece per message of the engine; the last one has a finish_reason. Closing it cancels the request.

    `prompt` are the ids that the events continue. Raises `RequestFailed`, or `RequestRejected` if it is
    its constraint that cannot go on, beside what `events` raise.
    """
    answer, before = _Answer(tokenizer, rules), _PromptLogprobs(tokenizer, prompt)
    try:
        async for batch in events:
            for event in batch:
                if event.error is not None:
                    raise _failure(event.error, event.is_fatal)
                if event.prompt_logprobs is not None:
                    await before.add(event.prompt_logprobs)
            tokens = [event for event in batch if event.has_token]
            if not tokens:
                continue
            piece = Piece(
                num_tokens=len(tokens),
                num_cached_tokens=tokens[0].num_cached_tokens,
                num_accepted_tokens=sum(event.was_drafted for event in tokens),
                prompt_logprobs=before.take(),
            )
            if rules.prompt_only:
                piece.num_tokens, piece.finish_reason = 0, "length"
            began = time.perf_counter()
            for event in tokens:
                if piece.finish_reason is None:
                    answer.add(piece, event)
            piece.start, piece.detokenise_s = tokens[0].start, time.perf_counter() - began
            yield piece
            if piece.finish_reason is not None:
                return
    finally:
        await events.aclose()


def _failure(error: str, is_fatal: bool) -> CaravanError:
    if is_fatal:
        return RequestFatal(error)
    return RequestRejected(error) if error == TOO_DEAR else RequestFailed(error)


class _Answer:
    """The text of one answer as it grows."""

    def __init__(self, tokenizer: Tokenizer, rules: TextRules) -> None:
        self._tokenizer = tokenizer
        self._min_tokens = rules.min_tokens
        self._detokenizer = Detokenizer(tokenizer, at_start=rules.starts_text)
        self._matcher = StopMatcher(rules.stops, include=rules.include_stop)
        self._reader = CallReader(rules.calls) if rules.calls is not None else None
        shown = tokenizer.control_tokens if rules.control_tokens else MARKS if rules.calls is not None else ()
        self._shown = {i: name for name, i in tokenizer.control_tokens.items() if name in shown}
        self._num_tokens = 0

    def add(self, piece: Piece, event: TokenEvent) -> None:
        self._num_tokens += 1
        piece.token_ids.append(event.token_id)
        if event.finish_reason == "stop":  # a stop token ends the answer and is no part of it
            piece.stop_token = self._logprob(event, "")
        else:
            text = self._shown.get(event.token_id) or self._detokenizer.push(event.token_id)
            self._add_text(piece, text)
            if (logprob := self._logprob(event, text)) is not None:
                piece.logprobs.append(logprob)
        if event.finish_reason is not None and self._matcher.matched is None:
            self._add_text(piece, self._detokenizer.finish(), last=True)
        if self._matcher.matched is not None:
            piece.finish_reason, piece.stop_string = "stop", self._matcher.matched
        elif event.finish_reason is not None:
            piece.text += self._matcher.finish()
            piece.finish_reason = "stop" if event.finish_reason == "stop" else "length"

    def _add_text(self, piece: Piece, text: str, last: bool = False) -> None:
        """Calls are apart from the text, and stop strings are looked for in the text alone."""
        if self._reader is not None:
            text, calls = self._reader.push(text)
            text += self._reader.finish() if last else ""
            piece.calls += calls
        piece.text += self._push(text)

    def _push(self, text: str) -> str:
        return self._matcher.push(text) if self._num_tokens > self._min_tokens else text

    def _logprob(self, event: TokenEvent, text: str) -> TokenLogprob | None:
        if event.logprob is None:
            return None
        found = TokenLogprobs(event.logprob, event.top_logprobs or [])
        return _token_logprob(self._tokenizer, event.token_id, found, text)


class _PromptLogprobs:
    """Of every token of a prompt, in pieces as the engine computes them; nothing precedes the first token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._detokenizer = Detokenizer(tokenizer)
        self._whole: list[TokenLogprob] = []

    async def add(self, found: list[TokenLogprobs]) -> None:
        """Those that follow. Of a long prompt they are many: others have their turns meanwhile."""
        if not self._whole:
            first = self._prompt[0]
            self._whole.append(
                TokenLogprob(first, token_name(self._tokenizer, first), None, self._detokenizer.push(first))
            )
        for start in range(0, len(found), AT_ONCE):
            for one in found[start : start + AT_ONCE]:
                token_id = self._prompt[len(self._whole)]
                text = self._detokenizer.push(token_id)
                self._whole.append(_token_logprob(self._tokenizer, token_id, one, text))
            await asyncio.sleep(0)

    def take(self) -> list[TokenLogprob]:
        """All of them, once."""
        whole, self._whole = self._whole, []
        assert len(whole) in (0, len(self._prompt)), "a prompt's logprobs come before its first token"
        return whole


def _token_logprob(tokenizer: Tokenizer, token_id: int, found: TokenLogprobs, text: str) -> TokenLogprob:
    top = [TokenLogprob(i, token_name(tokenizer, i), value) for i, value in found.top]
    return TokenLogprob(token_id, token_name(tokenizer, token_id), found.chosen, text, top)


def token_name(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token adds to the text; of a control token, which adds nothing, its name."""
    found = padded_bytes(tokenizer, token_id)
    return found or next((k.encode() for k, i in tokenizer.control_tokens.items() if i == token_id), b"")


async def merged(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """The pieces of several answers as they come, each with its stream's index. What one raises ends all of them."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: AsyncGenerator[Piece, None]) -> None:
        try:
            async for piece in stream:
                piece.index = index
                await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

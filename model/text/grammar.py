"""From a constraint to the tokens that may come next, by the xgrammar library.

Compiling may take long and belongs to a thread that may wait. Masks are made in threads of their own, while the batch
that needs them is being computed; a sequence whose masks take long is left out of batches until they are ready, so that
no other sequence waits long for its grammar. What a mask costs shows only as it is made, and may grow with every token:
dear ones are made apart, in turns of those whose they are, by a thread that leaves the processors to everything else.
"""

import json
import logging
import math
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from model.text import json_schema
from model.text.constraint import TOO_DEAR, Constraint
from model.text.tokenizer import Tokenizer
from model.text.tool_calls import MARKS

log = logging.getLogger(__name__)

Bits = npt.NDArray[np.int32]
CACHE_BYTES = 256_000_000  # of compiled grammars
MAX_WHITESPACE = 16  # characters in a row between the parts of a JSON text: a model may not fill the budget with them
MAX_MASK_S = 1.0  # of a processor: a grammar that takes longer for one token is too expensive to be served
DEAR_S = 0.005  # masks that take longer are made apart
DEAR_NICENESS = 15
FORGOTTEN = 0.1  # of what a dear mask says about the next one, with each that is cheaper
MAX_THREADS = 4
LONGEST_SILENCE_S = 0.02  # that a mask waits for others
_LARK_RULE = re.compile(r"^\s*[?!]?\w+(\.\d+)?\s*:", re.MULTILINE)


class Grammars:
    """Compiles constraints for one vocabulary; the newest ones are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import xgrammar  # brings torch and half a second of imports: only where constraints are really used

        self.vocab_size = tokenizer.vocab_size
        vocab = [tokenizer.token_bytes(i) for i in range(self.vocab_size)]
        self._json = _without_control_characters(vocab)
        ends = sorted(tokenizer.eos_ids) or None
        marks = {i: name.encode() for name, i in tokenizer.control_tokens.items() if name in MARKS}

        def compiler(words: list[bytes]) -> Any:
            info = xgrammar.TokenizerInfo(
                words, xgrammar.VocabType.RAW, vocab_size=self.vocab_size, stop_token_ids=ends
            )
            return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)

        self._compiler = compiler(vocab)
        # With calls of functions the names of some control tokens are text.
        named = [marks.get(i, word) for i, word in enumerate(vocab)]
        self._tag_compiler = compiler(named) if marks else self._compiler

    def matcher(self, constraint: Constraint, move_on: "MoveOn", owner: str = "") -> "Matcher":
        """At the beginning, its mask not made yet. Raises `ValueError` as `compile` does."""
        import xgrammar

        found = xgrammar.GrammarMatcher(self.compile(constraint), override_stop_tokens=list(constraint.end_ids))
        allowed = self._json if _holds_strings_of_a_length(constraint) else None
        return Matcher(move_on, found, self.vocab_size, allowed, owner)

    def compile(self, constraint: Constraint) -> Any:
        """Raises `ValueError` that says what is wrong with it, or what of it cannot be guaranteed."""
        try:
            if constraint.kind == "regex":
                return self._compiler.compile_regex(constraint.text)
            if constraint.kind == "grammar":
                lark = _LARK_RULE.search(constraint.text) and "::=" not in constraint.text
                return (self._compiler.compile_lark if lark else self._compiler.compile_grammar)(constraint.text)
            given = json_schema.parsed(constraint.text)
            if constraint.kind == "structural_tag":
                return self._tag_compiler.compile_structural_tag(json.dumps(_prepared(given)))
            schema = json_schema.prepared(given)
            return self._compiler.compile_json_schema(json.dumps(schema), max_whitespace_cnt=MAX_WHITESPACE)
        except ValueError:
            raise
        except Exception as error:  # the library raises RuntimeError with the place in its own source
            raise ValueError(plain(str(error))) from None


def _prepared(tag: Any) -> Any:
    """A structural tag, the JSON schemas in it as the library is to get them. Raises `ValueError`."""
    if isinstance(tag, list):
        return [_prepared(part) for part in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") == "json_schema" and "json_schema" in tag:
        return tag | {"json_schema": json_schema.prepared(tag["json_schema"]), "max_whitespace_cnt": MAX_WHITESPACE}
    return {name: _prepared(part) for name, part in tag.items()}


def _holds_strings_of_a_length(constraint: Constraint) -> bool:
    """Whether the library would let control characters into JSON. Where text is free, it should keep its tabs."""
    return constraint.kind in ("json_schema", "structural_tag") and "Length" in constraint.text


def _without_control_characters(vocab: list[bytes]) -> Bits:
    """[ceil(V / 32)] Tokens that may be part of a JSON text: it has no control characters but ends of lines.

    The library lets others into strings of limited length, which no parser takes.
    """
    refused = set(range(32)) - {10, 13}
    bits = np.array([refused.isdisjoint(word) for word in vocab] + [False] * (-len(vocab) % 32))
    return np.packbits(bits, bitorder="little").view(np.int32)


def plain(message: str) -> str:
    """What the library says, without the time and its own source files."""
    lines = re.sub(r"\[[0-9:]+\] \S+?:\d+: |Check failed: .*? is false: ", "", message).strip().splitlines()
    return lines[0][:500] if lines else "it cannot be compiled"


class Matcher:
    """One sequence's place in its grammar. `mask` is meant for the token after the last one given to `advance`."""

    def __init__(
        self, move_on: "MoveOn", matcher: Any, vocab_size: int, allowed: Bits | None = None, owner: str = ""
    ) -> None:
        import xgrammar

        self.owner = owner  # the tenant whose it is
        self.ready = False
        self.seconds = 0.0  # of a processor that the next mask may take: what the dearest of the last ones did
        self.failure: str | None = None
        self.mask = b""  # bit i: token i may come next
        self._move_on, self._matcher, self._allowed = move_on, matcher, allowed
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)

    def advance(self, token_id: int) -> None:
        """The sequence has one token more: at once, but the mask comes later. For the engine's thread."""
        self.ready = False
        self._move_on(self, token_id)

    def step(self, *token_ids: int) -> None:
        """Take in tokens and make the mask. Whatever goes wrong is noted in `failure`, never raised."""
        try:
            for token_id in token_ids:
                if not self._matcher.accept_token(token_id):
                    raise ValueError(f"token {token_id} does not match")
            began = time.thread_time()
            self._matcher.fill_next_token_bitmask(self._bits)
            bits = self._bits.numpy()
            self.mask = (bits if self._allowed is None else bits & self._allowed).tobytes()
            # Of this thread's time: on a busy machine others take some too, and that says nothing about the grammar.
            seconds = time.thread_time() - began
            self.seconds = max(seconds, self.seconds)
            if math.isfinite(self.seconds):  # else no batch is to wait for it ever again
                self.seconds += FORGOTTEN * (seconds - self.seconds)
            if seconds > MAX_MASK_S:
                raise TooDear
            if not self.mask.strip(b"\0"):
                raise ValueError("no token may come next")
        except TooDear:
            self.mask = b""
            self.failure = TOO_DEAR
        except Exception as error:
            log.exception("a constraint failed")
            self.mask = b""
            self.failure = f"its constraint failed: {type(error).__name__}"


class TooDear(Exception):
    """A mask takes longer than any may."""


MoveOn = Callable[[Matcher, int], None]


class MaskQueue:
    """Matchers that have a token more; whose they are take turns. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: OrderedDict[str, deque[tuple[Matcher, int]]] = OrderedDict()  # next owner first; none is empty
        self._closed = False
        self.unfinished = 0  # put in, and not yet said to be done

    def put(self, matcher: Matcher, token_id: int) -> None:
        with self._changed:
            self._items.setdefault(matcher.owner, deque()).append((matcher, token_id))
            self.unfinished += 1
            self._changed.notify()

    def get(self, timeout: float | None) -> tuple[Matcher, int] | None:
        """The next one; None if none comes in this time, or ever again."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout) or not self._items:
                return None
            owner, items = next(iter(self._items.items()))
            item = items.popleft()
            self._items.move_to_end(owner)
            if not items:
                del self._items[owner]
            return item

    def done(self) -> None:
        with self._changed:
            self.unfinished -= 1

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Whoever waits for more is let go."""
        with self._changed:
            self._items.clear()
            self._closed = True
            self._changed.notify_all()


class Masks:
    """An engine's matchers, and the threads that move them on. `on_ready` is called when masks have become ready.

    The library lets go of the interpreter while it works, so that several threads make masks at once.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], on_ready: Callable[[], None]) -> None:
        self._tokenizer, self._on_ready = tokenizer, on_ready  # loaded with the first constraint
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()  # guards _grammars
        self._cheap, self._dear = MaskQueue(), MaskQueue()
        self._done: list[tuple[float, Matcher]] = []  # made, and when; not ready yet
        self._done_lock = threading.Lock()
        count = max(2, min(MAX_THREADS, os.cpu_count() or 1))
        self._threads = [threading.Thread(target=self._run, name=f"masks-{i}", daemon=True) for i in range(count)]
        self._threads.append(threading.Thread(target=self._run_dear, name="dear-masks", daemon=True))
        for thread in self._threads:
            thread.start()

    def open(self, constraint: Constraint, output_ids: list[int], owner: str = "") -> Matcher:
        """A matcher of this tenant's that has seen `output_ids`, its mask ready. May take long. Raises `ValueError`."""
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer())
        matcher = self._grammars.matcher(constraint, self._move_on, owner)
        matcher.step(*output_ids)
        if matcher.failure is not None:
            raise ValueError(matcher.failure)
        matcher.ready = True
        return matcher

    def _move_on(self, matcher: Matcher, token_id: int) -> None:
        (self._dear if matcher.seconds > DEAR_S else self._cheap).put(matcher, token_id)

    def _run(self) -> None:
        waiting = self._cheap
        while not waiting.is_closed:
            item = waiting.get(LONGEST_SILENCE_S if waiting.unfinished else None)
            if item is None:
                self._release()
                continue
            matcher, token_id = item
            matcher.step(token_id)
            self._release(matcher)

    def _run_dear(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), DEAR_NICENESS)  # of this thread alone, on Linux
        while not self._dear.is_closed:
            item = self._dear.get(None)
            if item is not None:
                matcher, token_id = item
                matcher.step(token_id)
                self._dear.done()
                matcher.ready = True
                self._on_ready()

    def _release(self, made: Matcher | None = None) -> None:
        """Masks become ready together, so that their sequences stay in one batch; slow ones are not waited for."""
        with self._done_lock:
            if made is not None:
                self._done.append((time.monotonic(), made))
                self._cheap.done()
            if not self._done:
                return
            if self._cheap.unfinished and time.monotonic() - self._done[0][0] < LONGEST_SILENCE_S:
                return
            for _, matcher in self._done:
                matcher.ready = True
            self._done.clear()
        self._on_ready()

    def close(self) -> None:
        for waiting in (self._cheap, self._dear):
            waiting.close()
        for thread in self._threads:
            thread.join()

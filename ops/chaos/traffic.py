"""Streams that run while things break, each compared with what it gave when nothing did."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from ops.bench.service import load

Ending = Literal["right", "wrong", "truncated", "failed", "refused"]

FIRST_WORD = 259  # ids below are bytes, which need not be text alone; from here on each id is a word of its own
RETRY_S = 0.2  # between the attempts of a client that was refused
CONFIRMATIONS = (64, 48, 32, 16, 8)  # streams at once, when what looks wrong is tried without faults
PATIENCE_S = 120.0  # how long a client tries to be let in


@dataclass(frozen=True, slots=True)
class Case:
    """One request and the text it must give."""

    body: dict[str, Any]
    text: str = ""

    @property
    def tokens(self) -> int:
        return int(self.body["max_tokens"])


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it; times are unix seconds."""

    request_id: str
    url: str
    started: float  # its first attempt
    ended: float
    ending: Ending
    detail: str  # the error, or where the text is wrong
    arrivals: list[float]  # of its chunks
    refusals: int  # attempts before the one that was let in
    case: int = 0  # its number
    text: str = ""  # if it is wrong


def make_cases(count: int, model: str, vocab_size: int, tokens: tuple[int, int], seed: int) -> list[Case]:
    """Half greedy, half sampled under a seed; half of each with penalties, which depend on all tokens so far.

    The temperature is low because made-up weights give flat logits: among 2,048 tokens almost equally likely, the
    rounding of one batch or another often decides a draw; where a few lead, as in a trained model, it hardly ever does.
    """
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        prompt = [rng.randrange(FIRST_WORD, vocab_size) for _ in range(rng.randint(8, 64))]
        body = {
            "model": model, "prompt": prompt, "max_tokens": rng.randint(*tokens), "ignore_eos": True,
            "stream_options": {"include_usage": True},
            **({"temperature": 0} if number % 2 else {"temperature": 0.2, "top_p": 0.9, "seed": rng.getrandbits(62)}),
            **({"repetition_penalty": 1.3, "frequency_penalty": 0.2} if number % 4 < 2 else {}),
        }  # fmt: skip
        cases.append(Case(body))
    return cases


async def undisturbed(urls: Sequence[str], cases: Sequence[Case], concurrency: int) -> tuple[list[Case], int]:
    """The cases with the texts they give, and how many were left out.

    Two runs at different concurrency, so in different batches: a request whose two likeliest tokens are once so close
    that the rounding of a batch decides between them says nothing about faults, and is left out. Raises `ValueError`
    if a request fails.
    """
    runs = []
    for width in (concurrency, max(1, concurrency // 4)):
        traffic = Traffic(urls, cases, width, check=False)
        outcomes = await traffic.run_each_once()
        bad = [outcome for outcome in outcomes if outcome.ending != "right"]
        if bad:
            raise ValueError(f"{len(bad)} of {len(cases)} requests failed without any fault: {bad[0].detail}")
        runs.append(traffic.texts)
    kept = [
        Case(case.body, one)
        for case, one, two in zip(cases, *([run[i] for i in range(len(cases))] for run in runs), strict=True)
        if one == two
    ]
    if len(kept) < 0.9 * len(cases):
        raise ValueError(f"only {len(kept)} of {len(cases)} requests gave the same text twice without any fault")
    return kept, len(cases) - len(kept)


async def unstable(urls: Sequence[str], cases: Sequence[Case], wrong: Sequence[Outcome]) -> set[int]:
    """Numbers of those cases that give the wrong text without any fault too, sometimes: rounding decides there.

    They run again among all others, several times, so in other batches each time.
    """
    found: set[int] = set()
    for width in CONFIRMATIONS if wrong else ():
        again = Traffic(urls, cases, width, check=False)
        await again.run_each_once()
        found |= {outcome.case for outcome in wrong if again.texts[outcome.case] == outcome.text}
    return found


@dataclass(slots=True)
class Traffic:
    """`concurrency` clients, each with one stream after another."""

    urls: Sequence[str]
    cases: Sequence[Case]
    concurrency: int
    check: bool = True
    outcomes: list[Outcome] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)  # of case number
    opened: dict[str, list[float]] = field(default_factory=dict)  # arrivals of the streams that are open
    stopping: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def finished(self) -> int:
        """Requests that came to an end, good or bad."""
        return len(self.outcomes)

    async def run_each_once(self) -> list[Outcome]:
        """All cases, one after another."""
        numbers = iter(range(len(self.cases)))

        async def worker(client: httpx.AsyncClient) -> None:
            for number in numbers:
                self.outcomes.append(await self._ask(client, number))

        async with _client(self.concurrency) as client:
            await asyncio.gather(*(worker(client) for _ in range(self.concurrency)))
        return self.outcomes

    async def run_until_stopped(self) -> None:
        """The cases again and again, until `stopping` is set; streams that are open then still finish."""

        async def worker(client: httpx.AsyncClient) -> None:
            while not self.stopping:
                self.outcomes.append(await self._ask(client, next(self._numbers) % len(self.cases)))

        async with _client(self.concurrency) as client:
            await asyncio.gather(*(worker(client) for _ in range(self.concurrency)))

    async def _ask(self, client: httpx.AsyncClient, number: int) -> Outcome:
        """One request. A refusal before the first token is tried again, as every client library does."""
        case = self.cases[number]
        started = time.time()
        for attempt in itertools.count():
            url = self.urls[(number + attempt) % len(self.urls)]
            request_id = f"chaos-{len(self.outcomes)}-{number}-{random.getrandbits(40):x}"
            result = load.Stream()
            self.opened[request_id] = result.arrivals
            try:
                await load.stream_into(result, client, f"{url}/v1/completions", case.body, {"X-Request-Id": request_id})
            finally:
                del self.opened[request_id]
            refused = bool(result.error) and not result.arrivals
            if not refused or time.time() > started + PATIENCE_S:
                break
            await asyncio.sleep(RETRY_S)
        self.texts[number] = result.text
        ending, detail = self._judge(case, result)
        text = result.text if ending == "wrong" else ""
        return Outcome(request_id, url, started, time.time(), ending, detail, result.arrivals, attempt, number, text)

    def _judge(self, case: Case, result: load.Stream) -> tuple[Ending, str]:
        if result.error and not result.arrivals:
            return "refused", result.error
        if result.error:
            cut = "without [DONE]" in result.error or "Error" in result.error.partition(":")[0]
            return ("truncated" if cut else "failed"), result.error
        if result.output_tokens != case.tokens:
            return "wrong", f"{result.output_tokens} tokens instead of {case.tokens}"
        if self.check and result.text != case.text:
            same = next((i for i, (a, b) in enumerate(zip(result.text, case.text, strict=False)) if a != b), 0)
            return "wrong", f"differs from character {same} of {len(case.text)}"
        return "right", ""


def _client(concurrency: int) -> httpx.AsyncClient:
    # A connection per request: one that is kept may end in a process that was killed since.
    limits = httpx.Limits(max_connections=2 * concurrency, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5), limits=limits)


def longest_pauses(outcomes: Sequence[Outcome], since: float, until: float) -> list[float]:
    """For each stream that ran in the window, its longest time without a chunk that overlaps it; the longest first."""
    pauses = []
    for outcome in outcomes:
        gaps = [b - a for a, b in itertools.pairwise(outcome.arrivals) if b > since and a < until]
        if gaps:
            pauses.append(max(gaps))
    return sorted(pauses, reverse=True)


def longest_first_waits(outcomes: Sequence[Outcome], since: float, until: float) -> float:
    """The longest time to the first token of requests that began in the window, refused attempts included."""
    waits = [o.arrivals[0] - o.started for o in outcomes if since <= o.started < until and o.arrivals]
    return max(waits, default=0.0)

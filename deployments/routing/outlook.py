"""What one gateway knows of every engine, and which of them a request is sent to.

Engines are compared in one quantity: the seconds of work that lie before a request there. So what is cached and what is
busy need no weights against each other, and a beginning that many prompts share spreads by itself: as soon as waiting
for the engine that holds it would take longer than computing it elsewhere.
"""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from cluster.scheduling.prefix import Digest, Held, Shorts

STALE_S = 5.0  # replicas report twice a second
LAST = 1e9  # seconds of a replica that is chosen only if there is no other one
OUTPUT_TOKENS = 32  # that a sequence is taken to have left: what it costs those beside it
NOTICED_S = 0.3  # a request that was sent less long before a report came may not be in it
OWN_S = 5.0  # for so long a gateway itself remembers what it has sent: then it stands in the replica's digest
OWN_STRIDE = 8  # and of every so manyth block
DEFAULT_PREFILL_RATE = 1e4  # tokens/s, of a replica that has not measured it yet

Reason = Literal["prefix", "room", "cold"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a gateway has to know of one to send it: it is not to be read again for that."""

    num_tokens: int = 0
    block_size: int = 16
    shorts: Shorts = field(default_factory=lambda: np.empty(0, np.uint32))  # of its full blocks: see prefix.py


class Report(msgspec.Struct, frozen=True):
    """What a replica says of itself, twice a second: its `routing_stats`."""

    stamp: float = 0.0  # by its own clock: it says whether this is news

    queued_tokens: float = 0.0  # of all its requests, not computed yet
    sequences: float = 0.0  # running or waiting
    is_full: bool = False  # a new one has to wait until another one ends
    prefill_rate: float = 0.0  # prompt tokens/s
    decode_rate: float = 0.0  # output tokens/s, at its busiest
    is_ready: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    """One replica, as it is for one request."""

    held: int = 0  # tokens of the prompt that it need not compute
    wait_s: float = 0.0  # until it begins with it
    sequences: float = 0.0
    is_full: bool = False
    prefill_rate: float = DEFAULT_PREFILL_RATE
    is_doubtful: bool = False  # it is rebuilding its pipeline, or has not been heard of lately


def seconds(load: Load, num_tokens: int, decode_rate: float) -> float:
    """Of work that lie before a prompt of `num_tokens` and with it, where engines decode so fast at their best.

    Sequences share an engine: each costs its neighbours what its tokens take there. In a full engine one has to end.
    """
    prefill = load.wait_s + max(1, num_tokens - load.held) / load.prefill_rate
    decode = load.sequences * OUTPUT_TOKENS / decode_rate if decode_rate else 0.0
    return prefill + decode * (2 if load.is_full else 1) + (LAST if load.is_doubtful else 0.0)


class Queue:
    """What a replica still has to compute, as it goes on from its last report and what this gateway has sent since."""

    def __init__(self) -> None:
        self.report, self.came = Report(), 0.0
        self._sent: deque[tuple[float, float]] = deque()  # when, and the seconds it takes: what no report has yet
        self._done_at = 0.0  # when all of it will be

    @property
    def prefill_rate(self) -> float:
        return self.report.prefill_rate or DEFAULT_PREFILL_RATE

    @property
    def num_sequences(self) -> float:
        return self.report.sequences + len(self._sent)

    def wait_s(self, now: float) -> float:
        return max(0.0, self._done_at - now)

    def send(self, num_tokens: int, now: float) -> None:
        self._sent.append((now, num_tokens / self.prefill_rate))
        self._done_at = max(now, self._done_at) + self._sent[-1][1]

    def take(self, report: Report, now: float) -> None:
        """A report is a little old when it comes: what was sent just before is not in it."""
        self.report, self.came = report, now
        while self._sent and self._sent[0][0] < now - NOTICED_S:
            self._sent.popleft()
        self._done_at = now - NOTICED_S + report.queued_tokens / self.prefill_rate
        for at, took in self._sent:
            self._done_at = max(at, self._done_at) + took


class Outlook:
    """Of one gateway. Times are `time.monotonic`."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._queues: defaultdict[str, Queue] = defaultdict(Queue)
        self._held: dict[str, Held] = {}
        self._own = OwnPrompts()
        self._order: dict[str, float] = {}  # of replicas that are equal: this gateway's own
        self._decisions: Counter[Reason] = Counter()

    def hear(self, replica: str, stats: dict[str, Any], now: float) -> bool:
        """What Serve has last heard of a replica, a `Report`; whether that is news."""
        queue = self._queues[replica]
        if not stats or stats["stamp"] == queue.report.stamp:
            return False
        queue.take(msgspec.convert(stats, Report), now)
        return True

    def hold(self, digests: dict[str, Digest]) -> None:
        """What the replicas say that they hold, of which there are no others."""
        self._held = {replica: Held(digest) for replica, digest in digests.items()}

    def rank(
        self, replicas: Sequence[str], prompt: Prompt, now: float, doubtful: Collection[str] = frozenset()
    ) -> list[int]:
        """Indices of `replicas`, the one with the least work before the prompt first; `doubtful` ones last."""
        own = self._own.num_blocks(prompt.shorts, now)
        loads = [self._load(r, self._held_tokens(r, prompt, own), now, r in doubtful) for r in replicas]
        decode_rate = max((queue.report.decode_rate for queue in self._queues.values()), default=0.0)
        scores = [seconds(load, prompt.num_tokens, decode_rate) for load in loads]
        ties = [self._order.setdefault(replica, self._random.random()) for replica in replicas]
        ranked = sorted(range(len(replicas)), key=lambda i: (scores[i], ties[i]))
        if ranked:
            best, chosen = max(load.held for load in loads), loads[ranked[0]].held
            self._decisions["cold" if not best else "prefix" if chosen == best else "room"] += 1
        return ranked

    def _load(self, replica: str, held: int, now: float, is_doubtful: bool) -> Load:
        queue = self._queues[replica]
        report = queue.report
        return Load(
            held,
            queue.wait_s(now),
            queue.num_sequences,
            report.is_full,
            queue.prefill_rate,
            is_doubtful or not report.is_ready or now - queue.came > STALE_S,
        )

    def _held_tokens(self, replica: str, prompt: Prompt, own: dict[str, int]) -> int:
        """Of the prompt there: as it says, or as it must by what has gone there from here (`own`, in blocks)."""
        held = self._held.get(replica)
        blocks = held.num_blocks(prompt.shorts) if held is not None else 0
        return max(blocks, own.get(replica, 0)) * prompt.block_size

    def send(self, replica: str, prompt: Prompt, now: float) -> None:
        """The prompt goes there."""
        held = self._held_tokens(replica, prompt, self._own.num_blocks(prompt.shorts, now))
        self._queues[replica].send(max(1, prompt.num_tokens - held), now)
        self._own.add(replica, prompt.shorts, now)

    def take_decisions(self) -> Counter[Reason]:
        """Since they were last taken: how many went to who holds most of the prompt, or elsewhere for there is more
        room, or where nobody holds any of it.
        """
        taken, self._decisions = self._decisions, Counter()
        return taken

    def forget_all_but(self, replicas: Set[str]) -> None:
        """They come and go."""
        for known in (self._queues, self._order):
            for replica in known.keys() - replicas:
                del known[replica]


class OwnPrompts:
    """Which replicas got prompts with which beginnings from here, lately."""

    def __init__(self) -> None:
        self._replicas: defaultdict[int, dict[str, float]] = defaultdict(dict)  # by block, with the time of the last
        self._times: deque[tuple[float, list[int], str]] = deque()

    def add(self, replica: str, shorts: Shorts, now: float) -> None:
        keys = shorts[OWN_STRIDE - 1 :: OWN_STRIDE].tolist()
        for key in keys:
            self._replicas[key][replica] = now
        self._times.append((now, keys, replica))

    def num_blocks(self, shorts: Shorts, now: float) -> dict[str, int]:
        """By replica: how many of a prompt's first blocks went there."""
        self._forget(now - OWN_S)
        found: dict[str, int] = {}
        left: set[str] | None = None
        for i, key in enumerate(shorts[OWN_STRIDE - 1 :: OWN_STRIDE].tolist(), 1):
            there = self._replicas.get(key, {})
            left = set(there) if left is None else left & there.keys()
            if not left:
                break
            for replica in left:
                found[replica] = i * OWN_STRIDE
        return found

    def _forget(self, before: float) -> None:
        while self._times and self._times[0][0] < before:
            at, keys, replica = self._times.popleft()
            for key in keys:
                there = self._replicas.get(key, {})
                if there.get(replica) == at:
                    del there[replica]
                    if not there:
                        del self._replicas[key]


OUTLOOK = Outlook()  # of this process: Serve makes the router by itself, so it cannot be handed one

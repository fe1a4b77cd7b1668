"""Which requests are taken: those whose first token can be expected in time. All others get 429 at once.

What is expected follows from tokens, not from counts of requests: prompt tokens that wait against the rate at which
engines compute prompts, and once sequences or KV are full, how many answers have to end first, and when these will.
Engines report the rates; what is open is known here, for an answer is counted from the moment it is sent.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from deployments.config import AppConfig
from deployments.engine.board import ReplicaStatus
from deployments.errors import ApiError, too_many
from deployments.gateway.crowd import Answer, Crowd
from deployments.gateway.tenants import Tenant

log = logging.getLogger(__name__)

REFRESH_S = 0.5  # how old what engines report may be
GROUPS = 32  # what other gateways have open is taken for so many kinds of answers
LOADS_S = 30.0  # when to come back, where as many are held as may be while no engine runs
SAME_ANSWER_S = 0.02  # for so long a tenant that was refused is refused again without another look


@dataclass(frozen=True, slots=True)
class Capacity:
    """What all ready engines can do together."""

    prefill_rate: float  # prompt tokens/s
    decode_rate: float  # output tokens/s
    max_seqs: int
    kv_tokens: int

    @classmethod
    def of(cls, replicas: Sequence[ReplicaStatus]) -> "Capacity":
        return cls(
            prefill_rate=sum(r.prefill_rate for r in replicas),
            decode_rate=sum(r.decode_rate for r in replicas),
            max_seqs=sum(r.max_num_seqs for r in replicas),
            kv_tokens=sum(r.kv_blocks_total * r.block_size for r in replicas),
        )


@dataclass(slots=True)
class Sizes:
    """The length of the average answer: of those that ended lately, or before any has, as clients allow them to be."""

    output: float = 0.0
    _seen: int = 0
    _ended: bool = False

    def expect(self, max_tokens: int) -> None:
        if not self._ended:
            self._take(max_tokens)

    def end(self, output: int) -> None:
        if not self._ended:
            self._ended, self._seen = True, 0
        self._take(output)

    def _take(self, output: int) -> None:
        self._seen += 1
        self.output += max(1 / self._seen, 0.02) * (output - self.output)


def expected_wait(
    ahead: Crowd, new: Sequence[Answer], capacity: Capacity, mean_output: float, share: float = 1.0
) -> float:
    """Seconds until an engine begins with `new`, behind the answers `ahead`, with this share of the engines.

    Its own prompts do not count: however long, an idle engine takes them. Rates that are not known yet count as
    endless for prompts (a replica measures that one before it is ready) and as nothing for answers that must end.
    """
    prefill_rate = capacity.prefill_rate * share or math.inf
    wait = ahead.waiting / prefill_rate
    seqs = max(1, int(capacity.max_seqs * share))
    running = min(ahead.count, seqs)  # first come, first served
    size = max(1.0, ahead.held / ahead.count) if ahead.count else 1.0
    kv = (ahead.held + sum(answer.prompt for answer in new) - capacity.kv_tokens * share) / size
    lacking = min(ahead.count, math.ceil(max(ahead.count + len(new) - seqs, kv)))
    if lacking <= 0:
        return wait
    speed = capacity.decode_rate * share / running  # tokens/s of one answer
    if not speed:
        return math.inf
    # Whoever runs now ends after what is left of the average answer; whoever takes that place, one answer later.
    rounds, place = divmod(lacking - 1, running)
    to_begin = max(0, running - ahead.begun) / max(1, ahead.count - ahead.begun)  # share of those that have not
    begun = ahead.waiting * to_begin / prefill_rate
    return max(wait, begun + (ahead.left(place, mean_output) + rounds * mean_output) / speed)


@dataclass(slots=True)
class Crowded:
    """What one tenant has open."""

    weight: float
    crowd: Crowd


class Admission:
    """One gateway's. `replicas` reads what engines report."""

    def __init__(self, config: AppConfig, replicas: Callable[[], Awaitable[list[ReplicaStatus]]]) -> None:
        self.target_s = config.admission.target_ttft_s
        self.max_age_s = config.gateway.ready_max_age_s
        self.alone = config.gateway.replicas == 1
        self._replicas = replicas
        self._max_seqs = config.scheduler.max_num_seqs
        self.loading = ""  # how far the engine has come that loads, in words
        self._capacity: Capacity | None = None  # None: no engine is ready, as far as is known
        self._sizes = Sizes()
        self._open: dict[int, tuple[str, Answer]] = {}  # by the answer's number: whose it is
        self._all, self._tenants = Crowd(), dict[str, Crowded]()  # the same in sums
        self._others = Crowd()  # what other gateways have sent
        self._numbers = itertools.count()
        self._refused: dict[str, tuple[float, float]] = {}  # tenant -> when, and how long it would have waited
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = -math.inf

    # -- what engines report ------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Ask for it, if that was not done lately. Nobody waits for the answer, except for the very first one."""
        first, now = self._asking is None, time.monotonic()
        if now - self._asked_at > REFRESH_S and (self._asking is None or self._asking.done()):
            self._asked_at, self._asking = now, asyncio.create_task(self._ask())
        if first and self._asking is not None:
            await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        try:
            replicas = await self._replicas()
        except Exception:
            log.exception("what engines report cannot be read; what is known stays")
        else:
            loading = sorted((r for r in replicas if r.state == "loading"), key=lambda r: -r.loaded)
            self.loading = loading[0].reason if loading else ""
            self.take([r for r in replicas if r.state == "ready" and r.age_s <= self.max_age_s])

    def take(self, ready: Sequence[ReplicaStatus]) -> None:
        """The ready engines. What they have and is not ours came from other gateways, if there are any."""
        self._capacity = Capacity.of(ready) if ready else None
        if self.alone:
            return
        own = self._all
        running = max(0, sum(r.running for r in ready) - own.begun)
        held = max(0, sum(r.running_tokens for r in ready) - (own.held - own.waiting))
        waiting = max(0, sum(r.waiting for r in ready) - (own.count - own.begun))
        tokens = max(0, sum(r.waiting_tokens for r in ready) - own.waiting)
        length = max(1, int(self._sizes.output))  # theirs are taken to be like ours, and to end one after the other
        self._others = Crowd()
        groups = min(running, GROUPS)
        for i in range(groups):
            times = (i + 1) * running // groups - i * running // groups
            self._others.add(Answer(held // running, length, 1 + i * length // groups), times)
        if waiting:
            self._others.add(Answer(tokens // waiting, length), waiting)

    # -- requests -----------------------------------------------------------------------------------------------------

    def check(self, tenant: Tenant) -> None:
        """Raises `ApiError` 429 if a request of this tenant, however small, would wait too long."""
        when, wait = self._refused.get(tenant.name, (-math.inf, 0.0))
        if time.monotonic() - when < SAME_ANSWER_S:  # in a flood nothing is worked out anew for everybody
            raise overloaded(wait - self.target_s)
        self._check(tenant, [Answer(1, 1)])

    def _check(self, tenant: Tenant, new: Sequence[Answer]) -> None:
        wait = self._wait(tenant, new, self._capacity) if self._capacity is not None else 0.0
        if wait > self.target_s:
            if len(new) == 1 == new[0].prompt:
                self._refused[tenant.name] = time.monotonic(), wait
            raise overloaded(wait - self.target_s)

    def _wait(self, tenant: Tenant, new: Sequence[Answer], capacity: Capacity) -> float:
        """By its own share of the engines, or by all of them, whichever is sooner: what others leave is used."""
        ahead = self._others + self._all if self._others.count else self._all
        wait = expected_wait(ahead, new, capacity, self._sizes.output)
        own = self._tenants.get(tenant.name)
        if wait <= self.target_s or len(self._tenants) == (own is not None):
            return wait
        weights = sum(other.weight for name, other in self._tenants.items() if name != tenant.name) + tenant.weight
        crowd = own.crowd if own is not None else Crowd()
        return min(wait, expected_wait(crowd, new, capacity, self._sizes.output, tenant.weight / weights))

    def open(self, tenant: Tenant, answers: Sequence[Answer]) -> "Ticket":
        """Take a request for these answers. Raises `ApiError` 429 if it would wait too long."""
        self._check(tenant, answers)
        if self._capacity is None and self._all.count - self._all.begun >= self._max_seqs:
            raise overloaded(LOADS_S)  # as many are held as one pipeline can begin with
        numbers = [next(self._numbers) for _ in answers]
        crowded = self._tenants.setdefault(tenant.name, Crowded(tenant.weight, Crowd()))
        crowded.weight = tenant.weight
        for number, answer in zip(numbers, answers, strict=True):
            self._open[number] = tenant.name, answer
            self._all.add(answer)
            crowded.crowd.add(answer)
            self._sizes.expect(answer.max_tokens)
        return Ticket(self, numbers)

    def grow(self, number: int, tokens: int) -> None:
        if number in self._open and tokens:
            name, answer = self._open[number]
            self._all.grow(answer, tokens)
            self._tenants[name].crowd.grow(answer, tokens)
            answer.output += tokens

    def close(self, number: int, complete: bool) -> None:
        name, answer = self._open.pop(number, ("", None))
        if answer is None:
            return
        self._all.add(answer, -1)
        self._tenants[name].crowd.add(answer, -1)
        if not self._tenants[name].crowd.count:
            del self._tenants[name]
        if complete:
            self._sizes.end(answer.output)


@dataclass(frozen=True, slots=True)
class Ticket:
    """An admitted request. It counts until it is closed."""

    admission: Admission
    numbers: list[int]  # of its answers

    def grow(self, index: int, tokens: int) -> None:
        """So many tokens more of one of its answers."""
        self.admission.grow(self.numbers[index], tokens)

    def end(self, index: int) -> None:
        """One of its answers is complete."""
        self.admission.close(self.numbers[index], complete=True)

    def close(self) -> None:
        for number in self.numbers:
            self.admission.close(number, complete=False)


def overloaded(wait: float) -> ApiError:
    message = "The engines are busy: this request would wait too long for its first token. Please try again later."
    return too_many(message, "overloaded", "overloaded", wait)

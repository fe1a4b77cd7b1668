"""Which requests are taken: those whose first token can be expected in time. All others get 429 at once.

What is expected follows from tokens, not from counts of requests: prompt tokens that wait against the rate at which
engines compute prompts, and once sequences or KV are full, against the rate at which these become free. Engines report
the rates; what is open is known here, for each request is counted the moment it is sent.
"""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from deployments.config import AppConfig
from deployments.errors import ApiError
from deployments.limits import too_many
from deployments.status import ReplicaStatus
from deployments.tenants import Tenant

REFRESH_S = 0.5  # how old what engines report may be


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
    """The average answer, in tokens: of those that ended lately, or before any has, as clients allow them to be."""

    prompt: float = 0.0
    output: float = 0.0
    _seen: int = 0
    _ended: bool = False

    def expect(self, prompt: float, max_tokens: float) -> None:
        if not self._ended:
            self._take(prompt, max_tokens)

    def ended(self, prompt: float, output: float) -> None:
        if not self._ended:
            self._ended, self._seen = True, 0
        self._take(prompt, output)

    def _take(self, prompt: float, output: float) -> None:
        self._seen += 1
        weight = max(1 / self._seen, 0.02)
        self.prompt += weight * (prompt - self.prompt)
        self.output += weight * (output - self.output)


@dataclass(slots=True)
class Load:
    """Requests on their way or running."""

    waiting_tokens: float = 0  # prompt tokens of answers without a first token
    open: float = 0  # answers that have not ended
    tokens: float = 0  # prompts and output so far of these

    def add(self, waiting_tokens: float, open_: float, tokens: float) -> None:
        self.waiting_tokens += waiting_tokens
        self.open += open_
        self.tokens += tokens


def expected_wait(ahead: Load, new: Load, capacity: Capacity, sizes: Sizes, share: float = 1.0) -> float:
    """Seconds until `new` computes, behind `ahead`, with this share of the engines. Its own prompt does not count.

    An engine that has not told its rates yet is taken to be as fast as need be; it has measured its prefill rate
    before it is ready.
    """
    waits = [0.0]
    if ahead.waiting_tokens and capacity.prefill_rate:
        waits.append(ahead.waiting_tokens / (capacity.prefill_rate * share))
    seqs = ahead.open + new.open - capacity.max_seqs * share
    kv = ahead.tokens + new.tokens - capacity.kv_tokens * share
    lacking = min(ahead.open, max(seqs, kv / max(1.0, sizes.prompt + sizes.output)))  # answers that have to end first
    if lacking > 0:
        ends = capacity.decode_rate * share / max(1.0, sizes.output)  # a second
        waits.append(lacking / ends if ends else math.inf)
    return max(waits)


class Admission:
    """One gateway's. `replicas` reads what engines report."""

    def __init__(self, config: AppConfig, replicas: Callable[[], Awaitable[list[ReplicaStatus]]]) -> None:
        self._args = config.admission
        self._max_age = config.gateway.ready_max_age_s
        self._replicas = replicas
        self._alone = config.gateway.replicas == 1
        self._capacity: Capacity | None = None  # None: no engine is ready, as far as is known
        self._sizes = Sizes()
        self._own: dict[str, Load] = {}  # by tenant
        self._total = Load()
        self._others = Load()  # what other gateways have sent
        self._weights: dict[str, float] = {}
        self._asked_at = -math.inf

    async def refresh(self) -> None:
        """Ask what engines report, if that has not been done lately."""
        now = time.monotonic()
        if now - self._asked_at < REFRESH_S:
            return
        self._asked_at = now
        stamp = time.time()
        self.take([r for r in await self._replicas() if r.state == "ready" and stamp - r.updated_at <= self._max_age])

    def take(self, ready: Sequence[ReplicaStatus]) -> None:
        """What the ready engines report. What they have and is not ours came from other gateways."""
        self._capacity = Capacity.of(ready) if ready else None
        if self._alone:
            return
        reported = Load(
            sum(r.waiting_tokens for r in ready),
            sum(r.running + r.waiting for r in ready),
            sum(r.running_tokens + r.waiting_tokens for r in ready),
        )
        own = self._total
        self._others = Load(
            *(
                max(0.0, theirs - ours)
                for theirs, ours in (
                    (reported.waiting_tokens, own.waiting_tokens),
                    (reported.open, own.open),
                    (reported.tokens, own.tokens),
                )
            )
        )

    def check(self, tenant: Tenant, new: Load | None = None) -> None:
        """Raises `ApiError` 429 if a request, of any size unless it is known, would wait too long."""
        if self._capacity is None:
            return
        wait = self._wait(tenant, new or Load(0, 1, 1), self._capacity)
        if wait > self._args.target_ttft_s:
            raise overloaded(wait - self._args.target_ttft_s)

    def _wait(self, tenant: Tenant, new: Load, capacity: Capacity) -> float:
        """By its own share of the engines, or by all of them, whichever is sooner: what others leave is used."""
        total, others = self._total, self._others
        ahead = Load(
            total.waiting_tokens + others.waiting_tokens, total.open + others.open, total.tokens + others.tokens
        )
        wait = expected_wait(ahead, new, capacity, self._sizes)
        active = {name: weight for name, weight in self._weights.items() if self._own[name].open > 0}
        if not wait or set(active) <= {tenant.name}:
            return wait
        share = tenant.weight / (sum(active.values()) + (0 if tenant.name in active else tenant.weight))
        return min(wait, expected_wait(self._own.get(tenant.name, Load()), new, capacity, self._sizes, share))

    def open(self, tenant: Tenant, answers: Sequence[tuple[int, int]]) -> "Ticket":
        """Take a request for answers, each (prompt tokens, max_tokens). Raises `ApiError` 429 as `check` does."""
        tokens = sum(prompt for prompt, _ in answers)
        self.check(tenant, Load(tokens, len(answers), tokens))
        self._weights[tenant.name] = tenant.weight
        for prompt, max_tokens in answers:
            self._sizes.expect(prompt, max_tokens)
        ticket = Ticket(self, tenant.name, tokens)
        ticket.count(tokens, len(answers), tokens)
        return ticket

    def ended(self, load: Load, prompt_tokens: int) -> None:
        self._sizes.ended(prompt_tokens / load.open, (load.tokens - prompt_tokens) / load.open)

    def count(self, tenant: str, waiting_tokens: float, open_: float, tokens: float) -> None:
        self._own.setdefault(tenant, Load()).add(waiting_tokens, open_, tokens)
        self._total.add(waiting_tokens, open_, tokens)


@dataclass(slots=True)
class Ticket:
    """An admitted request. What it counts for is taken back when it is closed."""

    admission: Admission
    tenant: str
    prompt_tokens: int
    load: Load = field(default_factory=Load)

    def count(self, waiting_tokens: float, open_: float, tokens: float) -> None:
        self.load.add(waiting_tokens, open_, tokens)
        self.admission.count(self.tenant, waiting_tokens, open_, tokens)

    def began(self, prompt_tokens: int) -> None:
        """One of its answers has its first token."""
        self.count(-prompt_tokens, 0, 0)

    def grew(self, tokens: int) -> None:
        self.count(0, 0, tokens)

    def close(self, complete: bool) -> None:
        """`complete`: with all of its answers, which show how long answers are."""
        if complete:
            self.admission.ended(self.load, self.prompt_tokens)
        self.count(-self.load.waiting_tokens, -self.load.open, -self.load.tokens)


def overloaded(wait: float) -> ApiError:
    message = "The engines are busy: this request would wait too long for its first token. Please try again later."
    return too_many(message, "overloaded", "overloaded", wait)

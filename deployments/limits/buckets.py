"""Per-tenant limits of requests and tokens a minute, and the headers in which OpenAI's clients look for them."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from deployments.errors import ApiError, too_many


class Limited(Protocol):
    """Who has limits; None: no limit."""

    @property
    def name(self) -> str: ...
    @property
    def requests_per_minute(self) -> int | None: ...
    @property
    def tokens_per_minute(self) -> int | None: ...


class Refusal(NamedTuple):
    """The limit that is reached, and the seconds until it is not."""

    what: str
    per_minute: float
    wait: float


@dataclass(slots=True)
class Bucket:
    """Holds a minute's worth and fills up steadily. It may go into debt, which is paid before anything else."""

    per_minute: float
    level: float
    at: float  # seconds, when `level` was true

    def refill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, amount: float) -> float:
        """Until it holds `amount`, or is full if it can never hold that much."""
        return max(0.0, min(amount, self.per_minute) - self.level) * 60 / self.per_minute


class Limits:
    """The buckets of all tenants. Whoever cannot ask what others let through keeps a share of each limit."""

    def __init__(self, gateways: int = 1) -> None:
        self.gateways = gateways
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take_request(self, tenant: Limited, now: float) -> None:
        """Raises `ApiError` 429 if this request is one too many, or tokens are still owed."""
        if (refusal := self.try_request(tenant, now)) is not None:
            raise limited(tenant, refusal)

    def take_prompt(self, tenant: Limited, tokens: int, now: float) -> None:
        """Raises `ApiError` 429 if there is no room for so many tokens now."""
        if (refusal := self.try_prompt(tenant, tokens, now)) is not None:
            raise limited(tenant, refusal)

    def try_request(self, tenant: Limited, now: float) -> Refusal | None:
        """None: it is taken."""
        requests, tokens = self._bucket(tenant, "requests", now), self._bucket(tenant, "tokens", now)
        if tokens is not None and (wait := tokens.seconds_until(1)) > 0:
            return Refusal("tokens", tokens.per_minute, wait)
        if requests is not None:
            if (wait := requests.seconds_until(1)) > 0:
                return Refusal("requests", requests.per_minute, wait)
            requests.level -= 1
        return None

    def try_prompt(self, tenant: Limited, tokens: int, now: float) -> Refusal | None:
        """None: there is room for it."""
        bucket = self._bucket(tenant, "tokens", now)
        if bucket is not None:
            if (wait := bucket.seconds_until(tokens)) > 0:
                return Refusal("tokens", bucket.per_minute, wait)
            bucket.level -= tokens
        return None

    def spend(self, tenant: Limited, tokens: int, now: float) -> None:
        """Count output as it is made: nobody knows its length before."""
        bucket = self._bucket(tenant, "tokens", now)
        if bucket is not None:
            bucket.level -= tokens

    def levels(self, tenant: Limited, now: float) -> dict[str, float]:
        """What is left of each limit."""
        found = {what: self._bucket(tenant, what, now) for what in ("requests", "tokens")}
        return {what: bucket.level for what, bucket in found.items() if bucket is not None}

    def put(self, tenant: Limited, levels: dict[str, float], now: float) -> None:
        """Go on from these levels, of the whole limits, or from this one's share of them."""
        for what, level in levels.items():
            if (bucket := self._bucket(tenant, what, now)) is not None:
                bucket.level = level / self.gateways

    def headers(self, tenant: Limited, now: float) -> dict[str, str]:
        """x-ratelimit-*: the limit, what remains of it, and when it is whole again."""
        found = {}
        for what in ("requests", "tokens"):
            bucket = self._bucket(tenant, what, now)
            if bucket is not None:
                found[f"x-ratelimit-limit-{what}"] = f"{bucket.per_minute:.0f}"
                found[f"x-ratelimit-remaining-{what}"] = f"{max(0, math.floor(bucket.level))}"
                found[f"x-ratelimit-reset-{what}"] = duration(bucket.seconds_until(bucket.per_minute))
        return found

    def _bucket(self, tenant: Limited, what: str, now: float) -> Bucket | None:
        limit = tenant.requests_per_minute if what == "requests" else tenant.tokens_per_minute
        if limit is None:
            return None
        share = limit / self.gateways
        bucket = self._buckets.setdefault((tenant.name, what), Bucket(share, share, now))
        bucket.per_minute = share  # it may have been changed in the file of keys
        bucket.refill(now)
        return bucket


def limited(tenant: Limited, refusal: Refusal) -> ApiError:
    what, per_minute, wait = refusal
    message = f"Rate limit reached for {tenant.name} on {what} per minute: limit {per_minute:.0f}"
    return too_many(f"{message}. Please try again in {duration(wait)}.", what, "rate_limit_exceeded", wait)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 12ms, 3.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    return f"{int(seconds // 60)}m{int(seconds % 60)}s"

"""What the service promises, as one table; of it the recording rules, the burn-rate alerts and the board's first row.

An objective is a share of good events. Its budget is what may be bad; a burn rate of 1 uses the budget of 30 days up in
30 days. A page needs a burn so fast that the budget is in danger, in a long window, and still going on, in a short one.
"""

from dataclasses import dataclass
from typing import Any, Literal

from deployments.metrics import EXPORTED_PREFIX

Severity = Literal["page", "ticket"]
LEAST = 5  # bad events in the long window: one failure among three requests at night is nobody's page
SERVED = 'endpoint!="probe",outcome=~"stop|length|error"'  # whoever is refused or leaves says nothing of errors


@dataclass(frozen=True, slots=True)
class Objective:
    """`bad` and `total` are selectors of counters; {w} is a range."""

    name: str
    title: str
    good: float  # share of events
    bad: str
    total: str
    outage: float  # share of bad events in a minute at which nobody waits for windows
    summary: str

    @property
    def budget(self) -> float:
        return round(1 - self.good, 6)

    def ratio(self, window: str) -> str:
        """The recorded share of bad events."""
        return f"caravan:{self.name}:bad_ratio{window}"

    def recorded(self, window: str) -> str:
        """A bad series that does not exist yet counts as 0."""
        bad, total = self.bad.format(w=window), self.total.format(w=window)
        by = "sum by (application)"
        return f"({by} ({bad}) or 0 * {by} ({total})) / ({by} ({total}) > 0)"

    def events(self, window: str) -> str:
        """How many were bad."""
        return f"sum by (application) ({self.bad.format(w=window).replace('rate(', 'increase(')})"


@dataclass(frozen=True, slots=True)
class Tier:
    """Alert if the budget burns `rate` times too fast in both windows."""

    rate: float
    long: str
    short: str
    lasts: str
    severity: Severity


TIERS = (
    Tier(14.4, "1h", "5m", "0s", "page"),  # 2 % of the budget of 30 days in an hour
    Tier(6.0, "6h", "30m", "0s", "page"),  # 5 %
    Tier(1.0, "3d", "6h", "1h", "ticket"),  # 10 %
)
OUTAGE = "1m"
WINDOWS = (OUTAGE, *dict.fromkeys(window for tier in TIERS for window in (tier.short, tier.long)))


def objectives(first_token_s: float = 2.5, inter_token_s: float = 0.1) -> tuple[Objective, ...]:
    """Both times must be edges of their histograms."""

    def slower(name: str, seconds: float) -> tuple[str, str]:
        total = f"rate({EXPORTED_PREFIX}{name}_count[{{w}}])"
        within = f'rate({EXPORTED_PREFIX}{name}_bucket{{{{le="{seconds}"}}}}[{{w}}])'
        return f"{total} - ignoring (le) {within}", total

    requests = f"rate({EXPORTED_PREFIX}requests_total{{{{%s}}}}[{{w}}])"
    return (
        Objective(
            "errors", "Requests that end with an error", 0.999, requests % 'endpoint!="probe",outcome="error"',
            requests % SERVED, 0.25, "requests end with an error",
        ),
        Objective(
            "first_token", f"First tokens after {first_token_s:g} s", 0.95, *slower("ttft_seconds", first_token_s), 0.8,
            f"requests wait more than {first_token_s:g} s for their first token",
        ),
        Objective(
            "inter_token", f"Gaps between tokens of more than {inter_token_s:g} s", 0.99,
            *slower("inter_token_seconds", inter_token_s), 0.5, f"tokens come more than {inter_token_s:g} s apart",
        ),
    )  # fmt: skip


def recording_rules(table: tuple[Objective, ...]) -> list[dict[str, Any]]:
    return [
        {"record": objective.ratio(window), "expr": objective.recorded(window)}
        for objective in table
        for window in WINDOWS
    ]


def burning(objective: Objective, severity: Severity) -> str:
    """The expression of an objective's alert: any of its tiers of this severity, or an outage."""
    parts = [
        f"({objective.ratio(tier.long)} > {tier.rate:g} * {objective.budget:g}"
        f" and on (application) {objective.ratio(tier.short)} > {tier.rate:g} * {objective.budget:g}"
        f" and on (application) {objective.events(tier.long)} >= {LEAST})"
        for tier in TIERS
        if tier.severity == severity
    ]
    if severity == "page":
        outage = f"{objective.ratio(OUTAGE)} > {objective.outage:g}"
        parts.insert(0, f"({outage} and on (application) {objective.events(OUTAGE)} >= {LEAST})")
    return " or ".join(parts)

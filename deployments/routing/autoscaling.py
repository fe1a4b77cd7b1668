"""How many pipelines and gateways the load needs: pure functions of what their replicas report.

Engines say what they have and what they can do, gateways what no engine has: requests that were refused, and those
that are held because no engine runs. A pipeline more is wanted once a request would wait for half of the time after
which it is refused (`admission.target_ttft_s`), or seats get scarce; one less, if the others have ample room for
everything that is open.
Serve applies bounds and delays around this. It ships this file by value: it imports nothing of ours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AIM = 0.5  # of `admission.target_ttft_s`: what loads meanwhile must come before the first refusal
FULL, ROOMY = 0.8, 0.6  # share of seats taken beyond which there should be more, and below which fewer: what comes in
# bursts needs room, and so does what comes while another pipeline loads
BUSY, IDLE = 0.7, 0.4  # processor of a gateway beyond which there should be more of them, and below which fewer

Metrics = Mapping[str, Mapping[Any, float]]  # name -> replica -> mean of the last seconds, as Serve gives them
State = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What there is to do, of all replicas together."""

    running: float = 0.0  # sequences that engines compute
    running_tokens: float = 0.0  # in their caches
    waiting: float = 0.0  # sequences that wait, in engines or, where none runs, in gateways
    waiting_tokens: float = 0.0  # of their prompts
    mean_output: float = 0.0  # tokens of an answer; 0: none has ended yet
    prefilled_per_s: float = 0.0  # prompt tokens that were computed
    refused_per_s: float = 0.0
    refused_tokens_per_s: float = 0.0  # their prompts, which are taken to be like all others
    requests: float = 0.0  # that were open at all, however short

    @property
    def open(self) -> float:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What one can do: the mean of those that run."""

    prefill_rate: float  # prompt tokens/s
    decode_rate: float  # output tokens/s
    max_seqs: float
    kv_tokens: float


@dataclass(frozen=True, slots=True)
class Need:
    """A number of replicas below `least` is too small, one above `most` larger than it must be."""

    least: float
    most: float

    def met_from(self, target: int) -> int:
        """The number nearest to what there is."""
        least, most = math.ceil(self.least - 1e-9), math.ceil(self.most - 1e-9)
        return max(least, min(target, max(least, most)))


def pipelines_needed(demand: Demand, one: Pipeline, target_s: float) -> Need:
    """Pipelines that begin with every request within `AIM * target_s`; and those that have a seat for each.

    Answers end at `decode_rate / mean_output` a second and pipeline, so what has no seat on n pipelines waits
    (open - n * seats) * mean_output / (n * decode_rate) seconds; solved for n. A seat's time is how long an answer
    takes where all seats are taken. What was refused would need `mean_output / decode_rate` of a pipeline each.
    """
    if not (demand.requests or demand.refused_per_s):
        return Need(0.0, 0.0)  # what engines compute then are their own probes
    aim = AIM * target_s
    size = demand.running_tokens / demand.running + demand.mean_output / 2 if demand.running else 0.0  # at its end
    seats = max(1.0, min(one.max_seqs, one.kv_tokens / size) if size else one.max_seqs)
    seat_time = seats * demand.mean_output / one.decode_rate if demand.mean_output and one.decode_rate else math.inf
    patience = 1.0 if math.isinf(seat_time) else seat_time / (aim + seat_time)
    refused = demand.refused_per_s * (seat_time / seats if math.isfinite(seat_time) else target_s / seats)
    sits = demand.open / seats
    read = demand.waiting_tokens / (one.prefill_rate * aim) if one.prefill_rate else 0.0
    turned_away = demand.refused_tokens_per_s / one.prefill_rate if one.prefill_rate else 0.0
    computed = demand.prefilled_per_s / one.prefill_rate if one.prefill_rate else 0.0
    least = max(sits * patience + refused, read + turned_away, demand.running / seats / FULL, 1.0)
    return Need(least, max(least, sits / ROOMY + refused, computed / ROOMY))


def demand_of(engines: Metrics, gateways: Metrics) -> Demand:
    """What all engines report, and what gateways know beside it."""
    return Demand(
        running=_sum(engines, "running"),
        running_tokens=_sum(engines, "running_tokens"),
        waiting=_sum(engines, "waiting") + _sum(gateways, "held"),
        waiting_tokens=_sum(engines, "waiting_tokens") + _sum(gateways, "held_tokens"),
        mean_output=_mean(engines, "mean_output"),
        prefilled_per_s=_sum(engines, "prefilled_per_s"),
        refused_per_s=_sum(gateways, "refused_per_s"),
        refused_tokens_per_s=_sum(gateways, "refused_tokens_per_s"),
        requests=_sum(engines, "requests") + _sum(gateways, "held"),
    )


def capacity_of(engines: Metrics) -> Pipeline | None:
    """None if no engine has reported."""
    if not engines.get("max_seqs"):
        return None
    names = ("prefill_rate", "decode_rate", "max_seqs", "kv_tokens")
    return Pipeline(**{name: _mean(engines, name) for name in names})


def gateways_needed(gateways: Metrics) -> Need:
    """By their processor time: a gateway is one process with one event loop."""
    used = _sum(gateways, "cpu")
    return Need(max(1.0, used / BUSY), max(1.0, used / IDLE))


def _sum(metrics: Metrics, name: str) -> float:
    return sum(metrics.get(name, {}).values())


def _mean(metrics: Metrics, name: str) -> float:
    """Of those that know it."""
    known = [value for value in metrics.get(name, {}).values() if value]
    return sum(known) / len(known) if known else 0.0


def engines_wanted(
    target: int, state: State, engines: Metrics, gateways: Metrics, target_s: float
) -> tuple[int, State]:
    """The number of pipelines, and what to remember: what one can do, for the time when none runs."""
    one = capacity_of(engines)
    state = {"one": one} if one is not None else {"one": state["one"]} if state.get("one") else {}
    demand, one = demand_of(engines, gateways), state.get("one")
    if one is not None:
        return pipelines_needed(demand, one, target_s).met_from(target), state
    if not gateways:
        return target, state  # the first one loads, and nobody says what waits for it
    return (max(1, target) if demand.requests else 0), state


def follow_demand(contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, State]]:
    """The application's `autoscaling_policy`. `contexts`: Serve's AutoscalingContext of each deployment."""
    by_name = {deployment.name: deployment for deployment in contexts}
    wanted: dict[Any, int] = {}
    states: dict[Any, State] = {}
    gateways: Metrics = {}
    if (deployment := by_name.get("Gateway")) is not None:
        gateways = contexts[deployment].aggregated_metrics or {}
        target = contexts[deployment].target_num_replicas
        wanted[deployment] = gateways_needed(gateways).met_from(target) if gateways.get("cpu") else target
    if (deployment := by_name.get("Engine")) is not None:
        context = contexts[deployment]
        wanted[deployment], states[deployment] = engines_wanted(
            context.target_num_replicas,
            context.policy_state or {},
            context.aggregated_metrics or {},
            gateways,
            _mean(gateways, "target_s") or 30.0,
        )
    return wanted, states


class EnginePolicy:
    """The deployment's own, for files without `autoscaling_policy`: it does not see what gateways refuse."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, context: Any) -> tuple[int, State]:
        metrics, state = context.aggregated_metrics or {}, context.policy_state or {}
        return engines_wanted(context.target_num_replicas, state, metrics, {}, self._target_s)

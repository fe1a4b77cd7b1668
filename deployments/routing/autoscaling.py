"""How many pipelines the load needs: a pure function of what the replicas report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENS_IN_FLIGHT = "tokens_in_flight"  # prompt and output tokens of running requests
WAITING_TOKENS = "waiting_tokens"  # prompt tokens of requests that no pipeline has begun
KV_USE = "kv_use"  # share of KV blocks in use, 0 to 1


@dataclass(frozen=True, slots=True)
class Targets:
    """What one pipeline should carry."""

    tokens_in_flight: float
    waiting_tokens: float
    kv_use: float


def desired_replicas(current: int, load: Mapping[str, float], targets: Targets) -> int:
    """The number of replicas that brings every signal to its target; at least one.

    `load` holds, per signal, the sum over the replicas running now.
    """
    needs = (
        load[TOKENS_IN_FLIGHT] / targets.tokens_in_flight,
        current + load[WAITING_TOKENS] / targets.waiting_tokens if load[WAITING_TOKENS] > targets.waiting_tokens else 0,
        load[KV_USE] / targets.kv_use,  # the sum of shares is the number of caches filled
    )
    return max(1, math.ceil(max(needs)))


class TokenPolicy:
    """The policy Ray Serve calls; bounds and delays are applied around it by Serve."""

    def __init__(self, tokens_in_flight: float, waiting_tokens: float, kv_use: float) -> None:
        self._targets = Targets(tokens_in_flight, waiting_tokens, kv_use)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context` is Serve's AutoscalingContext."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        load = {name: sum(metrics.get(name, {}).values()) for name in (TOKENS_IN_FLIGHT, WAITING_TOKENS, KV_USE)}
        running = len(context.running_replicas)
        if running < context.target_num_replicas or not running:
            # Replicas that are still loading count: asking for more because they do not help yet overshoots.
            return context.target_num_replicas, {}
        return desired_replicas(running, load, self._targets), {}

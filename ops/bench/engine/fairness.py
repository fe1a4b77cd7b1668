"""Two tenants in front of one engine, one with ten times the demand: `caravan bench fairness`.

The scheduler is the real one, filled as the engine fills it; time is simulated, with the step times of a stage of
Llama 2 70B on an H200, so that minutes of traffic take seconds and give the same numbers on any machine.
"""

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cluster.pipeline import max_in_flight
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import Request
from model.batch import Batch, StepOutput
from model.sampling_params import SamplingParams
from ops.bench.engine.simulated import SimulatedStages
from ops.bench.service.load import percentiles

DEPTH, MAX_SEQS, MAX_BATCHED, BLOCKS, BLOCK_SIZE = 2, 128, 1024, 6000, 16
WARM_UP_S = 60.0


def step_seconds(num_tokens: int) -> float:
    """One step of one stage: measured 18 ms for few tokens (its weights are read), 0.12 ms a token for many."""
    return max(0.018 + 0.000055 * num_tokens, 0.00012 * num_tokens)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Requests that arrive by themselves (Poisson), all alike on average."""

    name: str
    rate: float  # requests/s
    weight: float = 1.0
    mean_prompt: int = 200
    mean_output: int = 200


@dataclass(slots=True)
class Seen:
    """One request, in simulated seconds."""

    arrived: float
    first: float = 0.0
    tokens: list[float] = field(default_factory=list)


class Simulation:
    """The scheduler, a pipeline of `DEPTH` stages that only takes time, and its clock."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            BlockManager(BLOCKS, BLOCK_SIZE, prefix_caching=False),
            depth=DEPTH,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_BATCHED,
            max_model_len=4096,
        )
        self.now = 0.0
        self.requests: dict[str, Seen] = {}
        self._stages = SimulatedStages(DEPTH, step_seconds)
        self._in_flight: deque[tuple[Batch, float]] = deque()

    def run(self, arrivals: Iterator[tuple[float, Request]], seconds: float) -> None:
        """Until the clock says `seconds`."""
        next_arrival = next(arrivals)
        while self.now < seconds:
            while len(self._in_flight) < max_in_flight(DEPTH) and (batch := self.scheduler.schedule()) is not None:
                self._in_flight.append((batch, self._stages.compute(batch, self.now)))
            if not self._in_flight or next_arrival[0] < self._in_flight[0][1]:
                self.now = max(self.now, next_arrival[0])
                self.requests[next_arrival[1].request_id] = Seen(next_arrival[0])
                self.scheduler.add(next_arrival[1])
                next_arrival = next(arrivals)
            else:
                self._take(*self._in_flight.popleft())

    def _take(self, batch: Batch, finished: float) -> None:
        self.now = finished
        output = StepOutput(batch.epoch, batch.step_id, [7] * len(batch.sample_rows), {})
        for event in self.scheduler.update(batch, output):
            seen = self.requests[event.request_id]
            seen.first = seen.first or finished
            seen.tokens.append(finished)


def arrivals(tenants: list[Tenant], seed: int) -> Iterator[tuple[float, Request]]:
    """Every tenant's requests in order of time, without end."""
    rngs = [random.Random(f"{seed} {tenant.name}") for tenant in tenants]  # the same in any company
    heap = [(rng.expovariate(tenant.rate), i) for i, (tenant, rng) in enumerate(zip(tenants, rngs, strict=True))]
    heapq.heapify(heap)
    number = 0
    while True:
        at, i = heap[0]
        tenant, rng = tenants[i], rngs[i]
        prompt = [1] * max(1, round(rng.gammavariate(3, tenant.mean_prompt / 3)))
        output = max(1, round(rng.gammavariate(3, tenant.mean_output / 3)))
        yield (
            at,
            Request(
                request_id=f"{tenant.name}-{number}",
                token_ids=prompt[:2000],
                sampling=SamplingParams(max_tokens=min(output, 2000), seed=0, temperature=0.0),
                tenant=tenant.name,
                weight=tenant.weight,
            ),
        )
        number += 1
        heapq.heapreplace(heap, (at + rng.expovariate(tenant.rate), i))


def simulate(tenants: list[Tenant], seconds: float, seed: int = 0) -> dict[str, dict[str, float]]:
    """Output tokens/s and TTFT of each tenant after the warm-up."""
    simulation = Simulation()
    simulation.run(arrivals(tenants, seed), seconds)
    result = {}
    for tenant in tenants:
        own = [seen for name, seen in simulation.requests.items() if name.startswith(f"{tenant.name}-")]
        steady = [seen for seen in own if seen.arrived > WARM_UP_S and seen.arrived < seconds - 5]
        tokens = sum(at > WARM_UP_S for seen in own for at in seen.tokens)
        ttft = percentiles([(seen.first or seconds) - seen.arrived for seen in steady])
        result[tenant.name] = {
            "demand": round(tenant.rate * tenant.mean_output, 1),
            "output_throughput": round(tokens / (seconds - WARM_UP_S), 1),
            "ttft_p50_s": round(ttft["p50"], 4),
            "ttft_p99_s": round(ttft["p99"], 4),
        }
    result["engine"] = {"preemptions": simulation.scheduler.stats().preemptions}
    return result


def bench_fairness(shares: list[float], seconds: float) -> list[dict[str, Any]]:
    """A small tenant that wants such shares of the engine, alone and beside one that wants ten times as much."""
    saturated = simulate([Tenant("greedy", 100.0)], seconds)["greedy"]["output_throughput"]
    results = []
    for share in shares:
        small = Tenant("small", share * saturated / 200)
        greedy = Tenant("greedy", 10 * small.rate)
        alone, both = simulate([small], seconds), simulate([small, greedy], seconds)
        fair = min(alone["small"]["output_throughput"], saturated / 2)
        results.append(
            {
                "share_wanted": share,
                "capacity": saturated,
                "fair_share": round(fair, 1),
                "alone": alone["small"],
                "small": both["small"],
                "greedy": both["greedy"],
                "preemptions": both["engine"]["preemptions"],
                "of_fair_share": round(both["small"]["output_throughput"] / fair, 3),
                "ttft_p50_ratio": round(both["small"]["ttft_p50_s"] / alone["small"]["ttft_p50_s"], 2),
                "ttft_p99_ratio": round(both["small"]["ttft_p99_s"] / alone["small"]["ttft_p99_s"], 2),
            }
        )
    return results


def fairness_table(results: list[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table(
        "small wants", "gets, of its fair share", "TTFT p50 alone", "beside greedy", "ratio p50", "ratio p99",
        "greedy gets tok/s", title=f"{results[0]['capacity']:.0f} tok/s to share; greedy wants ten times as much",
    )  # fmt: skip
    for r in results:
        shown.add_row(
            f"{r['share_wanted']:.0%}", f"{r['of_fair_share']:.1%}", f"{1000 * r['alone']['ttft_p50_s']:.0f} ms",
            f"{1000 * r['small']['ttft_p50_s']:.0f} ms", f"{r['ttft_p50_ratio']:.2f}", f"{r['ttft_p99_ratio']:.2f}",
            f"{r['greedy']['output_throughput']:.0f}",
        )  # fmt: skip
    return shown

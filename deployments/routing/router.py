"""Routing to the engine replica with the most room."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

if TYPE_CHECKING:
    from deployments.routing.assignments import Assignments

STALE_S = 5.0  # replicas report twice a second
LAST = 1e6  # the score of a replica that is chosen only if there is no other one
AS_GOOD = 0.1  # scores so much apart tell nothing: reports are a second old, and others route by them too


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of one replica when a request is routed."""

    kv_use: float  # share of KV blocks in use, 0 to 1, as last reported
    waiting: int  # requests waiting for KV room, as last reported
    routed: int  # requests this gateway has sent since that report
    is_doubtful: bool = False  # it is rebuilding its pipeline, or has not been heard of lately
    open: int = 0  # requests of this gateway that are open there


def load_score(load: Load, sequences_per_replica: int) -> float:
    """Lower is better: KV in use, plus what waits or is on its way, counted in shares of a full replica."""
    score = load.kv_use + (load.waiting + load.routed) / sequences_per_replica
    return score + LAST if load.is_doubtful else score


def ranking(loads: Sequence[Load], sequences_per_replica: int) -> list[int]:
    """Indices of `loads`, the replica with the most room first.

    Of those with about as much, the one on which this gateway has the fewest requests comes first. Every gateway knows
    the same reports, so all would send to the same replica until the next one; of what it has sent itself it knows
    more, and where each gateway spreads its own evenly, so are all.
    """
    scores = [load_score(load, sequences_per_replica) for load in loads]
    as_good = min(scores, default=0.0) + AS_GOOD

    def rank(i: int) -> tuple[bool, int, float]:
        return scores[i] > as_good, loads[i].open if scores[i] <= as_good else 0, scores[i]

    return sorted(range(len(loads)), key=rank)


class MostRoomRouter(FIFOMixin, RequestRouter):
    """Ranks replicas by their reported room and by what this gateway itself has sent."""

    def initialize_state(self, sequences_per_replica: int = 64, **_: Any) -> None:
        self._sequences_per_replica = sequences_per_replica
        self._reports: dict[ReplicaID, tuple[Any, float]] = {}  # the last report, and when it came
        self._routed: Counter[ReplicaID] = Counter()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve says which replicas run; one that is about to go is not among them any more."""
        super().update_replicas(replicas)
        _assignments().set_running({replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        loads = [self._load(replica) for replica in candidate_replicas]
        ranked = [candidate_replicas[i] for i in ranking(loads, self._sequences_per_replica)]
        if pending_request is not None and ranked:
            # What the first choice does not answer would otherwise be on nobody's books.
            _assignments().assign(_request_id(pending_request), ranked[0].replica_id.unique_id)
        return [[replica] for replica in ranked]

    def _load(self, replica: RunningReplica) -> Load:
        stats, replica_id, now = replica.routing_stats, replica.replica_id, time.monotonic()
        report, came = self._reports.get(replica_id, (None, now))
        if report != stats.get("report"):
            report, came = stats.get("report"), now
            self._routed[replica_id] = 0  # whatever was routed before is in the report now
            _assignments().reported(replica_id.unique_id)
        self._reports[replica_id] = report, came
        doubtful = (
            not stats.get("ready", True)
            or now - came > STALE_S
            or _assignments().is_doubtful(replica_id.unique_id)
        )  # fmt: skip
        here = _assignments().count(replica_id.unique_id)
        return Load(stats.get("kv_use", 0.0), stats.get("waiting", 0), self._routed[replica_id], doubtful, here)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._routed[replica_id] += 1
        _assignments().assign(_request_id(pending_request), replica_id.unique_id)


def _request_id(pending: PendingRequest) -> str:
    """The first argument of `EngineReplica.generate`."""
    return str(pending.args[0]) if pending.args else ""


def _assignments() -> "Assignments":
    """Imported where it is used: Serve ships this class by value, with copies of whatever it refers to."""
    from deployments.routing.assignments import ASSIGNMENTS

    return ASSIGNMENTS

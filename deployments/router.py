"""Routing to the engine replica with the most room."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of one replica when a request is routed."""

    kv_use: float  # share of KV blocks in use, 0 to 1, as last reported
    waiting: int  # requests waiting for KV room, as last reported
    routed: int  # requests this gateway has sent since that report


def load_score(load: Load, sequences_per_replica: int) -> float:
    """Lower is better: KV in use, plus what waits or is on its way, counted in shares of a full replica."""
    return load.kv_use + (load.waiting + load.routed) / sequences_per_replica


class MostRoomRouter(FIFOMixin, RequestRouter):
    """Ranks replicas by their reported room, corrected by what this gateway routed since the report."""

    def initialize_state(self, sequences_per_replica: int = 64, **_: Any) -> None:
        self._sequences_per_replica = sequences_per_replica
        self._reports: dict[ReplicaID, Any] = {}
        self._routed: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranked = sorted(candidate_replicas, key=self._score)
        return [[replica] for replica in ranked]

    def _score(self, replica: RunningReplica) -> float:
        stats = replica.routing_stats
        replica_id = replica.replica_id
        if self._reports.get(replica_id) != stats.get("report"):
            self._reports[replica_id] = stats.get("report")
            self._routed[replica_id] = 0  # whatever was routed before is in the report now
        load = Load(stats.get("kv_use", 0.0), stats.get("waiting", 0), self._routed[replica_id])
        return load_score(load, self._sequences_per_replica)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._routed[replica_id] += 1

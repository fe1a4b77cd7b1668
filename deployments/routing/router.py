"""Serve's router: which engine replica a request goes to is `Outlook`'s to say."""

import time
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

if TYPE_CHECKING:
    from deployments.routing.assignments import Assignments
    from deployments.routing.outlook import Outlook


class LeastWorkRouter(FIFOMixin, RequestRouter):
    """Sends a request where least work lies before it: what its prompt still needs computed, and what waits there."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve says which replicas run; one that is about to go is not among them any more."""
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        _assignments().set_running(names)
        _outlook().forget_all_but(names)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        now = time.monotonic()
        for replica in candidate_replicas:
            self._hear(replica, now)
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        doubtful = {name for name in names if _assignments().is_doubtful(name)}
        request_id = _request_id(pending_request) if pending_request is not None else ""
        ranked = _outlook().rank(names, _assignments().prompt_of(request_id), now, doubtful)
        if ranked and request_id:
            # What the first choice does not answer would otherwise be on nobody's books.
            _assignments().assign(request_id, names[ranked[0]])
        return [[candidate_replicas[i]] for i in ranked]

    @staticmethod
    def _hear(replica: RunningReplica, now: float) -> None:
        """What Serve has last heard of it."""
        stats, name = replica.routing_stats, replica.replica_id.unique_id
        if _outlook().hear(name, stats, now):
            _assignments().reported(name)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request_id, name = _request_id(pending_request), replica_id.unique_id
        _assignments().assign(request_id, name)
        _outlook().send(name, _assignments().prompt_of(request_id), time.monotonic())


def _request_id(pending: PendingRequest) -> str:
    """The first argument of `EngineReplica.generate`."""
    return str(pending.args[0]) if pending.args else ""


def _assignments() -> "Assignments":
    """Imported where it is used: Serve ships this class by value, with copies of whatever it refers to."""
    from deployments.routing.assignments import ASSIGNMENTS

    return ASSIGNMENTS


def _outlook() -> "Outlook":
    from deployments.routing.outlook import OUTLOOK

    return OUTLOOK

"""What each engine replica says of itself, on a board that every gateway can read.

The board is Ray's own key-value store (in the GCS): a replica that is still loading serves no calls yet, but its
gateway must be able to say "loading 43 %".

Clocks of two nodes are never compared: a reader counts by its own how long a replica has said nothing new.
"""

import math
import os
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from cluster.scheduling.prefix import Digest

State = Literal["loading", "ready", "stalled", "failed"]
NAMESPACE, DIGESTS, RESETS = b"caravan", b"caravan-digests", b"caravan-resets"
LIST_PERIOD_S = 2.0  # how often a reader asks who has come
FORGET_AFTER_S = 60.0  # a replica that died without a word leaves the board after this


class StageStatus(msgspec.Struct, frozen=True):
    """One stage in the last seconds in which steps were computed."""

    node: str
    gpu: str  # those that it has there, by Ray's numbers; empty on a CPU
    busy: float  # shares of its time
    waiting: float
    transfer: float
    step_ms: float


class PastRecovery(msgspec.Struct, frozen=True):
    """One time at which the pipeline was rebuilt."""

    cause: str
    seconds: float
    ago_s: float  # when this was said


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as it says itself."""

    replica: str
    state: State
    reason: str  # why it is not ready, in plain words; empty if it is
    loaded: float  # share of the weights, 0 to 1
    updated_at: float  # by the replica's own clock: it says whether this is news, not how old
    running: int
    waiting: int
    waiting_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    max_model_len: int
    running_tokens: int = 0
    block_size: int = 0  # tokens per KV block
    max_num_seqs: int = 0
    prefill_rate: float = 0.0  # prompt tokens/s while prompts are computed
    decode_rate: float = 0.0  # output tokens/s while anything is computed
    generated_tokens: int = 0  # for clients, in all
    stages: list[StageStatus] = []
    recoveries: list[PastRecovery] = []  # the last ones
    age_s: float = 0.0  # since its news came, by the clock of whoever has read it


def publish(app: str, status: ReplicaStatus) -> None:
    """Put a replica's status on the board, in place of its last one."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_key(app, status.replica), msgspec.msgpack.encode(status), namespace=NAMESPACE)


class Sightings:
    """When each replica last had news for one reader. What was there at the first look counts as news of that time."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # replica -> its `updated_at`, and when that came

    def aged(self, found: Iterable[ReplicaStatus], now: float) -> list[ReplicaStatus]:
        """Those that have spoken lately, with their ages. `now` is by `time.monotonic`."""
        before, self._seen = self._seen, {}
        statuses = []
        for status in found:
            stamp, came = before.get(status.replica, (None, now))
            came = came if stamp == status.updated_at else now
            self._seen[status.replica] = status.updated_at, came
            if now - came < FORGET_AFTER_S:
                statuses.append(msgspec.structs.replace(status, age_s=now - came))
        return statuses


def remove(app: str, replica: str) -> None:
    """Take a replica that ends properly off the board."""
    from ray.experimental import internal_kv

    for namespace in (NAMESPACE, DIGESTS):
        internal_kv._internal_kv_del(_key(app, replica), namespace=namespace)


def order_reset(app: str) -> None:
    """All engines of `app` are to forget what they have cached."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(app.encode(), os.urandom(8), namespace=RESETS)


def last_reset(app: str) -> bytes | None:
    """The last such order, which differs from all others; None if there was none."""
    from ray.experimental import internal_kv

    found: bytes | None = internal_kv._internal_kv_get(app.encode(), namespace=RESETS)
    return found


def publish_digest(app: str, replica: str, digest: Digest) -> None:
    """What its KV cache holds: larger than its status, and read by routers alone."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_key(app, replica), msgspec.msgpack.encode(digest), namespace=DIGESTS)


def read_digests(app: str, replicas: Iterable[str]) -> dict[str, Digest]:
    """Of those that have said what they hold."""
    from ray.experimental import internal_kv

    values = {name: internal_kv._internal_kv_get(_key(app, name), namespace=DIGESTS) for name in replicas}
    return {name: msgspec.msgpack.decode(value, type=Digest) for name, value in values.items() if value}


class Reader:
    """One reader of the board. A look costs the control plane one call; now and then one more, for who has come."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._sightings = Sightings()
        self._keys: list[bytes] = []
        self._listed_at = -math.inf

    def look(self) -> list[ReplicaStatus]:
        """All that have spoken lately. Whoever has died without a word is taken off the board after a while."""
        from ray.experimental import internal_kv

        now = time.monotonic()
        if now - self._listed_at > LIST_PERIOD_S:
            self._keys = list(internal_kv._internal_kv_list(_key(self._app, ""), namespace=NAMESPACE))
            self._listed_at = now
        if not self._keys:
            return []
        found = internal_kv.internal_kv_get_gcs_client().internal_kv_multi_get(self._keys, NAMESPACE)
        statuses = [msgspec.msgpack.decode(value, type=ReplicaStatus) for value in found.values() if value]
        alive = self._sightings.aged(statuses, now)
        for replica in {status.replica for status in statuses} - {status.replica for status in alive}:
            remove(self._app, replica)  # should it live after all, it says so within a second
            self._keys.remove(_key(self._app, replica))
        return alive


def _key(app: str, replica: str) -> bytes:
    return f"{app}/{replica}".encode()

"""What each engine replica says of itself, on a board that every gateway can read.

The board is Ray's own key-value store (in the GCS): a replica that is still loading serves no calls yet, but its
gateway must be able to say "loading 43 %".
"""

import time
from typing import Literal

import msgspec

State = Literal["loading", "ready", "stalled", "failed"]
NAMESPACE = b"caravan"
FORGET_AFTER_S = 60.0  # a replica that died without a word leaves the board after this


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as of `updated_at` (unix seconds)."""

    replica: str
    state: State
    reason: str  # why it is not ready, in plain words; empty if it is
    loaded: float  # share of the weights, 0 to 1
    updated_at: float
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


def publish(app: str, status: ReplicaStatus) -> None:
    """Put a replica's status on the board, in place of its last one."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_key(app, status.replica), msgspec.msgpack.encode(status), namespace=NAMESPACE)


def read(app: str) -> list[ReplicaStatus]:
    """All replicas that have spoken lately."""
    from ray.experimental import internal_kv

    keys = internal_kv._internal_kv_list(_key(app, ""), namespace=NAMESPACE)
    values = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    found = [msgspec.msgpack.decode(value, type=ReplicaStatus) for value in values if value]
    return [status for status in found if time.time() - status.updated_at < FORGET_AFTER_S]


def remove(app: str, replica: str) -> None:
    """Take a replica that ends properly off the board."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(_key(app, replica), namespace=NAMESPACE)


def _key(app: str, replica: str) -> bytes:
    return f"{app}/{replica}".encode()

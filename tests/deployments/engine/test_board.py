"""How old a replica's news is, whatever its clock says."""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from ray.experimental import internal_kv

from deployments.engine import board
from deployments.engine.board import FORGET_AFTER_S, ReplicaStatus, Sightings


def status(replica: str, clock: float) -> ReplicaStatus:
    return ReplicaStatus(
        replica=replica, state="ready", reason="", loaded=1.0, updated_at=clock, running=0, waiting=0, waiting_tokens=0,
        kv_blocks_used=0, kv_blocks_total=1, max_model_len=1,
    )  # fmt: skip


def ages(sightings: Sightings, now: float, **clocks: float) -> dict[str, float]:
    return {s.replica: s.age_s for s in sightings.aged([status(name, clock) for name, clock in clocks.items()], now)}


def test_clocks_that_differ_make_nobody_old() -> None:
    """One node is an hour behind, one ten seconds ahead, one is set back in the middle: all report every second."""
    sightings = Sightings()
    for second in range(30):
        back = 500.0 - (100.0 if second > 15 else 0.0)
        found = ages(sightings, 1000.0 + second, behind=second - 3600.0, ahead=second + 1e9, back=back + second)
        assert found == {"behind": 0.0, "ahead": 0.0, "back": 0.0}


def test_whoever_says_nothing_new_grows_old_and_is_forgotten_in_the_end() -> None:
    sightings = Sightings()
    for second in range(int(FORGET_AFTER_S) + 5):
        found = ages(sightings, float(second), lives=float(second), dead=7.0)
        assert found["lives"] == 0.0
        assert found.get("dead") == (float(second) if second < FORGET_AFTER_S else None)
    assert ages(sightings, 100.0, dead=8.0) == {"dead": 0.0}, "it has come back"
    assert ages(sightings, 101.0) == {}
    assert ages(sightings, 102.0, dead=8.0) == {"dead": 0.0}, "and was away in between"


class Kept:
    """Ray's key-value store, counting calls."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.calls: Counter[str] = Counter()

    def put(self, key: bytes, value: bytes, namespace: bytes) -> None:
        self.values[key] = value

    def list(self, prefix: bytes, namespace: bytes) -> list[bytes]:
        self.calls["list"] += 1
        return [key for key in self.values if key.startswith(prefix)]

    def delete(self, key: bytes, namespace: bytes) -> None:
        self.values.pop(key, None)

    def internal_kv_multi_get(self, keys: Sequence[bytes], namespace: bytes) -> dict[bytes, bytes]:
        self.calls["get"] += 1
        return {key: self.values[key] for key in keys if key in self.values}


def test_the_dead_are_forgotten_and_a_look_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 500 that died without a word nothing is left; before, each look asked for each of them."""
    kept, clock = Kept(), [1000.0]
    monkeypatch.setattr(internal_kv, "_internal_kv_put", kept.put)
    monkeypatch.setattr(internal_kv, "_internal_kv_list", kept.list)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", kept.delete)
    monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda: kept)
    monkeypatch.setattr(board, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reader = board.Reader("app")
    assert reader.look() == []
    for i in range(500):
        board.publish("app", status(f"dead-{i}", 7.0))
    board.publish("other", status("theirs", 7.0))
    looks = 0
    while clock[0] < 1000 + FORGET_AFTER_S + 5:
        clock[0] += 0.5
        board.publish("app", status("lives", clock[0]))
        found = reader.look()
        looks += 1
        assert looks < 5 or "lives" in {s.replica for s in found}
    assert {s.replica for s in found} == {"lives"}
    assert set(kept.values) == {b"app/lives", b"other/theirs"}
    assert looks - 6 < kept.calls["get"] <= looks, "none while nobody was known"
    assert kept.calls["list"] <= looks / 4 + 2

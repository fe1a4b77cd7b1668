"""Copies of KV blocks in host memory, with real stages: what comes back is what went, or is computed again."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import StageDied
from cluster.scheduling.host_tier import HostTier
from cluster.scheduling.prefix import HASH_BYTES
from cluster.scheduling.rates import Durations
from model.batch import Copies
from model.host_copies.arena import HostArena
from tests.conftest import Collector, MakeEngine, request

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
PROMPTS = [[(17 * i + j) % 97 + 1 for j in range(40 + i)] for i in range(6)]  # 6 of 10 to 12 blocks


def settle(engine: "object") -> None:
    """Until nothing is being copied."""
    host = engine.scheduler.blocks.host  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    while (host.num_orders or host._wanted) and time.monotonic() < deadline:
        engine.pipeline.wake()  # type: ignore[attr-defined]
        time.sleep(0.01)
    assert not host.num_orders


def ask(engine: "object", collector: Collector, names: str) -> dict[str, list[int]]:
    """Each prompt, one after another: there is room for one or two."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(PROMPTS):
        engine.add(request(f"{names}{i}", prompt, max_tokens=9))  # type: ignore[attr-defined]
        found |= collector.wait([f"{names}{i}"])
    return {name[len(names) :]: tokens for name, tokens in found.items()}


def cached(collector: Collector, name: str) -> int:
    return max(event.num_cached_tokens for event in collector.events[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stages", [1, 2])
def test_what_was_evicted_comes_back_and_says_the_same(
    make_engine: MakeEngine, tmp_path: Path, device: str, stages: int
) -> None:
    engine, collector = make_engine(stages, num_blocks=30, device=device, host_places=200, copies=tmp_path)
    expected = ask(engine, collector, "first")
    settle(engine)
    assert ask(engine, collector, "again") == expected
    stats = engine.scheduler.stats()
    assert stats.host_hit_tokens >= 5 * 36, stats
    assert stats.host.damaged == 0
    assert cached(collector, "again0") >= 36, "usage tells of both tiers"


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_damaged_is_computed_again(make_engine: MakeEngine, tmp_path: Path, device: str) -> None:
    """One bit of every fifth copy, wherever it lies."""
    engine, collector = make_engine(2, num_blocks=30, device=device, host_places=200, copies=tmp_path)
    expected = ask(engine, collector, "first")
    settle(engine)
    stage = engine.pipeline._stages[1]  # type: ignore[attr-defined]
    places = stage.copier._arenas[0].places
    for place in range(0, len(places), 5):
        places[place, (place * 31) % places.shape[1]] ^= 4
    assert ask(engine, collector, "again") == expected
    assert ask(engine, collector, "third") == expected
    stats = engine.scheduler.stats()
    assert stats.host.damaged >= 5
    assert stats.host_hit_tokens > 0


@pytest.mark.parametrize("stages", [1, 3])
def test_lost_stages_find_what_they_had_computed(make_engine: MakeEngine, tmp_path: Path, stages: int) -> None:
    """Whoever is in mid answer goes on with copies; what they say is what they would have said."""
    alone, whole = make_engine(stages, num_blocks=400)
    engine, collector = make_engine(stages, num_blocks=400, host_places=400, copies=tmp_path)
    for i, prompt in enumerate(PROMPTS):
        for one in (alone, engine):
            one.add(request(f"{i}", prompt, max_tokens=150))
    while not all(len(collector.tokens(f"{i}")) > 60 for i in range(len(PROMPTS))):
        time.sleep(0.005)
    run = engine.pipeline._run  # type: ignore[attr-defined]

    def with_new_memory(epoch: int) -> None:
        """The device's; that of the host is as another process would find it."""
        for stage in engine.pipeline._stages:  # type: ignore[attr-defined]
            for storage in stage.kv.storages:
                storage.fill_(3)
            stage.copier.close(keep=True)
        for i, stage in enumerate(engine.pipeline._stages):  # type: ignore[attr-defined]
            stage.keep_copies("tests", f"stage {i}", 400, tmp_path)
        run(epoch)

    engine.pipeline._run = with_new_memory  # type: ignore[attr-defined]
    engine.pipeline._end(0, engine.pipeline._control, StageDied("killed", "killed"))  # type: ignore[attr-defined]
    names = [f"{i}" for i in range(len(PROMPTS))]
    assert collector.wait(names) == whole.wait(names)
    assert collector.recoveries
    assert engine.scheduler.stats().host_hit_tokens >= len(PROMPTS) * 60
    assert engine.scheduler.stats().host.damaged == 0


def test_all_is_forgotten_when_an_operator_says_so(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine, collector = make_engine(1, num_blocks=100, host_places=200, copies=tmp_path)
    expected = ask(engine, collector, "first")
    settle(engine)
    engine.reset_cache()
    assert ask(engine, collector, "again") == expected
    assert [cached(collector, f"again{i}") for i in range(6)] == [0] * 6
    assert ask(engine, collector, "third") == expected
    assert cached(collector, "third0") >= 36


def test_an_arena_is_found_by_whoever_comes_for_the_same_and_by_nobody_else(tmp_path: Path) -> None:
    def arena(family: str = "f", member: str = "stage 0", block_bytes: int = 64) -> HostArena:
        return HostArena(family, member, 10, block_bytes, tmp_path)

    names = bytes(range(HASH_BYTES)) + bytes(range(1, HASH_BYTES + 1))
    first = arena()
    first.keep([3, 4], names, [7, 8])
    first.places[3] = 9
    assert arena().is_new, "somebody holds it"
    other = arena(member="stage 1")
    other.close(keep=True)
    first.close(keep=True)
    again = arena()
    assert not again.is_new
    assert again.sums([4, 3, 0], names[HASH_BYTES:] + names[:HASH_BYTES] + names[:HASH_BYTES]) == [8, 7, None]
    assert again.sums([3], names[HASH_BYTES:]) == [None]
    assert again.places[3].tolist() == [9] * 64
    again.begin([3])
    assert again.sums([3], names[:HASH_BYTES]) == [None]
    assert not arena(member="stage 1").is_new, "neighbours leave each other's alone"
    again.close(keep=True)
    assert arena(family="another model").is_new
    assert arena().is_new, "what is of no use any more has made room"
    with pytest.raises(ValueError, match=r"cache\.host_gb: a stage needs .* GB in"):
        HostArena("f", "huge", 10, 10**14, tmp_path)


def test_copies_are_worth_it_if_they_are_quicker_than_computing() -> None:
    host = HostTier(10, 4, 1)
    assert host.is_worth(1, 16), "nothing is known yet"
    assert not host.is_worth(0, 16)
    for size in (10, 200, 100, 10, 150):
        host.copying.add(size, 0.02 + size * 1e-4)
    host.computing.add(7000, 1.0)
    assert abs(host.copying.seconds(50) - 0.025) < 1e-3
    assert not host.is_worth(5, 16), "11 ms to compute, 20 to copy"
    assert host.is_worth(200, 16)
    same = Durations()
    same.add(10, 1.0)
    assert same.seconds(20) == pytest.approx(2.0)
    assert same.seconds(5) == pytest.approx(1.0)


def test_what_is_copied_out_is_what_was_computed_before(make_engine: MakeEngine, tmp_path: Path) -> None:
    """Blocks of every layer and kind, in both directions, through a stage alone."""
    engine, _ = make_engine(1, num_blocks=20, host_places=20, copies=tmp_path)
    stage = engine.pipeline._stages[0]  # type: ignore[attr-defined]
    for storage in stage.kv.storages:
        storage.copy_(torch.randn_like(storage))
    before = [storage.clone() for storage in stage.kv.storages]
    names = b"".join(bytes([i]) * HASH_BYTES for i in range(1, 4))
    none = np.empty(0, np.int32)
    out = Copies(0, 0, np.array([5, 2, 9], np.int32), np.array([1, 7, 3], np.int32), names, none, none, b"")
    assert stage.copier.finish(stage.copier.start(out)) == []
    back = Copies(0, 1, none, none, b"", np.array([1, 7, 3], np.int32), np.array([15, 16, 17], np.int32), names)
    assert stage.copier.finish(stage.copier.start(back)) == []
    for storage, was in zip(stage.kv.storages, before, strict=True):
        assert torch.equal(storage[:, 15:18], was[:, [5, 2, 9]])
        assert torch.equal(storage[:, :15], was[:, :15])
    wrong = Copies(0, 2, none, none, b"", np.array([7, 1], np.int32), np.array([15, 16], np.int32), names[: 2 * 16])
    assert stage.copier.finish(stage.copier.start(wrong)) == [0, 1]

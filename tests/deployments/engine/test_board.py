"""How old a replica's news is, whatever its clock says."""

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

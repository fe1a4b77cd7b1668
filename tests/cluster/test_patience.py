"""How long a step may take: scales with the work, learns, and is never above the ceiling."""

from cluster.patience import FACTOR, FRESH_STEPS, Patience


def seasoned(*steps: tuple[int, float], floor: float = 3.0, ceiling: float = 60.0) -> Patience:
    patience = Patience(floor, ceiling)
    for num_tokens, seconds in steps:
        for _ in range(FRESH_STEPS):
            patience.observe(num_tokens, seconds)
    return patience


def test_nothing_known_is_the_ceiling() -> None:
    assert Patience(3.0, 60.0).limit(1) == 60.0


def test_the_limit_scales_with_what_such_a_step_took() -> None:
    patience = seasoned((8, 0.02), (512, 0.5))
    assert patience.limit(8) == 3.0 + FACTOR * 0.02
    assert patience.limit(600) == 3.0 + FACTOR * 0.5
    assert patience.limit(1) == 3.0 + FACTOR * 0.02, "smaller than any seen: as the smallest seen"
    assert patience.limit(2048) == 3.0 + FACTOR * 0.5 * 4, "larger than any seen: scaled up"
    assert patience.limit(32) == 3.0 + FACTOR * 0.02 * 4, "in between: scaled up from below"


def test_one_slow_step_is_forgotten_in_time() -> None:
    patience = seasoned((8, 0.02))
    patience.observe(8, 4.0)
    assert patience.limit(8) == 43.0
    for _ in range(300):
        patience.observe(8, 0.02)
    assert patience.limit(8) < 3.5


def test_a_rebuilt_pipeline_gets_more_time_at_first_and_its_warm_up_does_not_count() -> None:
    patience = seasoned((8, 0.02))
    patience.restart()
    patience.observe(8, 5.0)
    assert patience.limit(8) == 3 * (3.0 + FACTOR * 0.02)
    for _ in range(FRESH_STEPS):
        patience.observe(8, 0.02)
    assert patience.limit(8) == 3.0 + FACTOR * 0.02
    patience.restart()
    patience.observe(512, 1.0)
    assert patience.limit(512) == 3 * (3.0 + FACTOR * 1.0), "a size that was never seen counts all the same"


def test_the_ceiling_holds() -> None:
    assert seasoned((8, 30.0)).limit(8) == 60.0

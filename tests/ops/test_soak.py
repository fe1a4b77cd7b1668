"""The judge of a soak: what it calls growing, and what not."""

import math
import random
from pathlib import Path

import pytest

from ops.bench.plot import over_time
from ops.bench.service.soak import Series, verdict


def series(seconds: int, value: object) -> Series:
    made = Series()
    for second in range(0, seconds, 5):
        made.add(float(second), value(second))  # type: ignore[operator]
    return made


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_is_seen_through_noise_and_peaks_and_what_fills_up_is_none(seed: int) -> None:
    rng = random.Random(seed)

    def shaken(value: float) -> float:
        return value + rng.uniform(-15, 15) + (400 if rng.random() < 0.02 else 0)

    found = verdict(
        {
            "leaks_mb": series(3600, lambda s: shaken(700 + 300 * s / 3600)),
            "fills_mb": series(3600, lambda s: shaken(900 - 200 * math.exp(-s / 300))),
            "flat_mb": series(3600, lambda s: shaken(700)),
            "shrinks_mb": series(3600, lambda s: shaken(900 - s / 20)),
            "leaks_descriptors": series(3600, lambda s: 80 + s // 180),
            "flat_descriptors": series(3600, lambda s: 80 + rng.randrange(6)),
            "leaks_threads": series(3600, lambda s: 30 + s // 300),
            "kv_blocks": series(3600, lambda s: float(s)),  # judged at rest
        }
    )
    assert set(found) == {"leaks_mb", "leaks_descriptors", "leaks_threads"}
    assert "MB an hour" in found["leaks_mb"]


def test_a_slope_is_the_median_of_pairs() -> None:
    line = series(1000, lambda s: 3.0 * s + 7)
    line.values[20] = 1e9
    assert line.slope() == pytest.approx(3.0)
    assert Series([1.0], [5.0]).slope() == 0.0


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    over_time({f"n{i}": ([0.0, 1.0], [1.0, 2.0]) for i in range(4)}, "title", tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes()[:4] == b"\x89PNG"

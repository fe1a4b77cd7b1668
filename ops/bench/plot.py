"""Plots of results as PNG files. matplotlib is imported only when one is drawn: `pip install '.[bench]'` brings it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PlotError(ValueError):
    """No plot can be drawn here; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Point:
    """One load of a sweep."""

    label: str  # the load, as it is written beside the point
    throughput: float
    latency: dict[str, float]  # by quantile: p50, p99


def check_matplotlib() -> None:
    """Raise `PlotError` if it is not installed: better before a long measurement than after it."""
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install '.[bench]', or pip install matplotlib") from error
    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    return pyplot


def throughput_latency(points: Sequence[Point], title: str, latency: str, path: Path) -> None:
    """Output tokens per second to the right, `latency` in milliseconds upwards: one curve for each quantile."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    throughputs = [p.throughput for p in points]
    for quantile in points[0].latency:
        values = [1000 * p.latency[quantile] for p in points]
        axes.plot(throughputs, values, marker="o", markersize=4, label=quantile)
    for point in points:
        at = (point.throughput, 1000 * max(point.latency.values()))
        axes.annotate(point.label, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(title=title, xlabel="output tokens per second", ylabel=f"{latency}, ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _finish(pyplot, figure, axes, path)


def over_time(series: dict[str, tuple[Sequence[float], Sequence[float]]], title: str, path: Path) -> None:
    """A small plot for each of `series`, seconds to the right."""
    pyplot = _pyplot()
    columns = 3
    rows = -(-len(series) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(12, 2.2 * rows), layout="constrained", squeeze=False)
    figure.suptitle(title)
    for axes, (name, (seconds, values)) in zip(grid.flat, sorted(series.items()), strict=False):
        axes.plot(seconds, values, linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def scaling(series: dict[str, dict[int, float]], title: str, unit: str, path: Path) -> None:
    """Throughput by number of stages for each of `series`, beside the line of its smallest pipeline multiplied."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in series.items():
        stages = sorted(values)
        (line,) = axes.plot(stages, [values[n] for n in stages], marker="o", label=name)
        ideal = [values[stages[0]] * n / stages[0] for n in stages]
        axes.plot(stages, ideal, linestyle="--", linewidth=1, color=line.get_color(), label=f"{name}, ideal")
    axes.set(title=title, xlabel="stages", ylabel=f"output tokens per second, {unit}")
    axes.set_xticks(sorted({n for values in series.values() for n in values}))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _finish(pyplot, figure, axes, path)


def _finish(pyplot: Any, figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)

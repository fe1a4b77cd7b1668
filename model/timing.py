"""When a device computed, on the host's clock: of a CPU by looking at it, of a GPU by events in its stream."""

import time
from typing import Any, Protocol

import torch


class Span(Protocol):
    """One stretch of work. All times in seconds of `time.monotonic`; they may be asked for once the span is over."""

    def has_begun(self) -> bool: ...
    def is_over(self) -> bool: ...
    def wait(self) -> float:
        """Idle time between the span before and this one."""
        ...

    def started(self) -> float: ...
    def finished(self) -> float: ...


class HostSpan:
    """Work that was over when it was asked for."""

    def __init__(self, idle_since: float, started: float, finished: float) -> None:
        self._idle_since, self._started, self._finished = idle_since, started, finished

    def has_begun(self) -> bool:
        return True

    def is_over(self) -> bool:
        return True

    def wait(self) -> float:
        return self._started - self._idle_since

    def started(self) -> float:
        return self._started

    def finished(self) -> float:
        return self._finished


class DeviceSpan:
    """Work in a CUDA stream, between two events."""

    def __init__(self, before: Any, start: Any, end: Any) -> None:
        self._before, self._start, self._end = before, start, end
        self._seen_over = 0.0

    def has_begun(self) -> bool:
        return bool(self._start.query())

    def is_over(self) -> bool:
        return bool(self._end.query())

    def wait(self) -> float:
        return float(self._before.elapsed_time(self._start)) / 1000

    def started(self) -> float:
        # Device and host share no clock: a span that is over ended just now, as far as the host can tell.
        return self.finished() - float(self._start.elapsed_time(self._end)) / 1000

    def finished(self) -> float:
        self._seen_over = self._seen_over or time.monotonic()
        return self._seen_over


class Stopwatch:
    """Makes the spans of one device, one after another."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._idle_since = self._started = time.monotonic()
        if self._on_gpu:
            self._before = self._event()

    def start(self) -> None:
        self._started = time.monotonic()
        if self._on_gpu:
            self._start = self._event()

    def stop(self) -> Span:
        if self._on_gpu:
            before, self._before = self._before, self._event()
            return DeviceSpan(before, self._start, self._before)
        before_s, self._idle_since = self._idle_since, time.monotonic()
        return HostSpan(before_s, self._started, self._idle_since)

    @staticmethod
    def _event() -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

"""How fast something is, and how long work of some size takes, as was seen last."""

import math

MEMORY_S = 5.0  # steps so many busy seconds ago weigh 1/e


class Rate:
    """Tokens per second, over seconds that fade."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self.total = 0  # tokens, of all time
        self.peak = 0.0  # the most per second that it has been

    @property
    def per_second(self) -> float:
        """0 until anything was counted."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.total += tokens
        kept = math.exp(-seconds / MEMORY_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds
        if self._seconds > 0.2 * MEMORY_S:  # a single step says little
            self.peak = max(self.peak, self.per_second)


class Durations:
    """What work of some size takes: a line through what was seen, of which older things count less."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, size: int, seconds: float) -> None:
        kept = 0.95
        self._n = self._n * kept + 1
        self._x, self._y = self._x * kept + size, self._y * kept + seconds
        self._xx, self._xy = self._xx * kept + size * size, self._xy * kept + size * seconds

    def seconds(self, size: int) -> float:
        """0 until anything was seen. Of one size alone: in proportion."""
        if not self._n:
            return 0.0
        spread = self._n * self._xx - self._x * self._x
        slope = (self._n * self._xy - self._x * self._y) / spread if spread > 1e-6 * self._xx * self._n else -1.0
        if slope <= 0:
            return self._y / self._n * max(1.0, size * self._n / self._x)
        return max(0.0, (self._y - slope * self._x) / self._n) + slope * size

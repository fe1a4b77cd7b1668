"""How fast an engine is, as its last steps show: what admission in front of it reckons with."""

import math

from cluster.engine import StepReport

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


class EngineRates:
    """Fed with the report of every step."""

    def __init__(self) -> None:
        self.prefill = Rate()  # prompt tokens, in steps that compute some
        self.decode = Rate()  # output tokens, in all steps

    def add(self, report: StepReport) -> None:
        if report.num_prefill_tokens:
            self.prefill.add(report.num_prefill_tokens, report.seconds)
        self.decode.add(report.num_sampled, report.seconds)

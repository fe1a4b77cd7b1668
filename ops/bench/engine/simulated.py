"""Stages that only take time, and that simulated: for a scheduler that knows no clock."""

from collections.abc import Callable

from model.batch import Batch


class SimulatedStages:
    """Steps pass them in order. The first one waits for tokens that a step needs, as the real one does."""

    def __init__(self, depth: int, step_seconds: Callable[[int], float], tokens_back_s: float = 0.0) -> None:
        """`step_seconds`: what a stage takes for so many tokens; `tokens_back_s`: the way from last to first."""
        self.busy = 0.0  # seconds that each of them has computed
        self._step_seconds, self._tokens_back_s = step_seconds, tokens_back_s
        self._free = [0.0] * depth  # when each is done with what it was given
        self._known: dict[int, float] = {}  # step -> when its tokens are back

    def compute(self, batch: Batch, now: float) -> float:
        """Give them a batch; returns when its tokens are back."""
        at, seconds = max(now, self._known.get(batch.tokens_from, 0.0)), self._step_seconds(batch.num_tokens)
        for stage, free in enumerate(self._free):
            at = self._free[stage] = max(at, free) + seconds
        self.busy += seconds
        self._known[batch.step_id] = at + self._tokens_back_s
        self._known.pop(batch.step_id - 4 * len(self._free), None)
        return at + self._tokens_back_s

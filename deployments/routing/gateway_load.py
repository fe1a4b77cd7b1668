"""What one gateway tells the scaler (`autoscaling.py`): the load that no engine knows of, and its own."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

REMEMBERED = 100  # requests whose mean prompt is taken for that of those refused unread


class GatewayLoad:
    """Counts since the last look; from any thread."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}  # request -> its prompt tokens
        self._refused = 0
        self._mean_prompt = 0.0
        self._looked_at, self._cpu = time.monotonic(), time.process_time()

    @property
    def held(self) -> int:
        """Requests that wait here because no engine runs."""
        return len(self._held)

    @contextmanager
    def holding(self, request_id: str, prompt_tokens: int) -> Iterator[None]:
        self._held[request_id] = prompt_tokens
        try:
            yield
        finally:
            del self._held[request_id]

    def taken(self, prompt_tokens: int) -> None:
        """A request with so long a prompt was admitted."""
        self._mean_prompt += (prompt_tokens - self._mean_prompt) / (REMEMBERED if self._mean_prompt else 1)

    def refused(self) -> None:
        """A request was not, for it would have waited too long."""
        self._refused += 1

    def stats(self, target_s: float) -> dict[str, float]:
        """For Serve, which takes means of them. `target_s`: the wait beyond which requests are refused."""
        now, cpu = time.monotonic(), time.process_time()
        seconds = max(1e-3, now - self._looked_at)
        refused, self._refused = self._refused, 0
        used, self._looked_at, self._cpu = cpu - self._cpu, now, cpu
        return {
            "held": float(self.held),
            "held_tokens": float(sum(list(self._held.values()))),
            "refused_per_s": refused / seconds,
            "refused_tokens_per_s": refused * self._mean_prompt / seconds,
            "target_s": target_s,
            "cpu": used / seconds,
        }

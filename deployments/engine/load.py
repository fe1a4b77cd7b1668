"""What one engine tells the scaler (`routing.autoscaling`): what it has to do, and what it can do."""

import time

from cluster.engine import Engine
from cluster.engine_rates import EngineRates
from deployments.config import AppConfig

FADES = 0.98  # with every answer that ends, what those before say of the mean length counts so much less


class EngineLoad:
    """Fed from the event loop's thread and the engine's; looked at from another one."""

    def __init__(self, config: AppConfig) -> None:
        self._config = config
        self._tokens = self._ended = 0.0
        self._begun = 0
        self._prefilled, self._looked_at = 0.0, time.monotonic()

    def begin(self) -> None:
        """A client's request has come."""
        self._begun += 1

    def add(self, tokens: int, ended: int) -> None:
        """So many tokens went to clients, and so many of their answers ended with them."""
        kept = FADES**ended
        self._tokens, self._ended = self._tokens * kept + tokens, self._ended * kept + ended

    def stats(self, engine: Engine, rates: EngineRates, open_requests: int) -> dict[str, float]:
        """For Serve, which takes means of them."""
        stats, now, prefilled = engine.stats, time.monotonic(), rates.prefill.total
        seconds, self._looked_at = max(1e-3, now - self._looked_at), now
        computed, self._prefilled = prefilled - self._prefilled, prefilled
        begun, self._begun = self._begun, 0
        return {
            "running": float(stats.running),
            "running_tokens": float(stats.running_tokens),
            "waiting": float(stats.waiting),
            "waiting_tokens": float(stats.waiting_tokens),
            "requests": float(open_requests + begun),
            "mean_output": self._tokens / self._ended if self._ended else 0.0,
            "prefilled_per_s": computed / seconds,
            "prefill_rate": rates.prefill.per_second,
            "decode_rate": rates.decode.per_second,
            "max_seqs": float(self._config.scheduler.max_num_seqs),
            "kv_tokens": float(stats.kv_blocks_total * self._config.cache.block_size),
        }

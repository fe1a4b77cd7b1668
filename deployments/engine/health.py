"""Whether an engine works: its state in plain words, and the probes that prove it when no client does."""

import os
import time

from cluster.config import EngineConfig
from cluster.engine import Engine
from cluster.engine_rates import EngineRates
from cluster.errors import EngineStopped
from cluster.scheduling.sequence import Request
from deployments.engine.board import ReplicaStatus, State
from deployments.routing.outlook import Report
from model.sampling_params import SamplingParams

PROBE_PERIOD_S = 5.0  # how often an idle pipeline proves itself with one token
OVERDUE_S = 1.0  # a step so much later than its deadline, which the engine acts on by itself
PROBE_PREFIX = "probe-"


class Health:
    """One replica's, from before it has an engine."""

    def __init__(self, replica: str, config: EngineConfig) -> None:
        self._replica = replica
        self._config = config
        self.loaded = 0.0  # share of the weights
        self.rates = EngineRates()
        self.last_token = time.monotonic()  # when one last came out of the last stage
        self._probe_sent = 0.0

    def status(self, engine: Engine | None) -> ReplicaStatus:
        """For the board."""
        state, reason = self.state(engine)
        stats = engine.stats if engine is not None else None
        return ReplicaStatus(
            replica=self._replica,
            state=state,
            reason=reason,
            loaded=self.loaded,
            updated_at=time.time(),
            running=stats.running if stats else 0,
            waiting=stats.waiting if stats else 0,
            waiting_tokens=stats.waiting_tokens if stats else 0,
            kv_blocks_used=stats.kv_blocks_used if stats else 0,
            kv_blocks_total=stats.kv_blocks_total if stats else 0,
            max_model_len=engine.scheduler.max_model_len if engine else 0,
            running_tokens=stats.running_tokens if stats else 0,
            block_size=self._config.cache.block_size,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            prefill_rate=self.rates.prefill.per_second,
            decode_rate=self.rates.decode.per_second,
        )

    def report(self, engine: Engine) -> Report:
        """For the gateways' routers."""
        stats, max_num_seqs = engine.stats, self._config.scheduler.max_num_seqs
        return Report(
            stamp=time.time(),
            queued_tokens=stats.queued_tokens,
            sequences=stats.running + stats.waiting,
            is_full=stats.waiting > 0 or stats.running >= max_num_seqs,
            prefill_rate=self.rates.prefill.per_second,
            decode_rate=self.rates.decode.peak,
            is_ready=self.state(engine)[0] == "ready",
        )

    def state(self, engine: Engine | None) -> tuple[State, str]:
        """And why it is not ready, in plain words."""
        if engine is None:
            return "loading", f"loading {self.loaded:.0%}".replace("%", " %")
        if engine.failure is not None:
            return "failed", str(engine.failure)
        if engine.recovering is not None:
            return "loading", f"rebuilding after: {engine.recovering}"
        if engine.overdue_s > OVERDUE_S:
            return "stalled", f"a step is {engine.overdue_s:.0f} s late"
        if engine.idle_s > self._config.pipeline.step_timeout_s:
            return "stalled", f"the engine has not moved for {engine.idle_s:.0f} s"
        return "ready", ""

    def await_probe(self, engine: Engine, prompt_tokens: int = 1) -> None:
        """A replica is ready when a token has come out of its last stage, not when its processes exist.

        A longer prompt also shows how fast it computes prompts, before the first request has to be admitted by it.
        """
        before = self.last_token
        self._probe(engine, prompt_tokens)
        deadline = time.monotonic() + self._config.pipeline.step_timeout_s
        while self.last_token == before:
            if engine.failure is not None:
                raise engine.failure
            if time.monotonic() > deadline:
                raise EngineStopped("the first token did not come out of the pipeline in time")
            time.sleep(0.02)

    def probe_if_idle(self, engine: Engine) -> None:
        now = time.monotonic()
        if engine.failure is not None or engine.recovering is not None:
            return
        if min(now - self.last_token, now - self._probe_sent) > PROBE_PERIOD_S and not engine.scheduler.has_work:
            self._probe(engine)

    def _probe(self, engine: Engine, prompt_tokens: int = 1) -> None:
        self._probe_sent = time.monotonic()
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        name = f"{PROBE_PREFIX}{os.urandom(4).hex()}"
        engine.add(Request(request_id=name, token_ids=[0] * prompt_tokens, sampling=params))

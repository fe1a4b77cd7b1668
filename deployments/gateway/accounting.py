"""What is counted, charged and timed of a request that engines work on."""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.errors import CaravanError
from deployments.errors import ApiError
from deployments.gateway.admission import Ticket
from deployments.gateway.pieces import Piece
from deployments.gateway.request import GenerationRequest
from deployments.gateway.tenants import Tenant
from deployments.limits.shared import SharedLimits
from deployments.metrics import MetricsRecorder
from deployments.routing.gateway_load import GatewayLoad
from deployments.telemetry.record import Record
from model.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Usage:
    """Counts and times of one request, for its answer, its metrics and its log line."""

    prompt_tokens: int
    record: Record  # of the HTTP request
    given: float = field(default_factory=time.monotonic)  # when it was to be given to an engine
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted_tokens: int = 0  # of completion_tokens: they were drafted, see cluster/scheduling/speculation.py
    outcome: str = "cancelled"  # until something else is known
    ticket: Ticket | None = None  # from when it is admitted
    answer: str = ""  # kept only to be logged, with `logging.log_prompts`


class Accounting:
    """The books of one gateway. `prompts_in_log` shows the prompts of requests if they may be logged at all."""

    def __init__(
        self, recorder: MetricsRecorder, limits: SharedLimits, load: GatewayLoad, prompts_in_log: Tokenizer | None
    ) -> None:
        self._recorder = recorder
        self._limits = limits
        self._load = load
        self.prompts_in_log = prompts_in_log

    def refused(self, tenant: Tenant, error: ApiError) -> None:
        """401 or 429, by reason: invalid_api_key, rate_limit_exceeded or overloaded."""
        reason = str(error.body["error"]["code"])
        if reason == "overloaded":
            self._load.refused()
        self._recorder.inc("refused_total", tenant=tenant.name, reason=reason)

    async def counted(
        self, stream: AsyncGenerator[Piece, None], index: int, request: GenerationRequest, usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of answer number `index`, counted, timed and charged to its tenant."""
        last = 0.0
        assert usage.ticket is not None
        try:
            async for piece in stream:
                now = time.monotonic()
                usage.cached_tokens = max(usage.cached_tokens, piece.num_cached_tokens)
                if not usage.record.first_token:
                    self._first_token(piece, usage, now)
                usage.record.spend("detokenise", piece.detokenise_s)
                usage.ticket.grow(index, piece.num_tokens)
                if piece.finish_reason in ("stop", "length"):
                    usage.ticket.end(index)
                self._limits.spend(request.tenant, piece.num_tokens)
                if last and piece.num_tokens:
                    self._recorder.observe("inter_token_seconds", (now - last) / piece.num_tokens)
                last = now
                usage.completion_tokens += piece.num_tokens
                usage.accepted_tokens += piece.num_accepted_tokens
                yield piece
        finally:
            await stream.aclose()

    def _first_token(self, piece: Piece, usage: Usage, now: float) -> None:
        record = usage.record
        record.first_token = now
        self._recorder.observe("ttft_seconds", now - record.started)
        record.mark("first token", usage.given, now)
        if piece.start is not None:
            record.spend("queue", piece.start.queue_s, now - piece.start.prefill_s)
            record.spend("prefill", piece.start.prefill_s, now)
            record.spend("route", max(0.0, now - usage.given - piece.start.queue_s - piece.start.prefill_s))

    def delivered(self, piece: Piece, usage: Usage) -> None:
        """This piece is on its way to the client: if it is the last one, how the request ended."""
        usage.outcome = piece.finish_reason or "cancelled"
        usage.answer += piece.text if self.prompts_in_log else ""

    @contextmanager
    def recorded(self, request: GenerationRequest, usage: Usage) -> Iterator[None]:
        """The end of a whole request is recorded, whatever it is; `telemetry.answers` counts and logs it."""
        try:
            yield
        except CaravanError as error:
            usage.outcome = "rejected" if isinstance(error, ValueError) else "error"
            raise
        except Exception:
            usage.outcome = "error"
            raise
        finally:
            self._record(request, usage)

    def _record(self, request: GenerationRequest, usage: Usage) -> None:
        record, tenant = usage.record, request.tenant.name
        self._recorder.inc("prompt_tokens_total", usage.prompt_tokens)
        self._recorder.inc("tenant_prompt_tokens_total", usage.prompt_tokens, tenant=tenant)
        self._recorder.inc("tenant_generated_tokens_total", usage.completion_tokens, tenant=tenant)
        record.endpoint, record.outcome = request.endpoint, usage.outcome
        if record.first_token:
            now = time.monotonic()
            record.spend("decode", now - record.first_token, now)
        record.fields |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        if self.prompts_in_log:
            shown = self.prompts_in_log.decode(request.prompt.token_ids)
            record.fields |= {"prompt": shown, "answer": usage.answer}

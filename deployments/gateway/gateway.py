"""What every HTTP route stands on: requests that are admitted and become streams of text from the engines.

A gateway knows no route's JSON. It keeps no state beyond open requests: any number of them may run, and any may die.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from cluster.scheduling.sequence import Request as EngineRequest
from deployments.adapters.names import AdapterNames, Named
from deployments.config import AppConfig
from deployments.errors import ApiError, TimeExceeded
from deployments.fingerprint import fingerprint, with_adapter
from deployments.gateway.accounting import Accounting, Usage
from deployments.gateway.admission import Admission, Ticket
from deployments.gateway.constraints import ConstraintChecker
from deployments.gateway.crowd import Answer
from deployments.gateway.engine_client import EngineClient
from deployments.gateway.pieces import Piece, TextRules, merged, pieces
from deployments.gateway.prompts import Prompts
from deployments.gateway.request import GenerationRequest, RequestBounds, check_priority
from deployments.gateway.resume import ResumingEngineClient
from deployments.gateway.tenants import ANONYMOUS, KeyRing, Tenant
from deployments.limits.shared import Ledger, SharedLimits
from deployments.metrics import MetricsRecorder
from deployments.routing.gateway_load import GatewayLoad
from deployments.telemetry.answers import create_tenant_series
from deployments.telemetry.audit import KeyAudit
from deployments.telemetry.record import Record, current
from model.sampling_defaults import read_sampling_defaults
from model.text.chat import load_chat_template
from model.text.tokenizer import Tokenizer, check_fits, load_tokenizer
from model.weights import read_config, resolve_path


@dataclass(frozen=True, slots=True)
class Generation:
    """A request under way. Closing `pieces` cancels it and frees what it holds in the engine."""

    pieces: AsyncGenerator[Piece, None]  # of all its answers, as they come
    usage: Usage  # as of the last piece


class Gateway:
    """One model's tokenizer, template and limits in front of an engine client."""

    def __init__(
        self,
        config: AppConfig,
        engine: EngineClient,
        recorder: MetricsRecorder,
        ledger: Ledger | None = None,
        load: GatewayLoad | None = None,
    ) -> None:
        path = resolve_path(config.model.path)
        self.config = config
        self.recorder = recorder
        self.load = load or GatewayLoad()
        self.refused_config = ""  # why a change of the configuration was not taken in
        self.created = int(time.time())
        self.open_requests: set[Record] = set()
        self.fingerprint = fingerprint(config)
        model = read_config(path)
        self.tokenizer: Tokenizer = load_tokenizer(path)
        check_fits(self.tokenizer, model.vocab_size, path)
        g = config.gateway
        template = load_chat_template(path, self.tokenizer, config.model.prompt_format)
        longest = config.model.max_model_len or model.context_length
        self.prompts = Prompts(self.tokenizer, template, g.max_messages, longest)
        own = config.model.sampling_defaults == "checkpoint"
        self.sampling_defaults = read_sampling_defaults(path) if own else {}
        self.bounds = RequestBounds(config, self.tokenizer.vocab_size, longest)
        self.constraints = ConstraintChecker(config.model.path, g.constraint_timeout_s)
        create_tenant_series(recorder, ANONYMOUS.name)
        self.key_audit = KeyAudit()
        self._known: list[Tenant] | None = None  # tenants as last read
        self.keys = KeyRing(config.auth, self._keys_changed)
        self.limits = SharedLimits(ledger, g.replicas, self._on_gateways)
        self.accounting = Accounting(
            recorder, self.limits, self.load, self.tokenizer if config.logging.log_prompts else None
        )
        self.adapters = AdapterNames(config.model, engine)
        self.engine = ResumingEngineClient(engine, g.resume_attempts, g.resume_timeout_s, recorder)
        self.admission = Admission(config, self.engine.replicas)

    def apply(self, config: AppConfig) -> None:
        """Go on with these settings, as far as they may change in place (`config.IN_PLACE`).

        Raises `ConfigError`, and then nothing has changed.
        """
        if config.auth != self.config.auth:
            self.keys = KeyRing(config.auth, self._keys_changed)
        g, self.config = config.gateway, config
        self.bounds = RequestBounds(config, self.tokenizer.vocab_size, self.bounds.max_model_len)
        self.prompts.max_messages = g.max_messages
        self.constraints.timeout_s = g.constraint_timeout_s
        self.engine.attempts, self.engine.timeout_s = g.resume_attempts, g.resume_timeout_s
        self.admission.target_s, self.admission.max_age_s = config.admission.target_ttft_s, g.ready_max_age_s
        self.accounting.prompts_in_log = self.tokenizer if config.logging.log_prompts else None

    def _on_gateways(self, count: int) -> None:
        self.admission.alone = count == 1

    async def named(self, name: str | None, param: str = "model") -> Named | None:
        """The adapter that a request names; None: the model itself. Raises `ApiError`, 404 for what is neither."""
        if name is None or name in self.bounds.names:
            return None
        if (found := await self.adapters.find(name)) is None:
            self.bounds.check_name(name, param)
        return found

    def fingerprint_of(self, adapter: Named | None) -> str:
        """See `fingerprint`."""
        return self.fingerprint if adapter is None else with_adapter(self.fingerprint, adapter.ref.digest)

    def close(self) -> None:
        """End what was started beside this process."""
        self.limits.close()
        self.constraints.close()
        self.prompts.close()

    def _keys_changed(self, tenants: list[Tenant]) -> None:
        if self._known is not None:
            self.key_audit.changed(self._known, tenants)
        for tenant in tenants:
            if tenant.name not in {known.name for known in self._known or ()}:
                create_tenant_series(self.recorder, tenant.name)
        self._known = tenants

    def generate(self, *requests: GenerationRequest) -> Generation:
        """Start a request of one or several answers; `Piece.index` is an answer's place among `requests`.

        Each goes to an engine, maybe another one each, when the first piece is asked for. The pieces raise
        `RequestRejected`, `EngineStopped` or `RequestFailed`; then all answers have ended. The first one raises
        `ApiError` 429 if the request would have to wait too long, or its tenant has used up its limits.
        """
        check_priority(requests[0])
        prompts = {id(request.prompt): len(request.prompt.token_ids) for request in requests}
        usage = Usage(sum(prompts.values()), current())
        streams = [self.accounting.counted(self._stream(one), i, one, usage) for i, one in enumerate(requests)]
        stream = streams[0] if len(streams) == 1 else merged(streams)
        return Generation(self._admitted(stream, requests, usage), usage)

    def _stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer."""
        ids, sampling = request.prompt.token_ids, request.sampling
        events = self.engine.generate(
            EngineRequest(
                request_id=secrets.token_hex(12),
                token_ids=ids,
                sampling=sampling,
                tenant=request.tenant.name,
                weight=request.tenant.weight,
                priority=request.priority,
                cache_salt=request.salt,
                adapter=request.adapter.ref if request.adapter is not None else None,
            )
        )
        rules = TextRules(
            stops=request.stops,
            include_stop=request.include_stop,
            min_tokens=sampling.min_tokens,
            starts_text=request.prompt.starts_text,
            prompt_only=request.prompt_only,
            calls=request.calls,
            control_tokens=request.control_tokens,
        )
        return pieces(events, self.tokenizer, ids, rules)

    async def _admitted(
        self, stream: AsyncGenerator[Piece, None], requests: Sequence[GenerationRequest], usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of a whole request, if it is taken, for as long as it may last."""
        usage.ticket = await self._admit(requests, usage)
        with self.accounting.recorded(requests[0], usage):
            try:
                async for piece in within(stream, self.config.gateway.request_timeout_s):
                    self.accounting.delivered(piece, usage)
                    yield piece
            finally:
                await stream.aclose()
                usage.ticket.close()

    async def _admit(self, requests: Sequence[GenerationRequest], usage: Usage) -> Ticket:
        tenant = requests[0].tenant
        try:
            answers = [Answer(len(r.prompt.token_ids), r.sampling.max_tokens) for r in requests]
            ticket = self.admission.open(tenant, answers)
            try:
                await self.limits.take_prompt(tenant, usage.prompt_tokens)
            except BaseException:
                ticket.close()
                raise
        except ApiError as error:
            self.accounting.refused(tenant, error)
            raise
        self.load.taken(usage.prompt_tokens)
        return ticket


async def within(stream: AsyncGenerator[Piece, None], seconds: float) -> AsyncIterator[Piece]:
    """The pieces that come in this time. Raises `TimeExceeded` after it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                piece = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise TimeExceeded(f"the request took longer than {seconds:g} s, which is all that it may") from None
        yield piece

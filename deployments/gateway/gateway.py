"""What every HTTP route stands on: a model's prompts and limits, and streams of text from the engines.

A gateway knows no route's JSON. It keeps no state beyond open requests: any number of them may run, and any may die.
"""

import asyncio
import hashlib
import logging
import secrets
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from cluster.errors import CaravanError
from cluster.sequence import Request as EngineRequest
from deployments.config import AppConfig
from deployments.errors import ApiError, TimeExceeded, bad_request, unknown_model
from deployments.gateway.admission import Admission, Answer, Ticket
from deployments.gateway.constraints import ConstraintChecker
from deployments.gateway.engine_client import EngineClient, MetricsRecorder
from deployments.gateway.fingerprint import fingerprint
from deployments.gateway.limits import Limits
from deployments.gateway.resume import ResumingEngineClient
from deployments.gateway.tenants import KeyRing, Tenant
from deployments.gateway.text import Piece, TextRules, merged, pieces
from model.sampling_params import SamplingParams
from model.text.chat import ChatTemplate, PromptFormatError, load_chat_template
from model.text.constraint import Constraint
from model.text.infill import can_infill, encode_infill, infill_stop_ids
from model.text.tokenizer import Tokenizer, check_fits, load_tokenizer
from model.weights import read_config, resolve_path

log = logging.getLogger(__name__)

LONG_TEXT = 4_000  # characters; tokenising more than this would hold up other streams


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request makes of its text."""

    token_ids: list[int]
    stop_ids: frozenset[int] = frozenset()  # that end the answer, beside the tokenizer's own
    starts_text: bool = False  # whether the answer is a text of its own, not the continuation of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One answer that a route asks for, whatever its JSON looks like."""

    endpoint: str  # its name in metrics and logs
    request_id: str  # of the HTTP request
    tenant: Tenant  # whose it is
    prompt: Prompt
    sampling: SamplingParams
    stops: Sequence[str] = ()
    include_stop: bool = False  # whether the stop string that ends an answer is shown
    prompt_only: bool = False  # the prompt's logprobs are all that is wanted
    priority: int = 0  # a lower one goes first

    def copies(self, n: int) -> "list[GenerationRequest]":
        """`n` answers to the same prompt. Each draws by a seed of its own, the first one by the request's."""
        seeds = (derived_seed(self.sampling.seed, i) for i in range(n))
        return [replace(self, sampling=msgspec.structs.replace(self.sampling, seed=seed)) for seed in seeds]


@dataclass(slots=True)
class Usage:
    """Counts and times of one request, for its answer, its metrics and its log line."""

    prompt_tokens: int
    started: float
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float = 0.0
    outcome: str = "cancelled"  # until something else is known
    ticket: Ticket | None = None  # from when it is admitted
    answer: str = ""  # kept only to be logged, with `logging.log_prompts`


@dataclass(frozen=True, slots=True)
class Generation:
    """A request under way. Closing `pieces` cancels it and frees what it holds in the engine."""

    pieces: AsyncGenerator[Piece, None]  # of all its answers, as they come
    usage: Usage  # as of the last piece


class Gateway:
    """One model's name, tokenizer and template in front of an engine client."""

    def __init__(self, config: AppConfig, engine: EngineClient, recorder: MetricsRecorder) -> None:
        path = resolve_path(config.model.path)
        self.config = config
        g = config.gateway
        self.engine = ResumingEngineClient(engine, g.resume_attempts, g.resume_timeout_s, recorder)
        self.recorder = recorder
        self.keys = KeyRing(config.auth)
        self.limits = Limits(g.replicas)
        self.admission = Admission(config, self.engine.replicas)
        model = read_config(path)
        self.tokenizer: Tokenizer = load_tokenizer(path)
        check_fits(self.tokenizer, model.vocab_size, path)
        self.template: ChatTemplate | None = load_chat_template(path, self.tokenizer, config.model.prompt_format)
        self.max_model_len = config.model.max_model_len or model.context_length
        self.names = (config.model.name, *config.model.aliases)
        self.created = int(time.time())
        self.fingerprint = fingerprint(config)
        self._constraints = ConstraintChecker(config.model.path, g.constraint_timeout_s)

    # -- prompts and limits -------------------------------------------------------------------------------------------

    async def chat_prompt(self, messages: Sequence[dict[str, str]]) -> Prompt:
        """From messages with role and content. Raises `ApiError` if the model cannot take them."""
        template, most = self.template, self.config.gateway.max_messages
        if len(messages) > most:
            raise bad_request(f"messages: {len(messages)} messages, at most {most} are allowed", "messages")
        if template is None:
            raise bad_request("this model has no chat format: use /v1/completions", "messages")
        size = sum(len(m["content"]) for m in messages)
        try:
            ids = await in_thread_if(size > LONG_TEXT, lambda: template.encode(messages))
        except PromptFormatError as error:
            raise bad_request(str(error), "messages") from None
        return Prompt(ids, template.stop_ids, starts_text=True)

    async def text_prompt(self, text: str, param: str = "prompt") -> Prompt:
        """Text to be continued as it stands. `param` names it in errors."""
        return self.ids_prompt(await self.encode(text), param)

    async def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text."""
        return await in_thread_if(len(text) > LONG_TEXT, lambda: self.tokenizer.encode(text, add_bos=add_bos))

    def ids_prompt(self, ids: Sequence[Any], param: str = "prompt") -> Prompt:
        """Token ids as a client gave them."""
        if not ids:
            raise bad_request(f"{param}: is empty", param)
        vocab = self.tokenizer.vocab_size
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise bad_request(f"{param}: token ids must be whole numbers from 0 to {vocab - 1}", param)
        return Prompt(list(ids))

    async def infill_prompt(self, prefix: Any, suffix: str) -> Prompt:
        """Code Llama writes what belongs between prompt and suffix."""
        if not can_infill(self.tokenizer):
            raise bad_request("suffix: this model cannot fill in text before a suffix", "suffix")
        if not isinstance(prefix, str):
            raise bad_request("prompt: must be a string if there is a suffix", "prompt")
        long = len(prefix) + len(suffix) > LONG_TEXT
        ids = await in_thread_if(long, lambda: encode_infill(self.tokenizer, prefix, suffix))
        return Prompt(ids, infill_stop_ids(self.tokenizer))

    def max_tokens(self, prompt: Prompt, wanted: int | None, default: int | None, param: str = "prompt") -> int:
        """Output tokens to allow: what the client wants, else `default` (None: as many as there is room for).

        Raises `ApiError` in the words that clients look for if prompt and output do not fit the context.
        """
        prompt_tokens = len(prompt.token_ids)
        room = self.max_model_len - prompt_tokens
        allowed = wanted if wanted is not None else max(1, room if default is None else min(default, room))
        if allowed > room:
            raise bad_request(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{prompt_tokens + allowed} tokens ({prompt_tokens} in the messages, {allowed} in the completion). "
                "Please reduce the length of the messages or completion.",
                param,
                "context_length_exceeded",
            )
        return allowed

    def check_name(self, name: str | None, param: str = "model") -> None:
        """Raise `ApiError` 404 if a request names another model; it may name none."""
        if name is not None and name not in self.names:
            raise unknown_model(name, self.config.model.name, param)

    def check_token_ids(self, ids: Iterable[int], param: str) -> None:
        """Raise `ApiError` for an id that the model does not have."""
        for token_id in ids:
            if not 0 <= token_id < self.tokenizer.vocab_size:
                raise bad_request(f"{param}: {token_id} is not a token id of this model", param)

    def check_answers(self, answers: int) -> None:
        """Raise `ApiError` if one request wants more answers than are allowed."""
        limit = self.config.gateway.max_answers
        if answers > limit:
            raise bad_request(f"n: {answers} answers in one request, at most {limit} are allowed", "n")

    def check_size(self, answers: Sequence[GenerationRequest]) -> None:
        """Raise `ApiError` if several answers need more tokens than one request may."""
        limit = self.config.gateway.max_request_tokens
        total = sum(len(a.prompt.token_ids) + a.sampling.max_tokens for a in answers)
        if len(answers) > 1 and total > limit:
            raise bad_request(
                f"n: {len(answers)} answers need up to {total} tokens, one request may have {limit}: ask for fewer "
                "answers or lower max_tokens",
                "n",
            )

    def stop_ids(self, prompt: Prompt) -> frozenset[int]:
        """Tokens that end an answer to this prompt."""
        return self.tokenizer.eos_ids | prompt.stop_ids

    async def check_constraint(self, constraint: Constraint, param: str) -> None:
        """Raise `ApiError` that names the field if no engine could follow this constraint."""
        if not self._constraints.known(constraint):
            await asyncio.to_thread(self._constraints.check, constraint, param)

    def close(self) -> None:
        """End what was started beside this process."""
        self._constraints.close()

    # -- generating ---------------------------------------------------------------------------------------------------

    def generate(self, *requests: GenerationRequest) -> Generation:
        """Start a request of one or several answers; `Piece.index` is an answer's place among `requests`.

        Each goes to an engine, maybe another one each, when the first piece is asked for. The pieces raise
        `RequestRejected`, `EngineStopped` or `RequestFailed`; then all answers have ended. The first one raises
        `ApiError` 429 if the request would have to wait too long, or its tenant has used up its limits.
        """
        self._check_priority(requests[0])
        prompts = {id(request.prompt): len(request.prompt.token_ids) for request in requests}
        usage = Usage(sum(prompts.values()), time.monotonic())
        streams = [self._counted(self._stream(request), i, request, usage) for i, request in enumerate(requests)]
        stream = streams[0] if len(streams) == 1 else merged(streams)
        return Generation(self._recorded(stream, requests, usage), usage)

    def _check_priority(self, request: GenerationRequest) -> None:
        least = request.tenant.priority
        if request.priority < least:
            raise bad_request(f"priority: the most urgent one that this key may ask for is {least}", "priority")

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
            )
        )
        rules = TextRules(
            stops=request.stops,
            include_stop=request.include_stop,
            min_tokens=sampling.min_tokens,
            starts_text=request.prompt.starts_text,
            prompt_only=request.prompt_only,
        )
        return pieces(events, self.tokenizer, ids, rules)

    async def _counted(
        self, stream: AsyncGenerator[Piece, None], index: int, request: GenerationRequest, usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of answer number `index`, counted and timed."""
        last = 0.0
        assert usage.ticket is not None
        try:
            async for piece in stream:
                now = time.monotonic()
                usage.cached_tokens = max(usage.cached_tokens, piece.num_cached_tokens)
                if not usage.first_token:
                    usage.first_token = now
                    self.recorder.observe("ttft_seconds", now - usage.started)
                usage.ticket.grow(index, piece.num_tokens)
                if piece.finish_reason in ("stop", "length"):
                    usage.ticket.end(index)
                self.limits.spend(request.tenant, piece.num_tokens, now)
                if last and piece.num_tokens:
                    self.recorder.observe("inter_token_seconds", (now - last) / piece.num_tokens)
                last = now
                usage.completion_tokens += piece.num_tokens
                yield piece
        finally:
            await stream.aclose()

    async def _recorded(
        self, stream: AsyncGenerator[Piece, None], requests: Sequence[GenerationRequest], usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of a whole request, whose end is recorded, whatever it is."""
        usage.ticket = self._admit(requests, usage)
        try:
            async for piece in within(stream, self.config.gateway.request_timeout_s):
                usage.outcome = piece.finish_reason or "cancelled"
                usage.answer += piece.text if self.config.logging.log_prompts else ""
                yield piece
        except CaravanError as error:
            usage.outcome = "rejected" if isinstance(error, ValueError) else "error"
            raise
        except Exception:
            usage.outcome = "error"
            raise
        finally:
            await stream.aclose()
            usage.ticket.close()
            self._record(requests[0], usage)

    def _admit(self, requests: Sequence[GenerationRequest], usage: Usage) -> Ticket:
        tenant = requests[0].tenant
        try:
            answers = [Answer(len(r.prompt.token_ids), r.sampling.max_tokens) for r in requests]
            ticket = self.admission.open(tenant, answers)
            try:
                self.limits.take_prompt(tenant, usage.prompt_tokens, time.monotonic())
            except ApiError:
                ticket.close()
                raise
        except ApiError as error:
            self.count_refusal(tenant, error)
            raise
        return ticket

    def count_refusal(self, tenant: Tenant, error: ApiError) -> None:
        """401 or 429, by reason: invalid_api_key, rate_limit_exceeded or overloaded."""
        self.recorder.inc("refused_total", tenant=tenant.name, reason=str(error.body["error"]["code"]))

    def _record(self, request: GenerationRequest, usage: Usage) -> None:
        seconds = time.monotonic() - usage.started
        self.recorder.inc("requests_total", endpoint=request.endpoint, outcome=usage.outcome)
        self.recorder.inc("prompt_tokens_total", usage.prompt_tokens)
        self.recorder.observe("e2e_seconds", seconds)
        tenant = request.tenant.name
        self.recorder.inc("tenant_requests_total", tenant=tenant, outcome=usage.outcome)
        self.recorder.inc("tenant_prompt_tokens_total", usage.prompt_tokens, tenant=tenant)
        self.recorder.inc("tenant_generated_tokens_total", usage.completion_tokens, tenant=tenant)
        fields = {
            "request_id": request.request_id,
            "tenant": tenant,
            "endpoint": request.endpoint,
            "outcome": usage.outcome,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "ttft_s": round(usage.first_token - usage.started, 4) if usage.first_token else None,
            "e2e_s": round(seconds, 4),
        }
        if self.config.logging.log_prompts:
            fields |= {"prompt": self.tokenizer.decode(request.prompt.token_ids), "answer": usage.answer}
        log.info("request finished", extra=fields)


def derived_seed(seed: int, index: int) -> int:
    """The seed of a request's answer number `index`: the request's own for the first, and for others a hash of both."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<Qq", seed % 2**64, index), digest_size=8, person=b"answer").digest()
    return int.from_bytes(digest, "little") >> 1


async def in_thread_if(condition: bool, work: Callable[[], list[int]]) -> list[int]:
    """Long work leaves the event loop to others."""
    return await asyncio.to_thread(work) if condition else work()


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

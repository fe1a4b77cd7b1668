"""What every HTTP route stands on: a model's prompts and limits, and streams of text from the engines.

A gateway knows no route's JSON. It keeps no state beyond open requests: any number of them may run, and any may die.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import CaravanError
from cluster.sequence import Request as EngineRequest
from deployments.config import AppConfig
from deployments.engine_client import EngineClient, MetricsRecorder
from deployments.errors import bad_request
from deployments.resume import ResumingEngineClient
from deployments.text import Piece, pieces
from model.chat import ChatTemplate, PromptFormatError, load_chat_template
from model.infill import can_infill, encode_infill, infill_stop_ids
from model.sampling_params import SamplingParams
from model.tokenizer import Detokenizer, Tokenizer, check_fits, load_tokenizer
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
    """What a route asks for, whatever its JSON looks like."""

    endpoint: str  # its name in metrics and logs
    request_id: str  # of the HTTP request
    prompt: Prompt
    sampling: SamplingParams
    stops: Sequence[str] = ()
    include_stop: bool = False  # whether the stop string that ends an answer is shown


@dataclass(slots=True)
class Usage:
    """Counts and times of one request, for its answer, its metrics and its log line."""

    prompt_tokens: int
    started: float
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float = 0.0
    outcome: str = "cancelled"  # until something else is known


@dataclass(frozen=True, slots=True)
class Generation:
    """A request under way. Closing `pieces` cancels it and frees what it holds in the engine."""

    pieces: AsyncGenerator[Piece, None]
    usage: Usage  # as of the last piece


class Gateway:
    """One model's name, tokenizer and template in front of an engine client."""

    def __init__(self, config: AppConfig, engine: EngineClient, recorder: MetricsRecorder) -> None:
        path = resolve_path(config.model.path)
        self.config = config
        g = config.gateway
        self.engine = ResumingEngineClient(engine, g.resume_attempts, g.resume_timeout_s, recorder)
        self.recorder = recorder
        model = read_config(path)
        self.tokenizer: Tokenizer = load_tokenizer(path)
        check_fits(self.tokenizer, model.vocab_size, path)
        self.template: ChatTemplate | None = load_chat_template(path, self.tokenizer, config.model.prompt_format)
        self.max_model_len = config.model.max_model_len or model.context_length
        self.created = int(time.time())

    # -- prompts and limits -------------------------------------------------------------------------------------------

    async def chat_prompt(self, messages: Sequence[dict[str, str]]) -> Prompt:
        """From messages with role and content. Raises `ApiError` if the model cannot take them."""
        template = self.template
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
        ids = await in_thread_if(len(text) > LONG_TEXT, lambda: self.tokenizer.encode(text, add_bos=True))
        return self.ids_prompt(ids, param)

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

    def stop_ids(self, prompt: Prompt) -> frozenset[int]:
        """Tokens that end an answer to this prompt."""
        return self.tokenizer.eos_ids | prompt.stop_ids

    # -- generating ---------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest) -> Generation:
        """Start a request: it is sent to an engine when the first piece is asked for.

        The pieces raise `RequestRejected` or `EngineStopped`.
        """
        ids = request.prompt.token_ids
        usage = Usage(len(ids), time.monotonic())
        events = self.engine.generate(
            EngineRequest(request_id=secrets.token_hex(12), token_ids=ids, sampling=request.sampling)
        )
        detokenizer = Detokenizer(self.tokenizer, at_start=request.prompt.starts_text)
        stream = pieces(events, self.tokenizer, detokenizer, request.stops, request.include_stop)
        return Generation(self._counted(stream, request, usage), usage)

    async def _counted(
        self, stream: AsyncGenerator[Piece, None], request: GenerationRequest, usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The same pieces, counted and timed."""
        last = 0.0
        try:
            async for piece in stream:
                now = time.monotonic()
                if not usage.completion_tokens:
                    usage.first_token = now
                    usage.cached_tokens = piece.num_cached_tokens
                    self.recorder.observe("ttft_seconds", now - usage.started)
                elif piece.num_tokens:
                    self.recorder.observe("inter_token_seconds", (now - last) / piece.num_tokens)
                last = now
                usage.completion_tokens += piece.num_tokens
                if piece.finish_reason is not None:
                    usage.outcome = piece.finish_reason
                yield piece
        except CaravanError as error:
            usage.outcome = "rejected" if isinstance(error, ValueError) else "error"
            raise
        finally:
            await stream.aclose()
            self._record(request, usage)

    def _record(self, request: GenerationRequest, usage: Usage) -> None:
        seconds = time.monotonic() - usage.started
        self.recorder.inc("requests_total", endpoint=request.endpoint, outcome=usage.outcome)
        self.recorder.inc("prompt_tokens_total", usage.prompt_tokens)
        self.recorder.observe("e2e_seconds", seconds)
        fields = {
            "request_id": request.request_id,
            "endpoint": request.endpoint,
            "outcome": usage.outcome,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "ttft_s": round(usage.first_token - usage.started, 4) if usage.first_token else None,
            "e2e_s": round(seconds, 4),
        }
        log.info("request finished", extra=fields)


async def in_thread_if(condition: bool, work: Callable[[], list[int]]) -> list[int]:
    """Long work leaves the event loop to others."""
    return await asyncio.to_thread(work) if condition else work()

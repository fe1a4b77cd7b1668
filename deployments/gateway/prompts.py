"""Where a prompt becomes token ids: messages, plain text, ids as a client gave them, and text around a gap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deployments.errors import ApiError, bad_request
from deployments.gateway.tenants import Tenant
from deployments.offload.turns import ModestThreads
from deployments.telemetry.record import spent
from model.heap import return_freed_memory
from model.text.chat import ChatTemplate, PromptFormatError
from model.text.infill import can_infill, encode_infill, infill_stop_ids
from model.text.tokenizer import Tokenizer, encode_prompt, longest_token
from model.text.tool_calls import SYNTAXES, CallSyntax
from model.text.tool_prompt import with_calls_apart, with_short_ids, with_tools_as_text

HUGE_TEXT = 50_000  # characters; what the library needs for it meanwhile, 200 bytes for each, is given back at once
LONG_TEXT = 4_000  # characters; tokenising more than this would hold up other streams
THREADS, EACH = 2, 1  # long texts at once, and of one tenant
WAITING = 64  # long texts of one tenant that may wait

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request makes of its text."""

    token_ids: list[int]
    stop_ids: frozenset[int] = frozenset()  # that end the answer, beside the tokenizer's own
    starts_text: bool = False  # whether the answer is a text of its own, not the continuation of the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A conversation as a client sends it, in OpenAI's form, and what else goes into the prompt."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    instruction: str = ""  # what to do with the tools, for models whose template knows none
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)  # that the template may know


class Prompts:
    """One model's tokenizer, and its template if it can chat. What it cannot take is an `ApiError`.

    Nothing is tokenised that is too long for the context whatever its tokens are; what is long is a matter for
    threads, in which tenants take turns.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, max_messages: int, max_model_len: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_chars = max_model_len * longest_token(tokenizer)  # no text with more of them fits the context
        self._max_model_len = max_model_len
        self.template = template
        self.max_messages = max_messages
        self._threads = ModestThreads("prompts", THREADS, EACH, WAITING)

    @property
    def call_syntax(self) -> CallSyntax:
        """How this model writes calls of functions."""
        return SYNTAXES[self.template.tool_format if self.template is not None else None]

    async def chat(self, tenant: Tenant, chat: Chat) -> Prompt:
        """From a conversation."""
        template, most = self.template, self.max_messages
        if len(chat.messages) > most:
            raise bad_request(f"messages: {len(chat.messages)} messages, at most {most} are allowed", "messages")
        if template is None:
            raise bad_request("this model has no chat format: use /v1/completions", "messages")
        size = sum(_length(value) for message in chat.messages for value in message.values())
        self.check_length(size, "messages")
        size += len(str(chat.tools))
        self.check_length(size, "tools")
        try:
            ids = await self.worked_out(tenant, size, lambda: _encode(template, chat))
        except PromptFormatError as error:
            raise bad_request(str(error), "messages") from None
        return Prompt(ids, template.stop_ids, starts_text=not chat.continue_final_message)

    async def whole_text(self, tenant: Tenant, text: str, param: str, truncate: int | None = None) -> Prompt:
        """The caller's whole prompt, control tokens by name; `truncate` keeps that many tokens, the last ones."""
        ids = await self.encode(tenant, text, param, parse_special=True) if text else []
        return self.ids(ids[-truncate:] if truncate else ids, param)

    async def encode(
        self, tenant: Tenant, text: str, param: str = "prompt", *, add_bos: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of plain text; with `parse_special` names of control tokens in it are those tokens."""
        tokenizer = self.tokenizer

        def work() -> list[int]:
            if not parse_special:
                return tokenizer.encode(text, add_bos=add_bos)
            return encode_prompt(tokenizer, text, add_bos=add_bos)

        self.check_length(len(text), param)
        return await self.worked_out(tenant, len(text), work)

    def ids(self, ids: Sequence[Any], param: str = "prompt") -> Prompt:
        """Token ids as a client gave them."""
        if not ids:
            raise bad_request(f"{param}: is empty", param)
        if len(ids) > self.max_chars:
            raise self._too_long(len(ids), "token ids", param)
        vocab = self.tokenizer.vocab_size
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise bad_request(f"{param}: token ids must be whole numbers from 0 to {vocab - 1}", param)
        return Prompt(list(ids))

    async def infill(self, tenant: Tenant, prefix: Any, suffix: str) -> Prompt:
        """Code Llama writes what belongs between prompt and suffix."""
        if not can_infill(self.tokenizer):
            raise bad_request("suffix: this model cannot fill in text before a suffix", "suffix")
        if not isinstance(prefix, str):
            raise bad_request("prompt: must be a string if there is a suffix", "prompt")
        size = len(prefix) + len(suffix)
        self.check_length(size, "prompt")
        ids = await self.worked_out(tenant, size, lambda: encode_infill(self.tokenizer, prefix, suffix))
        return Prompt(ids, infill_stop_ids(self.tokenizer))

    def stop_ids(self, prompt: Prompt) -> frozenset[int]:
        """Tokens that end an answer to this prompt."""
        return self.tokenizer.eos_ids | prompt.stop_ids

    async def worked_out(self, tenant: Tenant, size: int, work: Callable[[], T]) -> T:
        """What `work` makes of so many characters or ids: at once if they are few, else when it is the tenant's turn.

        Raises what `work` raises, and `ApiError` 429 if too many long texts of this tenant wait.
        """
        with spent("tokenise"):
            if size <= LONG_TEXT:
                return work()
            return await self._threads.run(tenant.name, work if size <= HUGE_TEXT else lambda: _and_tidy_up(work))

    def check_length(self, chars: int, param: str) -> None:
        """Raise `ApiError` for a text that cannot fit, without looking at it: each token is some characters."""
        if chars > self.max_chars:
            raise self._too_long(chars, "characters", param)

    def _too_long(self, size: int, unit: str, param: str) -> ApiError:
        return bad_request(
            f"This model's maximum context length is {self._max_model_len} tokens. However, {param} has {size} {unit}, "
            f"and no more than {self.max_chars} can fit. Please reduce the length of the messages or completion.",
            param,
            "context_length_exceeded",
        )

    def close(self) -> None:
        self._threads.close()


def _encode(template: ChatTemplate, chat: Chat) -> list[int]:
    """Through the template, with calls and their results in the way that it knows. Raises `PromptFormatError`."""

    def encoded(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return template.encode(
            messages,
            tools,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            variables=chat.variables,
        )

    if template.tool_format is not None:
        rewrite = {"mistral": with_short_ids, "llama3_json": with_calls_apart}.get(template.tool_format, list)
        return encoded(rewrite(chat.messages), chat.tools)
    try:
        return encoded(with_tools_as_text(chat.messages, chat.tools, chat.instruction))
    except PromptFormatError:
        if not chat.tools:
            raise
        # some templates have no system message
        return encoded(with_tools_as_text(chat.messages, chat.tools, chat.instruction, listed_by="user"))


def _and_tidy_up(work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        return_freed_memory()


def _length(value: Any) -> int:
    """Characters of what stands in a message: text, or calls of functions."""
    return len(value) if isinstance(value, str) else len(str(value))

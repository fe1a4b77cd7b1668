"""Where a prompt becomes token ids: messages, plain text, ids as a client gave them, and text around a gap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from deployments.errors import ApiError, bad_request
from deployments.gateway.tenants import Tenant
from deployments.offload.turns import ModestThreads
from model.text.chat import ChatTemplate, PromptFormatError
from model.text.infill import can_infill, encode_infill, infill_stop_ids
from model.text.tokenizer import Tokenizer, encode_prompt, longest_token

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
        self._template = template
        self._max_messages = max_messages
        self._threads = ModestThreads("prompts", THREADS, EACH, WAITING)

    async def chat(self, tenant: Tenant, messages: Sequence[dict[str, str]]) -> Prompt:
        """From messages with role and content."""
        template, most = self._template, self._max_messages
        if len(messages) > most:
            raise bad_request(f"messages: {len(messages)} messages, at most {most} are allowed", "messages")
        if template is None:
            raise bad_request("this model has no chat format: use /v1/completions", "messages")
        size = sum(len(m["content"]) for m in messages)
        self.check_length(size, "messages")
        try:
            ids = await self.worked_out(tenant, size, lambda: template.encode(messages))
        except PromptFormatError as error:
            raise bad_request(str(error), "messages") from None
        return Prompt(ids, template.stop_ids, starts_text=True)

    async def text(self, tenant: Tenant, text: str, param: str = "prompt") -> Prompt:
        """Text to be continued as it stands. `param` names it in errors."""
        return self.ids(await self.encode(tenant, text, param), param)

    async def whole_text(self, tenant: Tenant, text: str, param: str, truncate: int | None = None) -> Prompt:
        """The caller's whole prompt, control tokens by name; `truncate` keeps that many tokens, the last ones."""
        self.check_length(len(text), param)
        ids = await self.worked_out(tenant, len(text), lambda: encode_prompt(self.tokenizer, text)) if text else []
        return self.ids(ids[-truncate:] if truncate else ids, param)

    async def encode(self, tenant: Tenant, text: str, param: str = "prompt", *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text."""
        self.check_length(len(text), param)
        return await self.worked_out(tenant, len(text), lambda: self.tokenizer.encode(text, add_bos=add_bos))

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
        return work() if size <= LONG_TEXT else await self._threads.run(tenant.name, work)

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

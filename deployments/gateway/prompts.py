"""Where a prompt becomes token ids: messages, plain text, ids as a client gave them, and text around a gap."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.errors import bad_request
from model.text.chat import ChatTemplate, PromptFormatError
from model.text.infill import can_infill, encode_infill, infill_stop_ids
from model.text.tokenizer import Tokenizer

LONG_TEXT = 4_000  # characters; tokenising more than this would hold up other streams


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request makes of its text."""

    token_ids: list[int]
    stop_ids: frozenset[int] = frozenset()  # that end the answer, beside the tokenizer's own
    starts_text: bool = False  # whether the answer is a text of its own, not the continuation of the prompt


class Prompts:
    """One model's tokenizer, and its template if it can chat. What it cannot take is an `ApiError`."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, max_messages: int) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._max_messages = max_messages

    async def chat(self, messages: Sequence[dict[str, str]]) -> Prompt:
        """From messages with role and content."""
        template, most = self._template, self._max_messages
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

    async def text(self, text: str, param: str = "prompt") -> Prompt:
        """Text to be continued as it stands. `param` names it in errors."""
        return self.ids(await self.encode(text), param)

    async def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text."""
        return await in_thread_if(len(text) > LONG_TEXT, lambda: self.tokenizer.encode(text, add_bos=add_bos))

    def ids(self, ids: Sequence[Any], param: str = "prompt") -> Prompt:
        """Token ids as a client gave them."""
        if not ids:
            raise bad_request(f"{param}: is empty", param)
        vocab = self.tokenizer.vocab_size
        if not all(type(i) is int and 0 <= i < vocab for i in ids):
            raise bad_request(f"{param}: token ids must be whole numbers from 0 to {vocab - 1}", param)
        return Prompt(list(ids))

    async def infill(self, prefix: Any, suffix: str) -> Prompt:
        """Code Llama writes what belongs between prompt and suffix."""
        if not can_infill(self.tokenizer):
            raise bad_request("suffix: this model cannot fill in text before a suffix", "suffix")
        if not isinstance(prefix, str):
            raise bad_request("prompt: must be a string if there is a suffix", "prompt")
        long = len(prefix) + len(suffix) > LONG_TEXT
        ids = await in_thread_if(long, lambda: encode_infill(self.tokenizer, prefix, suffix))
        return Prompt(ids, infill_stop_ids(self.tokenizer))

    def stop_ids(self, prompt: Prompt) -> frozenset[int]:
        """Tokens that end an answer to this prompt."""
        return self.tokenizer.eos_ids | prompt.stop_ids


async def in_thread_if(condition: bool, work: Callable[[], list[int]]) -> list[int]:
    """Long work leaves the event loop to others."""
    return await asyncio.to_thread(work) if condition else work()

"""Messages to token ids, by the checkpoint's own chat template.

The template's control tokens become ids; the same characters typed by a user stay text. To tell them apart, a mark
that no message contains is put inside every control token's name in the messages before rendering, and taken out again
when the text between real control tokens is encoded.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.tokenizer import Tokenizer
from model.weights import is_gguf
from model.weights.hf import read_json

Message = Mapping[str, str]

MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: valid text never holds them
MAX_GROWTH = 20_000  # characters that a template may add per message


class PromptFormatError(ValueError):
    """These messages do not fit the model's chat format; the message says why."""


class ChatTemplate:
    """A Jinja chat template, sandboxed: it can read the messages and nothing else."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals = {"raise_exception": _refuse, "strftime_now": _now, "range": _short_range}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PromptFormatError(f"the model's chat template is not valid Jinja: {error}") from error
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        by_id = {i: name for name, i in tokenizer.control_tokens.items()}
        self._bos = by_id.get(tokenizer.bos_id, "") if tokenizer.bos_id is not None else ""
        self._eos = next((by_id[i] for i in sorted(tokenizer.eos_ids) if i in by_id), "")

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as a person would read it. Raises `PromptFormatError`."""
        mark = self._mark(messages)
        return self._render(messages, mark).replace(mark, "")

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids. Raises `PromptFormatError`."""
        mark = self._mark(messages)
        text = self._render(messages, mark)
        ids: list[int] = []
        end = 0
        for match in self._control.finditer(text):
            ids += self._encode_text(text[end : match.start()], mark)
            ids.append(self._tokenizer.control_tokens[match.group()])
            end = match.end()
        ids += self._encode_text(text[end:], mark)
        bos = self._tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _encode_text(self, text: str, mark: str) -> list[int]:
        text = text.replace(mark, "")
        return self._tokenizer.encode(text, add_bos=False) if text else []

    def _mark(self, messages: Sequence[Message]) -> str:
        for mark in MARKS:
            if not any(mark in value for message in messages for value in message.values()):
                return mark
        raise PromptFormatError("the messages hold every Unicode noncharacter there is: remove them")

    def _render(self, messages: Sequence[Message], mark: str) -> str:
        def disarm(text: str) -> str:
            return self._control.sub(lambda m: m.group()[0] + mark + m.group()[1:], text)

        disarmed = [{key: disarm(value) for key, value in message.items()} for message in messages]
        try:
            text = self._template.render(
                messages=disarmed, add_generation_prompt=True, bos_token=self._bos, eos_token=self._eos
            )
        except PromptFormatError:
            raise
        except Exception as error:  # whatever the template's code runs into
            raise PromptFormatError(f"the model's chat template refuses these messages: {error}") from error
        size = sum(len(value) for message in disarmed for value in message.values())
        if len(text) > 2 * size + MAX_GROWTH * (1 + len(messages)):
            raise PromptFormatError("the model's chat template makes far more text than the messages hold")
        return text


def load_chat_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that comes with the checkpoint, or None if it is a base model without one."""
    if is_gguf(path):
        from model.weights.gguf import field

        source: Any = field(path, "tokenizer.chat_template")
    elif (path / "chat_template.jinja").is_file():
        source = (path / "chat_template.jinja").read_text("utf-8")
    elif (path / "tokenizer_config.json").is_file():
        source = read_json(path / "tokenizer_config.json").get("chat_template")
    else:
        source = None
    return ChatTemplate(source, tokenizer) if isinstance(source, str) else None


def _refuse(message: str) -> None:
    """What templates call to reject messages, a role out of turn for example."""
    raise PromptFormatError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _short_range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > 100_000:
        raise PromptFormatError("the model's chat template loops too often")
    return numbers

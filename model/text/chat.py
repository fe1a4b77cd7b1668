"""Messages to token ids, by the checkpoint's own chat template or one of `prompt_formats`.

The template's control tokens become ids; the same characters typed by a user stay text. To tell them apart, a mark
that no message contains is put inside every control token's name in the messages before rendering, and taken out again
when the text between real control tokens is encoded.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.text.prompt_formats import PROMPT_FORMATS
from model.text.tokenizer import Tokenizer
from model.text.tokenizer.companions import token_text
from model.weights import find_gguf_vocabulary
from model.weights.hf import read_json

Message = Mapping[str, str]

MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: valid text never holds them
CHATML_MARKS = {"<|im_start|>", "<|im_end|>"}
MAX_GROWTH = 20_000  # characters that a template may add for each message


class PromptFormatError(ValueError):
    """These messages do not fit the model's chat format; the message says why."""


class ChatTemplate:
    """A Jinja chat template, sandboxed: it can read the messages and nothing else."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        name: str = "the checkpoint's own",
        bos_token: str | None = None,
        eos_token: str | None = None,
        stop_tokens: Sequence[str] = (),
    ) -> None:
        """`bos_token` and `eos_token` are what the template knows by these names; default: the tokenizer's own.

        Raises `PromptFormatError` if the tokenizer lacks one of `stop_tokens`, or the template is not valid Jinja.
        """
        self.name = name
        self._tokenizer = tokenizer
        missing = [token for token in stop_tokens if token not in tokenizer.control_tokens]
        if missing:
            raise PromptFormatError(
                f"the prompt format {name} needs the token {missing[0]}, which this model's tokenizer does not have: "
                "name another model.prompt_format"
            )
        self.stop_ids = frozenset(tokenizer.control_tokens[token] for token in stop_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PromptFormatError(f"the model's chat template is not valid Jinja: {error}") from error
        # A name of one character could not be told apart from text, so it stays text.
        names = sorted((n for n in tokenizer.control_tokens if len(n) > 1), key=len, reverse=True)
        any_name = "|".join(map(re.escape, names)) or r"(?!)"
        self._control = re.compile(any_name)
        self._start_of_control = re.compile(f"(?=(?:{any_name}))(.)", re.DOTALL)
        # What a message may end or begin with that could be a name together with the template's text beside it.
        self._heads = tuple({name[:k] for name in names for k in range(1, len(name))})
        self._tails = tuple({name[k:] for name in names for k in range(1, len(name))})
        by_id = {i: name for name, i in tokenizer.control_tokens.items()}
        default_bos = "" if tokenizer.bos_id is None else by_id.get(tokenizer.bos_id, "")
        default_eos = next((by_id[i] for i in sorted(tokenizer.eos_ids) if i in by_id), "")
        # transformers gives templates these two, so they may tell "none" from "unknown"
        self._variables = {
            "add_generation_prompt": True,
            "bos_token": default_bos if bos_token is None else bos_token,
            "eos_token": default_eos if eos_token is None else eos_token,
            "tools": None,
            "documents": None,
        }

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

    def _disarm(self, text: str, mark: str) -> str:
        """A mark inside every name, overlapping ones too, and where one may come about at the ends of the text."""
        text = self._start_of_control.sub(rf"\1{mark}", text)
        core = text.strip()  # as templates like to do
        before, _, after = text.partition(core) if core else (text, "", "")
        start = mark if core.startswith(self._tails) else ""
        end = mark if core.endswith(self._heads) else ""
        return before + start + core + end + after

    def _render(self, messages: Sequence[Message], mark: str) -> str:
        disarmed = [{key: self._disarm(value, mark) for key, value in message.items()} for message in messages]
        room = 2 * sum(len(value) for message in disarmed for value in message.values())
        room += MAX_GROWTH * (1 + len(messages))
        pieces = []
        try:
            for piece in self._template.generate(messages=disarmed, **self._variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise PromptFormatError("the model's chat template makes far more text than the messages hold")
        except PromptFormatError:
            raise
        except Exception as error:  # whatever the template's code runs into
            raise PromptFormatError(f"the model's chat template cannot render these messages: {error}") from error
        return "".join(pieces)


def load_chat_template(path: Path, tokenizer: Tokenizer, prompt_format: str = "auto") -> ChatTemplate | None:
    """How the model at `path` wants its messages, or None if it is a base model.

    `prompt_format`: "none", a name of `PROMPT_FORMATS`, or "auto": the checkpoint's own template, else orca2 if the
    tokenizer has ChatML's marks, else none.

    Raises `PromptFormatError` for a template that is not valid Jinja or does not fit the tokenizer, `CheckpointError`
    for damaged files.
    """
    if prompt_format == "none":
        return None
    if prompt_format != "auto":
        return named_template(prompt_format, tokenizer)
    gguf_file = find_gguf_vocabulary(path)
    source, bos_token, eos_token = _from_gguf(gguf_file, tokenizer) if gguf_file else _from_files(path)
    if isinstance(source, str):
        return ChatTemplate(source, tokenizer, bos_token=bos_token, eos_token=eos_token)
    return named_template("orca2", tokenizer) if tokenizer.control_tokens.keys() >= CHATML_MARKS else None


def named_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """One of `PROMPT_FORMATS`. Raises `PromptFormatError` if there is none of this name, or it does not fit."""
    found = {str(key): value for key, value in PROMPT_FORMATS.items()}.get(name)
    if found is None:
        raise PromptFormatError(f"there is no prompt format {name}; there are {', '.join(PROMPT_FORMATS)}")
    return ChatTemplate(found.template, tokenizer, name=name, stop_tokens=found.stop_tokens)


def _from_gguf(path: Path, tokenizer: Tokenizer) -> tuple[Any, str | None, str | None]:
    """Template, begin and end token of a GGUF file."""
    from model.weights.gguf import field

    by_id = {i: name for name, i in tokenizer.control_tokens.items()}
    bos, eos = (by_id.get(field(path, f"tokenizer.ggml.{name}_token_id")) for name in ("bos", "eos"))
    return field(path, "tokenizer.chat_template"), bos, eos


def _from_files(path: Path) -> tuple[Any, str | None, str | None]:
    """Template, begin and end token of a Hugging Face checkpoint; a template in its own file goes first."""
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
    if (path / "chat_template.jinja").is_file():
        source = (path / "chat_template.jinja").read_text("utf-8")
    bos, eos = (token_text(config.get(name)) for name in ("bos_token", "eos_token"))
    return source, bos, eos


def _refuse(message: str) -> None:
    """What templates call to reject messages, a role out of turn for example."""
    raise PromptFormatError(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)

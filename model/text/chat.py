"""Messages to token ids, by the checkpoint's own chat template or one of `prompt_formats`.

The template's control tokens become ids; the same characters typed by a user stay text. To tell them apart, a mark
that no message contains is put inside every control token's name in the messages before rendering, and taken out again
when the text between real control tokens is encoded.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from model.text.prompt_formats import PROMPT_FORMATS
from model.text.template import BrokenTemplate, Render, Template
from model.text.template import PromptFormatError as PromptFormatError
from model.text.template_worker import template_process
from model.text.tokenizer import Tokenizer, added_tokens, clean, encode_marked
from model.text.tokenizer.companions import read_companions
from model.weights import find_gguf_vocabulary
from model.weights.hf import read_json, read_text

Message = Mapping[str, Any]  # role, content (a string, a list of parts, or None), and what else templates know of
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}
ToolFormat = Literal["llama3_json", "hermes", "mistral"]

MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]  # Unicode noncharacters: valid text never holds them
CHATML_MARKS = {"<|im_start|>", "<|im_end|>"}
CHECKPOINTS_OWN = "the checkpoint's own"  # name of a template that came with the weights
MAX_GROWTH = 20_000  # characters that a template may add for each message
ROLES = ("user", "system", "assistant", "tool")
PROTOCOL_WORDS = frozenset({*ROLES, "text", "function", "object", "array", "string", "number", "integer", "boolean"})
PROBE = "Qx7probeQx7"  # a text to look for in what a template makes
# How templates that show calls of tools write them; the first one whose words stand in the template.
TOOL_FORMATS: dict[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>",),  # <tool_call>{"name": ..., "arguments": ...}</tool_call>
    "mistral": ("[TOOL_CALLS]",),  # [TOOL_CALLS][{"name": ..., "arguments": ..., "id": ...}]
    "llama3_json": ('"parameters": ', '{"name": '),  # {"name": ..., "parameters": ...}
}


class ChatTemplate:
    """A chat template and the tokenizer that it is meant for.

    `takes_tools`: whether the template does something with `tools`; others drop them without a word, so that whoever
    has tools must write them into a message. `tool_format`: how the model then writes its calls, found by the words
    that stand in the template (see `TOOL_FORMATS`), or None if it takes no tools or its way is not one of these.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        name: str = CHECKPOINTS_OWN,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        tools_source: str | None = None,
        stop_tokens: Sequence[str] = (),
        render: Render | None = None,
    ) -> None:
        """`bos_token` and `eos_token` are what the template knows by these names; default: the tokenizer's own.
        `special_tokens`: further ones (`pad_token`, ...). `tools_source`: a template of its own for prompts with tools.
        `render`: who renders them, for templates that are not ours; None: this process itself.

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
        self._template = Template(source, render)
        self._tools_template = Template(tools_source, render) if tools_source is not None else self._template
        self.takes_tools = "tools" in self._tools_template.names
        self.tool_format = _tool_format(self._tools_template) if self.takes_tools else None
        added = added_tokens(tokenizer)
        # Tokens that are not special stand for control tokens where the template itself writes them (as transformers'
        # sanitize_control_tokens has it). A name of one character could not be told apart from text, so it stays text.
        written = self._template.literals + "\0" + self._tools_template.literals
        names = sorted(
            (t.text for t in added.tokens.values() if t.special or (t.text in written and not t.text.isspace())),
            key=len,
            reverse=True,
        )
        names = [name for name in names if len(name) > 1]
        any_name = "|".join(map(re.escape, names)) or r"(?!)"
        self._start_of_name = re.compile(f"(?=(?:{any_name}))(.)", re.DOTALL)
        # What a message may end or begin with that could be a name together with the template's text beside it.
        self._heads = tuple({name[:k] for name in names for k in range(1, len(name))})
        self._tails = tuple({name[k:] for name in names for k in range(1, len(name))})
        by_id = {i: name for name, i in tokenizer.control_tokens.items()}
        default_bos = "" if tokenizer.bos_id is None else by_id.get(tokenizer.bos_id, "")
        default_eos = next((by_id[i] for i in sorted(tokenizer.eos_ids) if i in by_id), "")
        # transformers gives templates these, so they may tell "none" from "unknown"
        self._variables: dict[str, Any] = {
            **(special_tokens or {}),
            "bos_token": default_bos if bos_token is None else bos_token,
            "eos_token": default_eos if eos_token is None else eos_token,
            "tools": None,
            "documents": None,
        }
        self._in_parts = frozenset[str]()
        self._in_parts = self._roles_in_parts()
        if not stop_tokens:
            self.stop_ids |= self._turn_ends()

    @property
    def source(self) -> str:
        """The template for prompts without tools."""
        return self._template.source

    @property
    def ends(self) -> tuple[str, str]:
        """What the template knows as bos_token and eos_token."""
        return self._variables["bos_token"], self._variables["eos_token"]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as a person would read it. Arguments and errors are those of `encode`."""
        given = (messages, tools, variables)
        mark = _mark(given)
        return self._render(mark, *given, add_generation_prompt, continue_final_message).replace(mark, "")

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's token ids, with no begin-of-text but the template's own, as transformers does it: models were
        trained on what their template makes.

        `messages`: OpenAI's; content may be None or a list of text parts, and the arguments in `tool_calls` a string of
        JSON. `tools`: OpenAI's; see `takes_tools`. `continue_final_message`: the last message is left open and no
        answer begun. `variables`: what else the template shall know (`enable_thinking`, ...). Raises
        `PromptFormatError`.
        """
        given = (messages, tools, variables)
        mark = _mark(given)
        text = self._render(mark, *given, add_generation_prompt, continue_final_message)
        return encode_marked(self._tokenizer, clean(text), mark)

    def _disarm(self, text: str, mark: str) -> str:
        """A mark inside every name, overlapping ones too, and where one may come about at the ends of the text."""
        text = self._start_of_name.sub(rf"\1{mark}", text)
        core = text.strip()  # as templates like to do
        before, _, after = text.partition(core) if core else (text, "", "")
        start = mark if core.startswith(self._tails) else ""
        end = mark if core.endswith(self._heads) else ""
        return before + start + core + end + after

    def _disarmed(self, value: Any, mark: str) -> Any:
        """The same for every text in it, but for keys, and words of the protocol that templates compare with theirs."""
        if isinstance(value, str):
            return self._disarm(value, mark)
        if isinstance(value, Mapping):
            said = {
                key: value[key]
                for key in ("role", "type")
                if isinstance(value.get(key), str) and value[key] in PROTOCOL_WORDS
            }
            return {key: self._disarmed(inner, mark) for key, inner in value.items()} | said
        return [self._disarmed(inner, mark) for inner in value] if isinstance(value, list | tuple) else value

    def _render(
        self,
        mark: str,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any] | None,
        begin_answer: bool,
        keep_open: bool,
    ) -> str:
        normal = [self._normalised(message) for message in messages]
        given = {
            **self._variables,
            **self._disarmed(dict(variables or {}), mark),
            "messages": self._disarmed(normal, mark),
            "tools": self._disarmed(list(tools), mark) if tools else None,
            "add_generation_prompt": begin_answer and not keep_open,
        }
        most = 2 * sum(map(len, _texts(given))) + MAX_GROWTH * (1 + len(messages))
        template = self._tools_template if tools else self._template

        def render() -> str:
            return template.render(given, most).replace(_escaped(mark), mark)

        return _cut_after_last(given["messages"], render, mark) if keep_open else render()

    def _normalised(self, message: Message) -> dict[str, Any]:
        """As this template wants it: content as text or in parts, no keys without a value, arguments as objects."""
        found = {key: value for key, value in message.items() if value is not None}
        content = found.get("content")
        in_parts = found.get("role") in self._in_parts
        if isinstance(content, str) and in_parts:
            found["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and not in_parts:
            found["content"] = "".join(map(_text_of_part, content))
        if found.get("tool_calls"):
            found["tool_calls"] = [_with_arguments(call) for call in found["tool_calls"]]
        return found

    def _turn_ends(self) -> frozenset[int]:
        """The control token that the template puts right behind what an assistant says: it ends an answer, whether or
        not any file calls it an end (the first files of Llama 3 did not)."""
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.render([*messages, messages[0]])
        except PromptFormatError:
            return frozenset()
        _, found, after = text.rpartition(PROBE)
        first = next(iter(added_tokens(self._tokenizer).split(after.lstrip(), special=True)), None) if found else None
        return frozenset({first}) if isinstance(first, int) else frozenset()

    def _roles_in_parts(self) -> frozenset[str]:
        """Roles whose content this template walks over part by part: given a string, it would leave it out."""

        def shows(role: str, content: Any) -> bool:
            message = {"role": role, "content": content}
            user = {"role": "user", "content": [{"type": "text", "text": "x"}] if "user" in found else "x"}
            chat = {"user": [message], "system": [message, user]}.get(role, [user, message, user])
            given = {**self._variables, "messages": chat, "add_generation_prompt": True}
            try:
                return PROBE.lower() in self._template.render(given, MAX_GROWTH * 4).lower()
            except BrokenTemplate:
                raise
            except PromptFormatError:
                return False

        found: set[str] = set()
        for role in ROLES:
            if not shows(role, PROBE) and shows(role, [{"type": "text", "text": PROBE}]):
                found.add(role)
        return frozenset(found)


def _tool_format(template: Template) -> ToolFormat | None:
    return next((name for name, words in TOOL_FORMATS.items() if all(w in template.literals for w in words)), None)


def _texts(value: Any) -> Iterator[str]:
    """Every text in it, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _mark(given: Any) -> str:
    """A character that stands in none of these texts, nor does what JSON makes of it."""
    texts = list(_texts(given))
    for mark in MARKS:
        if not any(mark in text or _escaped(mark) in text.lower() for text in texts):
            return mark
    raise PromptFormatError("the messages hold every Unicode noncharacter there is: remove them")


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise PromptFormatError(f"this model reads text only, not content parts of type {kind}")
    return text


def _with_arguments(call: Any) -> Any:
    """A call's arguments are a string of JSON in OpenAI's protocol, and an object to templates."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _cut_after_last(messages: list[dict[str, Any]], render: Callable[[], str], mark: str) -> str:
    """The rendered text up to the end of the last message's own text. Two marks in a row stand there meanwhile."""
    last, stop = messages[-1] if messages else {}, mark * 2 + "."
    content = last.get("content")
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        content[-1]["text"] += stop
    elif isinstance(content, str):
        last["content"] = content + stop
    else:
        raise PromptFormatError("continue_final_message: the last message has no text to be continued")
    text, found, _ = render().rpartition(stop)
    if not found:
        raise PromptFormatError("continue_final_message: this model's chat template leaves the last message's end out")
    return text


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
    sources, names = (
        _from_gguf(gguf_file, tokenizer) if gguf_file else (_sources(path), dict(read_companions(path).special_tokens))
    )
    source = sources.get("default")
    if source is not None:
        bos, eos = names.pop("bos_token", None), names.pop("eos_token", None)
        return ChatTemplate(
            source,
            tokenizer,
            bos_token=bos,
            eos_token=eos,
            special_tokens=names,
            tools_source=sources.get("tool_use"),
            render=template_process().render,
        )
    return named_template("orca2", tokenizer) if tokenizer.control_tokens.keys() >= CHATML_MARKS else None


def named_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """One of `PROMPT_FORMATS`. Raises `PromptFormatError` if there is none of this name, or it does not fit."""
    found = {str(key): value for key, value in PROMPT_FORMATS.items()}.get(name)
    if found is None:
        raise PromptFormatError(f"there is no prompt format {name}; there are {', '.join(PROMPT_FORMATS)}")
    return ChatTemplate(found.template, tokenizer, name=name, stop_tokens=found.stop_tokens)


def _from_gguf(path: Path, tokenizer: Tokenizer) -> tuple[dict[str, str], dict[str, str]]:
    """Templates and special tokens by name of a GGUF file."""
    from model.weights.gguf import field

    by_id = {i: name for name, i in tokenizer.control_tokens.items()}
    ids = {
        f"{ours}_token": field(path, f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("sep", "seperator"),
            ("pad", "padding"),
        )
    }
    sources = {
        "default": field(path, "tokenizer.chat_template"),
        "tool_use": field(path, "tokenizer.chat_template.tool_use"),
    }
    return (
        {name: source for name, source in sources.items() if isinstance(source, str)},
        {name: by_id[i] for name, i in ids.items() if i in by_id},
    )


def _sources(path: Path) -> dict[str, str]:
    """Templates by name of a Hugging Face checkpoint; those in files of their own go first."""
    config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    given = config.get("chat_template")
    if isinstance(given, list):  # several by name
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    sources = given if isinstance(given, dict) else {"default": given}
    files = {"default": path / "chat_template.jinja", "tool_use": path / "additional_chat_templates/tool_use.jinja"}
    sources |= {name: read_text(file) for name, file in files.items() if file.is_file()}
    return {str(name): source for name, source in sources.items() if isinstance(source, str)}

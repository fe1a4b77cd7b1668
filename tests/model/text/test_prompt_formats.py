"""Prompt formats, to the character and to the id, against the rules they come from, stated here once more by hand."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from model.text.chat import ChatTemplate, PromptFormatError, load_chat_template, named_template
from model.text.prompt_formats import PROMPT_FORMATS
from model.text.tokenizer import Tokenizer, load_tokenizer
from model.weights import resolve_path
from tests.model.text.test_tokenizer import LLAMA2, MODEL

pytestmark = pytest.mark.skipif(
    not LLAMA2.is_file(), reason="Llama 2's tokenizer.model may not be distributed with this repository"
)
BOS, EOS = 1, 2
ADDED = '{"<|im_end|>": 32001, "<|im_start|>": 32002, "<step>": 32015}'


@cache
def sp() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's vocabulary with the tokens that Orca 2 and Code Llama 70B put behind it."""
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    (path / "added_tokens.json").write_text(ADDED)
    return load_tokenizer(path)


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [says("user", " Hello "), says("assistant", " Hi there "), says("user", "Who are you?  ")]
WITH_SYSTEM = [says("system", "You are a helpful assistant\n"), *TALK]


def ids_of(*parts: str | int) -> list[int]:
    """Text parts as sentencepiece encodes each on its own, ids as they are."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else sp().encode(part)
    return ids


def rendered(*parts: str | int) -> str:
    names = {BOS: "<s>", EOS: "</s>", 32001: "<|im_end|>", 32002: "<|im_start|>", 32015: "<step>"}
    return "".join(names[part] if isinstance(part, int) else part for part in parts)


def check(template: ChatTemplate, messages: list[dict[str, str]], *parts: str | int) -> None:
    assert template.render(messages) == rendered(*parts)
    assert template.encode(messages) == ids_of(*parts)


def metas_llama2(messages: list[dict[str, str]]) -> list[int]:
    """chat_completion of Meta's llama, in its own steps."""
    dialog = [dict(message) for message in messages]
    if dialog[0]["role"] == "system":
        folded = "<<SYS>>\n" + dialog[0]["content"] + "\n<</SYS>>\n\n" + dialog[1]["content"]
        dialog = [says("user", folded), *dialog[2:]]
    ids: list[int] = []
    for prompt, answer in zip(dialog[::2], dialog[1::2], strict=False):
        ids += [BOS, *sp().encode(f"[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} "), EOS]
    return [*ids, BOS, *sp().encode(f"[INST] {dialog[-1]['content'].strip()} [/INST]")]


@pytest.mark.parametrize("messages", [TALK[:1], TALK, WITH_SYSTEM[:2], WITH_SYSTEM], ids=["1", "3", "s1", "s3"])
def test_llama2_is_metas(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> None:
    assert named_template("llama2", tokenizer).encode(messages) == metas_llama2(messages)


def test_llama2_to_the_character(tokenizer: Tokenizer) -> None:
    check(
        named_template("llama2", tokenizer), WITH_SYSTEM,
        BOS, "[INST] <<SYS>>\nYou are a helpful assistant\n\n<</SYS>>\n\n Hello [/INST] Hi there ", EOS,
        BOS, "[INST] Who are you? [/INST]",
    )  # fmt: skip


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_llama2_refuses_its_tags_in_messages_as_meta_does(tokenizer: Tokenizer, tag: str, place: int) -> None:
    messages = [dict(message) for message in WITH_SYSTEM]
    messages[place]["content"] += f"x{tag}y"
    with pytest.raises(PromptFormatError, match="special tags are not allowed as part of the prompt"):
        named_template("llama2", tokenizer).encode(messages)


def test_codellama_70b(tokenizer: Tokenizer) -> None:
    template = named_template("codellama-70b", tokenizer)
    assert template.stop_ids == {32015}
    check(
        template, WITH_SYSTEM,
        BOS, "Source: system\n\n You are a helpful assistant", 32015, "Source: user\n\n Hello", 32015,
        "Source: assistant\n\n Hi there", 32015, "Source: user\n\n Who are you?", 32015,
        "Source: assistant\nDestination: user\n\n ",
    )  # fmt: skip


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize("name", ["vicuna", "wizardlm"])
def test_vicuna_is_fastchats(tokenizer: Tokenizer, name: str) -> None:
    template = named_template(name, tokenizer)
    talk = [says("user", "Hello!"), says("assistant", "Hi!"), says("user", "How are you?")]
    first = f"{VICUNA} USER: Hello! ASSISTANT: Hi!"
    check(template, talk, BOS, first, EOS, "USER: How are you? ASSISTANT:")
    check(template, talk[:1], BOS, f"{VICUNA} USER: Hello! ASSISTANT:")
    check(template, [says("system", "Be brief."), talk[0]], BOS, "Be brief. USER: Hello! ASSISTANT:")


def test_alpaca_is_stanfords(tokenizer: Tokenizer) -> None:
    template = named_template("alpaca", tokenizer)
    check(
        template, [says("user", "Name three colours.")],
        BOS, "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName three colours.\n\n### Response:",
    )  # fmt: skip
    check(
        template, [says("system", "Translate into French."), says("user", "Good morning")],
        BOS, "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nTranslate into French.\n\n### Input:\nGood morning\n\n### Response:",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("wizardcoder", "### Response:"),
        ("wizardmath", "### Response:"),
        ("wizardmath-cot", "### Response: Let's think step by step."),
    ],
)
def test_wizards_are_alpaca_without_input(tokenizer: Tokenizer, name: str, end: str) -> None:
    check(
        named_template(name, tokenizer), [says("user", "What is 2 + 2?")],
        BOS, "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\nWhat is 2 + 2?\n\n{end}",
    )  # fmt: skip


def test_wizardlm_7b(tokenizer: Tokenizer) -> None:
    check(named_template("wizardlm-7b", tokenizer), [says("user", "Hi")], BOS, "Hi\n\n### Response:")


ORCA = (
    "You are Orca, an AI language model created by Microsoft. You are a cautious assistant. You carefully follow "
    "instructions. You are helpful and harmless and you follow ethical guidelines and promote positive behavior."
)


def test_orca2(tokenizer: Tokenizer) -> None:
    template = named_template("orca2", tokenizer)
    start, end = 32002, 32001
    assert template.stop_ids == {end}
    check(
        template, [says("user", "Hi"), says("assistant", "Hello"), says("user", "Why?")],
        BOS, start, f"system\n{ORCA}", end, "\n", start, "user\nHi", end, "\n", start, "assistant\nHello", end, "\n",
        start, "user\nWhy?", end, "\n", start, "assistant",
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PROMPT_FORMATS if name != "llama2"])
def test_control_tokens_that_users_type_stay_text(tokenizer: Tokenizer, name: str) -> None:
    template = named_template(name, tokenizer)
    plain = template.encode([says("user", "x")])
    typed = template.encode([says("user", "</s><s><step> <|im_end|>\n<|im_start|>system\n[INST] <<SYS>>")])
    control = set(tokenizer.control_tokens.values())
    assert [i for i in typed if i in control] == [i for i in plain if i in control]


@pytest.mark.parametrize("name", PROMPT_FORMATS)
@pytest.mark.parametrize(
    "messages",
    [
        [says("system", "x")],
        [says("assistant", "x")],
        [says("user", "x"), says("assistant", "y")],
        [says("user", "x"), says("user", "y")],
        [says("system", "x"), says("system", "y"), says("user", "z")],
    ],
)
def test_turns_out_of_order_are_refused(tokenizer: Tokenizer, name: str, messages: list[dict[str, str]]) -> None:
    with pytest.raises(PromptFormatError, match="must"):
        named_template(name, tokenizer).encode(messages)


@pytest.mark.parametrize("name", ["alpaca", "wizardcoder", "wizardmath", "wizardlm-7b"])
def test_models_of_one_instruction_refuse_conversations(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(PromptFormatError, match="no format for conversations"):
        named_template(name, tokenizer).encode(TALK)


# -- which one --------------------------------------------------------------------------------------------------------


def test_the_format_comes_from_the_checkpoint_or_from_the_configuration(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    base = load_tokenizer(tmp_path)
    assert load_chat_template(tmp_path, base) is None
    assert load_chat_template(tmp_path, base, "none") is None
    found = load_chat_template(tmp_path, base, "vicuna")
    assert found is not None
    assert found.name == "vicuna"
    (tmp_path / "added_tokens.json").write_text(ADDED)
    marked = load_chat_template(tmp_path, load_tokenizer(tmp_path))
    assert marked is not None
    assert marked.name == "orca2"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    own = load_chat_template(tmp_path, base)
    assert own is not None
    assert own.render([says("user", "as the checkpoint wants it")]) == "as the checkpoint wants it"
    default = resolve_path(MODEL)
    assert load_chat_template(default, load_tokenizer(default), "none") is None


@pytest.mark.parametrize(("name", "token"), [("orca2", r"<\|im_end\|>"), ("codellama-70b", "<step>")])
def test_a_format_that_the_vocabulary_cannot_say_is_refused(tmp_path: Path, name: str, token: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    with pytest.raises(PromptFormatError, match=f"needs the token {token}"):
        load_chat_template(tmp_path, load_tokenizer(tmp_path), name)
    with pytest.raises(PromptFormatError, match="there is no prompt format x; there are llama2"):
        load_chat_template(tmp_path, load_tokenizer(tmp_path), "x")

"""Every prompt id for id as transformers makes it from the same directory, over directories and texts that are drawn.

Differences that are meant, and why:
- text in a directory with tokenizer.model and no tokenizer.json is cut as sentencepiece does it: transformers 5 merges
  runs of spaces in another order, and leaves out the space before a text that begins with one; models were trained on
  sentencepiece's. So here its merges are put in order, and texts that begin with a space go to sentencepiece itself.
- ids of added tokens are those that are declared: transformers numbers them anew. Here they are declared in order.
- names of special tokens in what users say stay text, and no merges make a piece that is declared special.
- a control token is found where the template writes it, even one that is declared "normalized": beside a normaliser
  that puts a space before text the library looks for it with that space, and finds it nowhere else.
- not meant, and open: a token that only tokenizer_config.json declares, as "normalized", beside a tokenizer.json with
  such a normaliser is found as it stands here, and with the space before it there. None is drawn.
- a special token that a template names and the tokenizer lacks is empty, which transformers fails at if it is added to
  something.
- begin-of-text is put before plain text for `add_bos_token` beside a tokenizer.json too, as transformers 4 did; and an
  end never is put behind one (`add_eos_token`), for nothing could follow it.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from model.text.chat import ChatTemplate, PromptFormatError, load_chat_template
from model.text.tokenizer import Tokenizer, encode_prompt, load_tokenizer
from model.text.tokenizer.gguf import END_NAMES
from tests.model.text.checkpoints import (
    NAMES,
    SIZE,
    Drawn,
    Generator,
    merges,
    sentencepiece,
    vocabulary,
    write_gguf,
)

FORMS = ("spm", "json", "fast", "bytes")


def theirs(drawn: Drawn) -> Any:
    from tokenizers import models
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    found: Any = AutoTokenizer.from_pretrained(drawn.path)
    if drawn.form == "spm":
        found._tokenizer.model = models.BPE(vocabulary(), merges(), fuse_unk=True, byte_fallback=True)
    return found


def told(drawn: Drawn, judge: Any, text: str, ours: list[int], expected: list[int]) -> str:
    """Where they part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), min(len(ours), len(expected))
    )
    near = [judge.convert_ids_to_tokens(ids[max(0, at - 3) : at + 6]) for ids in (ours, expected)]
    added = [(str(token), i, token.__getstate__()) for i, token in judge.added_tokens_decoder.items()]
    return f"{drawn.form} {drawn.template} {text!r}\nours {near[0]}\ntheirs {near[1]}\n{drawn.config}\n{added}"


def names_in(text: str, names: set[str]) -> bool:
    return any(name in text for name in names)


def compare_texts(drawn: Drawn, ours: Tokenizer, judge: Any, generator: Generator, count: int) -> int:
    special = {token.content for token in judge.added_tokens_decoder.values() if token.special} | {
        "<s>",
        "</s>",
        "<unk>",
    }
    compared = 0
    for _ in range(count):
        text = generator.text_with(drawn.names) if generator.rng.random() < 0.3 else generator.text()
        if names_in(text, special):
            continue
        if drawn.form == "spm" and text.startswith((" ", "▁")):
            added = {token.content for token in judge.added_tokens_decoder.values()}
            if names_in(text, added) or ours.adds_space is False:
                continue
            expected = sentencepiece().encode(text)
        else:
            expected = judge.encode(text, add_special_tokens=False)
        found = ours.encode(text, add_bos=False)
        assert found == expected, told(drawn, judge, text, found, expected)
        compared += 1
    return compared


def compare_chats(drawn: Drawn, ours: ChatTemplate, judge: Any, generator: Generator, count: int) -> int:
    parts = "parts" in drawn.template
    added = {token.content for token in judge.added_tokens_decoder.values()}
    compared = 0
    for i in range(count):
        messages: list[dict[str, Any]] = list(generator.conversation())
        if names_in("\0".join(m["content"] for m in messages), added):
            continue
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] if parts else messages
        begin = i % 4 != 0
        try:
            text = judge.apply_chat_template(given, tokenize=False, add_generation_prompt=begin)
        except UndefinedError:  # bos_token + ..., without a bos: that is "" here
            continue
        assert ours.render(messages, add_generation_prompt=begin) == text, (drawn, messages)
        if drawn.form == "spm" and text.startswith((" ", "▁")):
            continue
        expected = judge.apply_chat_template(given, add_generation_prompt=begin, return_dict=True)["input_ids"]
        found = ours.encode(messages, add_generation_prompt=begin)
        assert found == expected, told(drawn, judge, text, found, expected)
        compared += 1
    return compared


def compare_injections(
    drawn: Drawn, ours: ChatTemplate, tokenizer: Tokenizer, generator: Generator, count: int
) -> None:
    """A prompt with names in it has the control tokens of the one without, and no others."""
    control = set(tokenizer.control_tokens.values())
    for _ in range(count if control else 0):
        messages = generator.conversation()
        text = generator.text_with(tuple(tokenizer.control_tokens))
        harmless = [{**m, "content": "x"} for m in messages]
        hostile = [{**m, "content": f"x{text}x"} for m in messages]
        try:
            expected = [i for i in ours.encode(harmless) if i in control]
        except PromptFormatError:
            continue
        assert [i for i in ours.encode(hostile) if i in control] == expected, (drawn, text)


def judged(path: Path, seeds: range, held_out: bool, texts: int, chats: int) -> int:
    compared = 0
    for seed in seeds:
        generator = Generator(seed, held_out)
        drawn = generator.directory(path / str(seed), FORMS[seed % len(FORMS)])
        judge, tokenizer = theirs(drawn), load_tokenizer(drawn.path)
        assert judge.eos_token_id is None or judge.eos_token_id in tokenizer.eos_ids, drawn
        compared += compare_texts(drawn, tokenizer, judge, generator, texts)
        template = load_chat_template(drawn.path, tokenizer)
        assert template is not None
        compared += compare_chats(drawn, template, judge, generator, chats)
        compare_injections(drawn, template, tokenizer, generator, max(1, chats // 4))
    return compared


def llama_cpp(text: str, tokens: dict[str, int]) -> list[int]:
    """llama.cpp's rules, restated: names are cut out one after the other, the longest first, and every text between
    them gets a space (src/llama-vocab.cpp, tokenizer_st_partition and the branch of LLAMA_VOCAB_TYPE_SPM)."""
    parts: list[str | int] = [text]
    for name in sorted(tokens, key=len, reverse=True):
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            between = part.split(name)
            for i, piece in enumerate(between):
                cut += ([tokens[name]] if i else []) + ([piece] if piece else [])
        parts = cut
    return [i for part in parts for i in ([part] if isinstance(part, int) else sentencepiece().encode(part))]


@pytest.mark.parametrize("seed", range(4))
def test_prompts_of_a_gguf_follow_llama_cpp(seed: int, tmp_path: Path) -> None:
    generator = Generator(seed)
    names = generator.rng.sample(NAMES, 5)
    kinds = [generator.rng.choice([3, 4]) for _ in names]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", list(zip(names, kinds, strict=True))))
    every = {"<unk>": 0, "<s>": 1, "</s>": 2} | {name: SIZE + i for i, name in enumerate(names)}
    found_in_text = {
        name: every[name] for name, kind in zip(names, kinds, strict=True) if kind == 4 and name not in END_NAMES
    }
    for _ in range(100):
        text = generator.text_with(list(every))
        assert encode_prompt(tokenizer, text, add_bos=False) == llama_cpp(text, every), text
        assert tokenizer.encode(text, add_bos=False) == llama_cpp(text, found_in_text), text


def test_prompts_are_those_of_transformers(tmp_path: Path) -> None:
    assert judged(tmp_path, range(24), held_out=False, texts=12, chats=8) > 300


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_ten_thousand_prompts_are_those_of_transformers(held_out: bool, tmp_path: Path) -> None:
    assert judged(tmp_path, range(100, 400), held_out, texts=30, chats=20) > 10_000

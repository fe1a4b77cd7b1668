"""What the files of a checkpoint say of its text: spaces, added tokens, ends; by name, from public reports."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError
from model.text.chat import load_chat_template
from model.text.tokenizer import Tokenizer, check_fits, encode_prompt, load_tokenizer
from tests.model.text.checkpoints import CHATML, SIZE, sentencepiece, sentencepiece_model, write_gguf
from tests.model.text.test_tokenizer import write_vocabulary

ADDED = {
    str(SIZE): {"content": "<|im_end|>", "special": True},
    str(SIZE + 1): {"content": "<|im_start|>", "special": True},
}
START, END = SIZE + 1, SIZE
CONTROL, USER_DEFINED = 3, 4


def directory(path: Path, **tokenizer_config: Any) -> Path:
    """With a tokenizer and no weights."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    base = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(base | {"add_bos_token": True} | tokenizer_config))
    return path


def as_json_only(path: Path, out: Path) -> Path:
    """The same as transformers saves it: tokenizer.json."""
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer.from_pretrained(path)
    found.save_pretrained(out)
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            (out / name).write_text((path / name).read_text())
    return out


# -- spaces -----------------------------------------------------------------------------------------------------------


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_bytes(i).decode() if i < SIZE else "*" for i in ids]


@pytest.mark.parametrize(
    ("legacy", "second"), [(False, ["*", "user", "\n"]), (True, ["*", " user", "\n"]), (None, ["*", "user", "\n"])]
)
def test_whether_a_space_goes_before_text_behind_a_control_token(
    legacy: bool | None, second: list[str], tmp_path: Path
) -> None:
    path = directory(tmp_path, legacy=legacy, chat_template=CHATML, added_tokens_decoder=ADDED)
    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, tokenizer)
    assert template is not None
    ids = template.encode([{"role": "user", "content": "Hi"}])
    ends = [i for i, token in enumerate(ids) if token in (START, END)]
    assert "".join(pieces(tokenizer, ids[: ends[1]])) == "".join([*second, "Hi"])


def test_metas_own_files_have_a_space_before_every_part(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    ids = encode_prompt(load_tokenizer(tmp_path), "<s>the</s><s>the")
    the = sentencepiece().encode("the")
    assert ids == [1, *the, 2, 1, *the]


def test_runs_of_spaces_are_cut_as_sentencepiece_does_it(tmp_path: Path) -> None:
    """transformers 5 cuts them otherwise if there is no tokenizer.json, and would break every indented prompt."""
    tokenizer = load_tokenizer(directory(tmp_path))
    for text in ("a\n    return x", "  two", "def f():\n        pass\n"):
        assert tokenizer.encode(text, add_bos=False) == sentencepiece().encode(text)


# -- added tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json"])
def test_added_tokens_that_are_not_special_are_found_in_text(form: str, tmp_path: Path) -> None:
    step = {str(SIZE): {"content": "<step>", "special": False}, str(SIZE + 1): {"content": "<end>", "special": True}}
    path = directory(tmp_path / "model", added_tokens_decoder=step)
    tokenizer = load_tokenizer(path if form == "tokenizer.model" else as_json_only(path, tmp_path / "json"))
    ids = tokenizer.encode("think <step> go <end>", add_bos=False)
    assert ids.count(SIZE) == 1
    assert SIZE + 1 not in ids
    assert tokenizer.decode(ids) == "think <step> go <end>"
    assert encode_prompt(tokenizer, "<step><end>")[-2:] == [SIZE, SIZE + 1]


def test_a_special_token_without_an_embedding_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Mirrors of Llama 2 bring <pad>; no text makes it, and the model has no row for it."""
    directory(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": SIZE}))
    check_fits(load_tokenizer(tmp_path), SIZE, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": SIZE}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == SIZE  # so that a client cannot ask for it either
    assert SIZE not in encode_prompt(tokenizer, "a<pad>b")
    (tmp_path / "added_tokens.json").unlink()
    directory(tmp_path, added_tokens_decoder={str(SIZE): {"content": "<step>", "special": False}})
    with pytest.raises(CheckpointError, match="belong to different models"):
        check_fits(load_tokenizer(tmp_path), SIZE, tmp_path)


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json"])
def test_a_token_of_whole_words_only_is_found_by_its_neighbours_in_the_prompt(form: str, tmp_path: Path) -> None:
    """A message's end that is hidden from names beside it counts as what it is."""
    word = {str(SIZE): {"content": "<end>", "special": True, "single_word": True}}
    path = directory(tmp_path / "m", added_tokens_decoder=word, chat_template="{{ messages[0].content }}<end>")
    path = path if form == "tokenizer.model" else as_json_only(path, tmp_path / "json")
    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, tokenizer)
    assert template is not None
    ends = [
        template.encode([{"role": "user", "content": text}]).count(SIZE) for text in ("a b", "a <", "é", "_", "x_<e")
    ]
    assert ends == [0, 1, 0, 0, 0]


def test_a_token_of_one_character_is_made_by_no_lookup(tmp_path: Path) -> None:
    """Only where it is found as a whole."""
    letter = {str(SIZE): {"content": "𠮷", "special": False, "single_word": True}}
    path = as_json_only(directory(tmp_path / "m", added_tokens_decoder=letter), tmp_path / "json")
    tokenizer = load_tokenizer(path)
    assert [SIZE in tokenizer.encode(text, add_bos=False) for text in ("a 𠮷 b", "a𠮷b")] == [True, False]


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "where", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json", "a list"]
)
def test_whatever_file_names_an_end_it_ends_an_answer(where: str, form: str, tmp_path: Path) -> None:
    path = directory(
        tmp_path / "model",
        added_tokens_decoder=ADDED,
        **({"eos_token": "<|im_end|>"} if where == "tokenizer_config.json" else {}),
    )
    if form == "tokenizer.json":
        path = as_json_only(path, tmp_path / "json")
    ids = {"generation_config.json": [END], "a list": [2, END], "config.json": END}
    if where == "special_tokens_map.json":
        (path / where).write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}))
    elif where != "tokenizer_config.json":
        (path / where.replace("a list", "generation_config.json")).write_text(json.dumps({"eos_token_id": ids[where]}))
    tokenizer = load_tokenizer(path)
    assert END in tokenizer.eos_ids
    assert tokenizer.token_bytes(END) == b""


@pytest.mark.parametrize(
    ("name", "kind"), [("<|eot_id|>", CONTROL), ("<|im_end|>", USER_DEFINED), ("<|eom_id|>", CONTROL)]
)
def test_names_that_end_a_turn_end_it_in_any_gguf(name: str, kind: int, tmp_path: Path) -> None:
    """As in llama.cpp; the first files of Llama 3 name <|end_of_text|> only."""
    tokenizer = load_tokenizer(write_gguf(tmp_path / "spm.gguf", [(name, kind), ("<tool>", USER_DEFINED)]))
    assert tokenizer.eos_ids == {2, SIZE}
    assert SIZE not in tokenizer.encode(f"a{name}b", add_bos=False)
    assert SIZE + 1 in tokenizer.encode("a<tool>b", add_bos=False)
    assert tokenizer.token_bytes(SIZE) == b""
    tokens = ["<s>", "<|end_of_text|>", name, *map(chr, range(0x21, 0x7F)), "ab"]
    write_vocabulary(
        tmp_path / "bpe.gguf",
        tokens=tokens,
        token_type=[3, 3, kind, *[1] * 95],
        merges=["a b"],
        eot_token_id=None,
        pre="llama3",
    )
    assert load_tokenizer(tmp_path / "bpe.gguf").eos_ids == {1, 2}


def test_a_name_of_an_end_that_has_another_job_or_is_text_ends_nothing(tmp_path: Path) -> None:
    tokens = [("<|endoftext|>", CONTROL), ("<|end|>", 1)]
    tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", tokens, unknown_token_id=SIZE))
    assert tokenizer.eos_ids == {2}


def test_what_the_template_puts_behind_an_answer_ends_it(tmp_path: Path) -> None:
    path = directory(tmp_path, chat_template=CHATML, added_tokens_decoder=ADDED)
    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, tokenizer)
    assert template is not None
    assert (tokenizer.eos_ids, template.stop_ids) == ({2}, {END})
    plain = load_chat_template(directory(tmp_path, chat_template="{{ messages[0].content }}"), tokenizer)
    assert plain is not None
    assert plain.stop_ids == frozenset()


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["llama3", "llama-v3", "llama-bpe", "smaug-bpe", "qwen2", "phi-2", "starcoder"])
def test_pre_tokenizers_that_llama_cpp_treats_alike_are_taken(pre: str, tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "model.gguf", pre=pre, add_bos_token=None)
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert tokenizer.decode(tokenizer.encode("ab 12", add_bos=False)) == "ab 12"
    assert tokenizer.bos_id == (0 if pre.startswith("llama") else None)  # llama.cpp's default for these


def test_a_gguf_that_does_not_say_how_text_is_cut_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "model.gguf", pre="default")
    with pytest.raises(CheckpointError, match=r"pre = default is not supported, .*: convert the model again"):
        load_tokenizer(tmp_path / "model.gguf")

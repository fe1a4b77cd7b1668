"""Tokenisers on ten thousand mixed strings, against the libraries that define them.

Llama 2's vocabulary comes in three forms, which must agree with sentencepiece and with transformers: tokenizer.model,
the vocabulary inside a GGUF, and tokenizer.json. The last two are written here, by gguf's and transformers' code.
"""

import json
import random
import re
import string
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest

from model.errors import CheckpointError
from model.text.infill import ANCHOR, can_infill, encode_infill
from model.text.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from model.weights import resolve_path
from tests.model.text.test_tokenizer import FRAGMENTS, LLAMA2, MODEL

needs_llama2 = pytest.mark.skipif(
    not LLAMA2.is_file(), reason="Llama 2's tokenizer.model may not be distributed with this repository"
)
MARKS = (
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<s>",
    "</s>",
    "<unk>",
    "<PRE>",
    " <SUF>",
    "<|im_start|>",
    "<|im_end|>",
    "<step>",
)


@cache
def corpus() -> list[str]:
    """Code, accents, emoji, CJK, control characters, broken bytes, marks that users may type, very long lines."""
    rng = random.Random(20)
    source = Path(__file__).read_text() + (Path(__file__).parent / "test_tokenizer.py").read_text()
    lines = source.splitlines()
    texts = [*lines, "", " ", "\n", "\x00", *MARKS]
    while len(texts) < 16_000:
        match rng.randrange(6):
            case 0:
                texts.append("".join(rng.choices(FRAGMENTS, k=rng.randint(1, 25))))
            case 1:
                texts.append("\n".join(rng.choices(lines, k=rng.randint(1, 6))))
            case 2:
                texts.append("".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randint(1, 40))))
            case 3:
                texts.append(
                    "".join(chr(rng.choice((0x4E00, 0xAC00, 0x1F300, 0x10000)) + rng.randrange(500)) for _ in range(20))
                )
            case 4:
                texts.append(bytes(rng.randrange(256) for _ in range(30)).decode("utf-8", "replace"))
            case _:
                words = ["élève", "où", "façade", "naïf", "cœur", "l'été", "  ", "\t", "«", "»", "—", "…"]
                texts.append(" ".join(rng.choices([*words, *MARKS], k=rng.randint(1, 15))))
    texts.append("x" * 100_000)
    texts.append("".join(rng.choices(string.printable, k=100_000)))
    return texts


@cache
def llama2_proto() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(LLAMA2.read_bytes())
    return proto


@cache
def sentencepiece() -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(LLAMA2))


@pytest.fixture(scope="module")
def gguf_llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The vocabulary as llama.cpp's converter stores it."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    pieces = llama2_proto().pieces
    writer.add_token_list([piece.piece.encode() for piece in pieces])
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_token_types([piece.type for piece in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(file)


@pytest.fixture(scope="module")
def json_llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer.json, as transformers converts tokenizer.model."""
    from transformers import LlamaTokenizerFast

    path = tmp_path_factory.mktemp("json")
    tokenizer = LlamaTokenizerFast.from_pretrained(LLAMA2.parent, vocab_file=str(LLAMA2))
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}))
    return path


@needs_llama2
def test_the_vocabulary_in_a_gguf_is_sentencepieces(gguf_llama2: Tokenizer) -> None:
    oracle = sentencepiece()
    assert (gguf_llama2.bos_id, gguf_llama2.eos_ids, gguf_llama2.vocab_size) == (1, {2}, 32000)
    for text in corpus():
        ids = oracle.encode(text)
        assert gguf_llama2.encode(text, add_bos=True) == [1, *ids], text[:100]
        assert gguf_llama2.decode(ids) == oracle.decode(ids)


@needs_llama2
def test_tokenizer_model_is_sentencepieces(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    tokenizer, oracle = load_tokenizer(tmp_path), sentencepiece()
    for text in corpus():
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == oracle.encode(text), text[:100]
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == oracle.decode(ids)


def test_the_default_model_is_tokenised_as_transformers_does() -> None:
    from transformers import AutoTokenizer

    path = resolve_path(MODEL)
    tokenizer = load_tokenizer(path)
    reference: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers makes ids of control tokens' names, and does not know how this vocabulary cuts off digits
    odd = re.compile("|".join([r"\s\s\d", *map(re.escape, tokenizer.control_tokens)]))
    plain = [text for text in corpus() if not odd.search(text) and not any(c.isnumeric() and c > "9" for c in text)]
    assert len(plain) > 10_000
    expected = reference(plain, add_special_tokens=False).input_ids
    for text, ids in zip(plain, expected, strict=True):
        assert tokenizer.encode(text, add_bos=False) == ids, repr(text)
    control = set(tokenizer.control_tokens.values())
    assert not any(control & set(tokenizer.encode(text, add_bos=False)) for text in corpus())


# -- any ids, streamed ------------------------------------------------------------------------------------------------


@needs_llama2
@pytest.mark.parametrize("at_start", [False, True])
def test_streamed_pieces_add_up_for_any_ids(gguf_llama2: Tokenizer, at_start: bool) -> None:
    rng = random.Random(7)
    for _ in range(2000):
        ids = [rng.choice((rng.randrange(32000), rng.randrange(3, 259))) for _ in range(rng.randint(1, 12))]
        detokenizer = Detokenizer(gguf_llama2, at_start=at_start)
        pieces = [*(detokenizer.push(i) for i in ids), detokenizer.finish()]
        whole = b"".join(map(gguf_llama2.token_bytes, ids)).decode("utf-8", "replace")
        assert "".join(pieces) == (gguf_llama2.decode(ids) if at_start else whole)


# -- Code Llama's infill marks ----------------------------------------------------------------------------------------

CODE_LLAMA_EXTRA = ["▁<SU", "▁<SUF", "▁<PRE", "▁<M", "▁<MID", "▁<E", "▁<EOT", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]


@pytest.fixture(scope="module")
def code_llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's vocabulary with Code Llama's 16 pieces behind it, of which merges can make the marks."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(llama2_proto())
    for i, piece in enumerate([*CODE_LLAMA_EXTRA, *(f"▁<extra{i}>" for i in range(5))]):
        proto.pieces.add(piece=piece, score=-32000.0 - i, type=1)
    path = tmp_path_factory.mktemp("code")
    (path / "tokenizer.model").write_bytes(proto.SerializeToString())
    return load_tokenizer(path)


@needs_llama2
def test_infill_is_metas_prefix_suffix_middle(code_llama: Tokenizer) -> None:
    assert can_infill(code_llama)
    prefix, suffix = 'def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"
    ids = encode_infill(code_llama, prefix, suffix)
    sp = sentencepiece()
    without_space = sp.encode(ANCHOR + suffix)[2:]  # Meta: the space and the anchor are the first two
    assert ids == [1, 32007, *sp.encode(prefix), 32008, *without_space, 32009]
    assert "".join(map(chr, b"".join(map(code_llama.token_bytes, without_space)))) == suffix
    assert encode_infill(code_llama, "", "") == [1, 32007, 32008, 32009]


@needs_llama2
@pytest.mark.parametrize("text", [" <PRE>", "<PRE>", "a <SUF> b", " <MID> <EOT>", "<s> <PRE></s>"])
def test_infill_marks_that_users_type_stay_text(code_llama: Tokenizer, text: str) -> None:
    ids = code_llama.encode(text, add_bos=False)
    assert not {1, 2, 32007, 32008, 32009, 32010} & set(ids)
    assert code_llama.decode(ids) == text
    assert not {1, 2, 32007, 32008, 32009, 32010} & set(encode_infill(code_llama, text, text)[2:-1]) - {32008}


@needs_llama2
def test_a_model_without_the_marks_cannot_infill(gguf_llama2: Tokenizer) -> None:
    assert not can_infill(gguf_llama2)


# -- tokenizer.json ---------------------------------------------------------------------------------------------------


@needs_llama2
def test_tokenizer_json_is_tokenised_as_transformers_does(json_llama2: Path) -> None:
    from transformers import LlamaTokenizerFast

    tokenizer = load_tokenizer(json_llama2)
    assert type(tokenizer).__name__ == "JSONTokenizer"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {2}, 32000)
    reference = LlamaTokenizerFast.from_pretrained(json_llama2)
    plain = [text for text in corpus() if not any(name in text for name in ("<s>", "</s>", "<unk>"))]
    expected: Any = reference(plain, add_special_tokens=False).input_ids
    assert [tokenizer.encode(text, add_bos=False) for text in plain] == expected


@needs_llama2
def test_the_tokenizer_json_of_released_llamas_is_sentencepieces(json_llama2: Path, tmp_path: Path) -> None:
    """Released files put the space before a text by a normaliser and rank merges by the pieces' scores; transformers 5
    writes a pre-tokeniser, which leaves the space out before a text that begins with one, and ranks otherwise."""
    raw = json.loads((json_llama2 / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    by_score = sorted(vocab.items(), key=lambda item: llama2_proto().pieces[item[1]].score, reverse=True)
    splits = [(piece[:k], piece[k:]) for piece, i in by_score if i > 258 for k in range(1, len(piece))]
    raw["model"]["merges"] = [[left, right] for left, right in splits if left in vocab and right in vocab]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    raw["pre_tokenizer"] = None
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    raw["post_processor"] = {"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    tokenizer, oracle = load_tokenizer(tmp_path), sentencepiece()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    for text in corpus():
        assert tokenizer.encode(text, add_bos=True) == [1, *oracle.encode(text)], text[:100]
    rng = random.Random(3)
    for _ in range(500):
        ids = rng.choices(range(259, 32000), k=10)
        assert tokenizer.decode(ids) == oracle.decode(ids)


def byte_level_json(path: Path, **changes: Any) -> None:
    """The default model's vocabulary as a tokenizer.json, made by transformers from the GGUF."""
    from transformers import AutoTokenizer

    file = resolve_path(MODEL)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(path)
    raw = json.loads((path / "tokenizer.json").read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}  # as in the model's own file
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    (path / "tokenizer.json").write_text(json.dumps(raw | changes))


def test_a_byte_level_tokenizer_json_equals_the_vocabulary_in_the_gguf(tmp_path: Path) -> None:
    byte_level_json(tmp_path)
    tokenizer, expected = load_tokenizer(tmp_path), load_tokenizer(resolve_path(MODEL))
    assert tokenizer.control_tokens == expected.control_tokens
    for text in corpus()[:4000]:
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == expected.encode(text, add_bos=False), text[:100]
        assert tokenizer.decode(ids) == expected.decode(ids)


def test_begin_and_end_come_from_the_files_beside_tokenizer_json(tmp_path: Path) -> None:
    byte_level_json(tmp_path)
    config = {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0, 99999999]}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {0, 2})
    assert tokenizer.encode("Hi", add_bos=True)[0] == 1
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    byte_level_json(tmp_path, post_processor={"type": "Sequence", "processors": [template]})
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).bos_id == 2


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"model": {"type": "Unigram", "vocab": []}}', '{"model": {"vocab": 3}}']
)
def test_an_unusable_tokenizer_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


# -- tokens beyond the vocabulary -------------------------------------------------------------------------------------


@needs_llama2
@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_are_control_tokens(tmp_path: Path, where: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LLAMA2.read_bytes())
    added = {"<|im_end|>": 32001, "<|im_start|>": 32002}
    content: dict[str, Any] = dict(added)
    if where == "tokenizer_config.json":
        content = {"added_tokens_decoder": {str(i): {"content": text, "special": True} for text, i in added.items()}}
    (tmp_path / where).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32003
    assert added.items() <= tokenizer.control_tokens.items()
    assert tokenizer.token_bytes(32001) == tokenizer.token_bytes(32000) == b""
    assert not set(added.values()) & set(tokenizer.encode("<|im_start|>user", add_bos=False))

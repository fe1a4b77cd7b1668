"""Byte-pair vocabularies, by the tokenizers library: from inside a GGUF file, or from tokenizer.json.

Control tokens are taken out of what the library gets, so that no merge and no text can produce one.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from model.errors import CheckpointError
from model.text.tokenizer import check_id, clean, encode_parts
from model.text.tokenizer.added import AddedToken, AddedTokens, with_added
from model.text.tokenizer.companions import (
    LLAMA_CLASSES,
    Companions,
    SpaceRule,
    added_token,
    check_ids,
    read_companions,
)
from model.text.tokenizer.gguf import gguf_added, gguf_ends
from model.weights.hf import read_json

# One text at a time needs no threads of the library's own: handing it over to them costs more than a short one takes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # text to bytes, and no cut
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _cut(numbers: str) -> pre_tokenizers.PreTokenizer:
    """Llama 3's expression, and those that differ from it in how many digits are one word."""
    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTES])


# How text is cut before merging, by the names that GGUF files carry: those that llama.cpp treats alike share a line
# (src/llama-vocab.cpp).
SAME_CUT: tuple[tuple[tuple[str, ...], pre_tokenizers.PreTokenizer], ...] = (
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        pre_tokenizers.Sequence([DIGITS, GPT2]),
    ),
    (("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat"), GPT2),
    (("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _cut(r"\p{N}{1,3}")),
    (("smaug-bpe", "dbrx"), _cut(r"\p{N}{1,3}")),
    (("qwen2", "stablelm2", "hunyuan", "megrez", "deepseek-r1-qwen", "solar-open"), _cut(r"\p{N}")),
)
PRE_TOKENIZERS = {name: cut for names, cut in SAME_CUT for name in names}
# A word that is a token is one, whatever merges say; and a text begins with bos.
WHOLE_WORDS = frozenset(SAME_CUT[2][0])
MAX_GROWTH = 64  # of a text by normalising


class BPETokenizer:
    """What both have in common: the library's tokenizer, and the bytes of each token. See `MarkedTokenizer`."""

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    control_tokens: Mapping[str, int]
    added_tokens: AddedTokens
    adds_space = False
    _bpe: tokenizers.Tokenizer
    _later: tokenizers.Tokenizer  # of text that follows a token
    _bytes: list[bytes]

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids = encode_parts(self.encode_chunk, self.added_tokens.split(clean(text), special=False))
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_chunk(self, text: str, at_start: bool) -> list[int]:
        # The library's `encode` holds the interpreter: seconds, for a long text, in which no stream moves.
        bpe = self._bpe if at_start else self._later
        with library_errors("this model's tokenizer cannot cut this text"):
            ids: list[int] = bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        text = b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space else text


class GGUFTokenizer(BPETokenizer):
    """Byte-level BPE from the vocabulary inside a GGUF file."""

    def __init__(self, path: Path) -> None:
        from model.weights.gguf import field, required_field

        pre = field(path, "tokenizer.ggml.pre")
        if pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.pre = {pre} is not supported, only {', '.join(PRE_TOKENIZERS)}: convert the "
                "model again, for the file does not say how its text is to be cut"
            )
        tokens: list[str] = required_field(path, "tokenizer.ggml.tokens")
        types: list[int] = required_field(path, "tokenizer.ggml.token_type")
        merges: list[str] = required_field(path, "tokenizer.ggml.merges")
        if len(types) != len(tokens):
            raise CheckpointError(f"{path}: {len(tokens)} tokens have {len(types)} types: the file is damaged")
        bos, _, self.eos_ids = gguf_ends(path, tokens, types)
        self.bos_id: int | None = bos if field(path, "tokenizer.ggml.add_bos_token", pre in WHOLE_WORDS) else None
        added = gguf_added(tokens, types, self.eos_ids)
        self.vocab_size = len(tokens)
        self.added_tokens = AddedTokens(added)
        self.control_tokens = self.added_tokens.control
        # Without the control tokens in its vocabulary, no merge and no text can produce one.
        vocab = {t: i for i, t in enumerate(tokens) if t not in self.control_tokens}
        pairs = without(self.control_tokens.keys(), map(_pair, merges))
        with library_errors(f"{path}: the vocabulary is damaged"):
            bpe = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in WHOLE_WORDS)
        self._bpe = self._later = tokenizers.Tokenizer(bpe)
        self._bpe.pre_tokenizer = PRE_TOKENIZERS[pre]
        alphabet = _byte_alphabet()
        self._bytes = [_bytes_of(t, alphabet) for t in tokens]
        for i, token in added.items():
            self._bytes[i] = b"" if token.special else token.text.encode("utf-8")


class JSONTokenizer(BPETokenizer):
    """tokenizer.json: byte-level BPE, or sentencepiece's BPE with bytes for what it does not know.

    As transformers reads it: a class that is a Llama's takes vocabulary and merges from the file, and how spaces are
    put from `legacy` and `add_prefix_space`; every other one takes the file as it is.
    """

    def __init__(self, path: Path) -> None:
        raw, companions = read_json(path), read_companions(path.parent)
        with library_errors(f"{path} is damaged, or not a tokenizer"):
            start = _template_start(raw.get("post_processor"))
            self._build(raw, path, companions)
        by_name = self.control_tokens
        begin = start or (companions.special_tokens.get("bos_token") if companions.add_bos else None)
        self.bos_id = by_name.get(begin or "")
        ends = {by_name[name] for name in companions.end_names if name in by_name}
        self.eos_ids = frozenset(ends | {i for i in companions.end_ids if i < self.vocab_size})

    def _build(self, raw: dict[str, Any], path: Path, companions: Companions) -> None:
        model = raw["model"]
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{path}: a tokenizer of type {model['type']} is not supported, only BPE is")
        byte_level = "ByteLevel" in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
        if companions.tokenizer_class in LLAMA_CLASSES and not byte_level:
            raw |= {"normalizer": None, "pre_tokenizer": _metaspace(companions.space)}
            model |= {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
        model["dropout"] = None  # of merges, by chance: for training
        _check_growth(raw.get("normalizer"), path)
        self.adds_space = '"Prepend"' in json.dumps(raw.get("normalizer")) or _metaspace_prepends(raw)
        entries = {entry["id"]: entry for entry in raw.get("added_tokens") or []}
        own = check_ids(path, {i: added_token(entry) for i, entry in entries.items()})
        named = [token.text for token in companions.named]
        ids = model["vocab"]
        tokens = with_added(own, ids, companions.added, named, companions.embeddings)
        texts = {i: text for text, i in ids.items()} | {i: token.text for i, token in tokens.items()}
        check_ids(path, {i: AddedToken(text, special=False) for i, text in texts.items()})
        self.vocab_size = max(texts) + 1
        self._bytes = [b""] * self.vocab_size
        spell = (
            partial(_bytes_of, alphabet=_byte_alphabet())
            if byte_level
            else partial(_spm_bytes, byte_fallback=bool(model.get("byte_fallback")))
        )
        for i, text in texts.items():
            self._bytes[i] = spell(text)
        for i, token in tokens.items():
            self._bytes[i] = b"" if token.special else token.text.encode("utf-8")
        # The library finds those itself that it looks for in what its normaliser makes of the text.
        by_library = {i for i, t in tokens.items() if not t.special and _looked_for_later(raw, entries.get(i))}
        self.added_tokens = AddedTokens({i: token for i, token in tokens.items() if i not in by_library})
        self.control_tokens = self.added_tokens.control
        hidden = self.control_tokens.keys() - {model.get("unk_token")}  # the library wants to know its unknown token
        there = ids.keys() | {tokens[i].text for i in by_library}  # others are found by us, and made by no merge
        model["vocab"] = {text: i for i, text in texts.items() if text in there and text not in hidden}
        model["merges"] = without(
            hidden, (tuple(m.split(" ", 1)) if isinstance(m, str) else m for m in model["merges"])
        )
        raw |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
        raw["added_tokens"] = [entries[i] for i in by_library]
        text = json.dumps(raw)
        self._bpe = self._later = tokenizers.Tokenizer.from_str(text)
        later = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        if later != text:
            self._later = tokenizers.Tokenizer.from_str(later)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever the library raises becomes a `CheckpointError`: exceptions of no special kind, and panics of its Rust
    code, which are no `Exception`."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{what}: {error}") from error
        raise


def without(names: Set[str], merges: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """The merges that neither need nor make one of these tokens."""
    return [(left, right) for left, right in merges if not {left, right, left + right} & names]


def _check_growth(normalizer: Any, path: Path) -> None:
    """Raise `CheckpointError` for a normaliser that may make a text much longer than it is."""
    steps, growth = [normalizer], 1
    while steps:
        step = steps.pop()
        if not isinstance(step, dict):
            continue
        steps += step["normalizers"] if step.get("type") == "Sequence" else []
        more = step.get("content") or step.get("prepend") or ""
        pattern = step.get("pattern") or {}
        replaced = len(pattern.get("String", "")) if isinstance(pattern, dict) else 0
        growth *= 1 + len(more) if len(more) > replaced else 1
        if growth > MAX_GROWTH:
            raise CheckpointError(f"{path}: its normaliser may make a text more than {MAX_GROWTH} times as long")


def _metaspace(space: SpaceRule) -> dict[str, Any]:
    scheme = "always" if space == "each" else space
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def _looked_for_later(raw: Mapping[str, Any], entry: Mapping[str, Any] | None) -> bool:
    return raw.get("normalizer") is not None and entry is not None and bool(entry.get("normalized", True))


def _template_start(processor: Any) -> str | None:
    """The special token that the post-processor puts before a text, or None."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        return next((start for p in processor["processors"] if (start := _template_start(p))), None)
    first = (processor.get("single") or [{}])[0] if processor.get("type") == "TemplateProcessing" else {}
    token: str | None = first.get("SpecialToken", {}).get("id")
    return token


def _metaspace_prepends(raw: dict[str, Any]) -> bool:
    pre = raw.get("pre_tokenizer") or {}
    return bool(pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never")


def _spm_bytes(token: str, byte_fallback: bool) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _bytes_of(token: str, alphabet: dict[str, int]) -> bytes:
    if any(c not in alphabet for c in token):
        return token.encode("utf-8")
    return bytes(alphabet[c] for c in token)

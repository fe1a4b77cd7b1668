"""Byte-pair vocabularies, by the tokenizers library: from inside a GGUF file, or from tokenizer.json.

Control tokens are taken out of what the library gets, so that no merge and no text can produce one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from model.errors import CheckpointError
from model.text.tokenizer import check_id, clean
from model.text.tokenizer.companions import read_companions
from model.weights.hf import read_json

# How text is cut before merging, by the name that GGUF files carry.
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
CONTROL, USER_DEFINED = 3, 4  # token types in GGUF files


class BPETokenizer:
    """What both have in common: the library's tokenizer, and the bytes of each token."""

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    control_tokens: Mapping[str, int]
    adds_space = False
    _bpe: tokenizers.Tokenizer
    _bytes: list[bytes]

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids: list[int] = self._bpe.encode(clean(text), add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

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
                f"{path}: tokenizer.ggml.pre = {pre} is not supported, only {', '.join(PRE_TOKENIZERS)}"
            )
        tokens: list[str] = required_field(path, "tokenizer.ggml.tokens")
        types: list[int] = required_field(path, "tokenizer.ggml.token_type")
        merges: list[str] = required_field(path, "tokenizer.ggml.merges")
        if len(types) != len(tokens):
            raise CheckpointError(f"{path}: {len(tokens)} tokens have {len(types)} types: the file is damaged")
        self.vocab_size = len(tokens)
        self.control_tokens: Mapping[str, int] = {t: i for i, t in enumerate(tokens) if types[i] == CONTROL}
        bos, eos = field(path, "tokenizer.ggml.bos_token_id"), field(path, "tokenizer.ggml.eos_token_id")
        self.bos_id: int | None = bos if field(path, "tokenizer.ggml.add_bos_token", False) else None
        ends = [field(path, f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
        self.eos_ids = frozenset(i for i in (eos, *ends) if i is not None)
        # Without the control tokens in its vocabulary, no merge and no text can produce one.
        vocab = {t: i for i, t in enumerate(tokens) if types[i] != CONTROL}
        try:
            bpe = models.BPE(vocab=vocab, merges=[_pair(m) for m in merges], ignore_merges=pre == "llama-bpe")
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{path}: the vocabulary is damaged: {error}") from error
        self._bpe = tokenizers.Tokenizer(bpe)
        self._bpe.pre_tokenizer = PRE_TOKENIZERS[pre]
        user_defined = [t for i, t in enumerate(tokens) if types[i] == USER_DEFINED]  # found in text before any merge
        self._bpe.add_tokens([AddedToken(t, normalized=False) for t in user_defined])
        alphabet = _byte_alphabet()
        self._bytes = [b"" if types[i] == CONTROL else _bytes_of(t, types[i], alphabet) for i, t in enumerate(tokens)]


class JSONTokenizer(BPETokenizer):
    """tokenizer.json: byte-level BPE, or sentencepiece's BPE with bytes for what it does not know."""

    def __init__(self, path: Path) -> None:
        raw, companions = read_json(path), read_companions(path.parent)
        start = _template_start(raw.get("post_processor"))
        try:
            self._build(raw, path)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{path} is damaged, or not a tokenizer: {error}") from error
        by_name = self.control_tokens
        adds_bos = companions.add_bos if companions.add_bos is not None else start is not None
        self.bos_id = by_name.get(companions.bos_token or start or "") if adds_bos else None
        eos = by_name.get(companions.eos_token or "")
        named = {eos} if eos is not None else set()
        self.eos_ids = frozenset(named | {i for i in companions.eos_ids if i < self.vocab_size})

    def _build(self, raw: dict[str, Any], path: Path) -> None:
        model = raw["model"]
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{path}: a tokenizer of type {model['type']} is not supported, only BPE is")
        byte_level = "ByteLevel" in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
        self.adds_space = '"Prepend"' in json.dumps(raw.get("normalizer")) or _metaspace_prepends(raw)
        added = {token["id"]: token for token in raw.get("added_tokens") or []}
        texts = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
        control = {token["content"]: i for i, token in added.items() if token.get("special")}
        self.control_tokens = control
        self.vocab_size = max(texts) + 1
        alphabet = _byte_alphabet()
        self._bytes = [b""] * self.vocab_size
        for i, text in texts.items():
            if i in added:
                self._bytes[i] = b"" if text in control else text.encode("utf-8")
            elif byte_level:
                self._bytes[i] = _bytes_of(text, 0, alphabet)
            else:
                self._bytes[i] = _spm_bytes(text, bool(model.get("byte_fallback")))
        hidden = control.keys() - {model.get("unk_token")}  # the library wants to know its unknown token
        model["vocab"] = {text: i for i, text in texts.items() if text not in hidden}
        merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [m for m in merges if not {m[0], m[1], m[0] + m[1]} & control.keys()]
        raw |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
        raw["added_tokens"] = [token for token in added.values() if not token.get("special")]
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(raw))


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


def _bytes_of(token: str, kind: int, alphabet: dict[str, int]) -> bytes:
    if kind == USER_DEFINED or any(c not in alphabet for c in token):
        return token.encode("utf-8")
    return bytes(alphabet[c] for c in token)

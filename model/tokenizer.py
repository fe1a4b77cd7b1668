"""Text to token ids and back. No torch, no model: the gateway uses this alone.

Control tokens (begin, end, role marks) are ids and never text: no text that a user can type becomes one.
"""

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from model.weights import CheckpointError, is_gguf


class Tokenizer(Protocol):
    """A vocabulary."""

    vocab_size: int
    bos_id: int | None  # put before every prompt; None if the model was trained without
    eos_ids: frozenset[int]
    control_tokens: Mapping[str, int]  # name -> id

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Ids of plain text; a control token's name in it is ordinary text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the output in UTF-8, perhaps a part of a character; b"" for control tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text; bytes that are no UTF-8 become U+FFFD."""
        ...


class Detokenizer:
    """Ids to text, one at a time, never half a character. The pieces add up to the decoded bytes of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the checkpoint at `path`. Raises `CheckpointError` if there is none we can read."""
    if is_gguf(path):
        return GGUFTokenizer(path)
    if (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    found = "only tokenizer.json, which is not supported yet" if (path / "tokenizer.json").is_file() else "no tokenizer"
    raise CheckpointError(f"{path} has {found}: put the model's tokenizer.model (sentencepiece) there")


# -- byte-level BPE ----------------------------------------------------------------------------------------------------

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


class GGUFTokenizer:
    """Byte-level BPE from the vocabulary inside a GGUF file."""

    def __init__(self, path: Path) -> None:
        from model.weights.gguf import field, required_field

        kind, pre = required_field(path, "tokenizer.ggml.model"), field(path, "tokenizer.ggml.pre")
        if kind != "gpt2":
            raise CheckpointError(f"{path}: tokenizer.ggml.model = {kind} is not supported yet, only gpt2 is")
        if pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.pre = {pre} is not supported yet, only {', '.join(PRE_TOKENIZERS)}"
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

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids = self._bpe.encode(clean(text), add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


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


# -- sentencepiece -----------------------------------------------------------------------------------------------------


class SentencePieceTokenizer:
    """Llama's own tokenizer.model, by the sentencepiece library."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a sentencepiece model: {error}") from error
        sp = self._sp
        self.vocab_size = sp.vocab_size()
        self.bos_id: int | None = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = frozenset({sp.eos_id()} if sp.eos_id() >= 0 else set())
        self.control_tokens: Mapping[str, int] = {
            sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i)
        }
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]

    def _piece_bytes(self, token_id: int) -> bytes:
        sp = self._sp
        if sp.is_control(token_id) or sp.is_unknown(token_id):
            return b""
        piece = sp.id_to_piece(token_id)
        if sp.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # <0xE2>
        return str(piece).replace("\u2581", " ").encode("utf-8")

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids: list[int] = self._sp.encode(clean(text))
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The first piece's leading space is the one that encoding put there, so it is taken off."""
        text = b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ")


def clean(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_id(token_id: int, vocab_size: int) -> None:
    """Raise `ValueError` for an id outside the vocabulary."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is not in the vocabulary of {vocab_size}")

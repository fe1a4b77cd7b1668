"""Text to token ids and back. No torch, no model: the gateway uses this alone.

Control tokens (begin, end, role marks) are ids and never text: no text that a user can type becomes one.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from model.errors import CheckpointError
from model.text.tokenizer.added import AddedToken, AddedTokens
from model.weights import SHAPE, find_gguf_vocabulary, shape_config


class Tokenizer(Protocol):
    """A vocabulary."""

    vocab_size: int
    bos_id: int | None  # put before every prompt; None if the model was trained without
    eos_ids: frozenset[int]
    control_tokens: Mapping[str, int]  # name -> id
    adds_space: bool  # encoding puts a space before the text, which decoding takes off again

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Ids of plain text; a control token's name in it is ordinary text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the output in UTF-8, perhaps a part of a character; b"" for control tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text; bytes that are no UTF-8 become U+FFFD."""
        ...


@runtime_checkable
class MarkedTokenizer(Tokenizer, Protocol):
    """A vocabulary that has more than plain text and control tokens."""

    added_tokens: AddedTokens

    def encode_chunk(self, text: str, at_start: bool) -> list[int]:
        """Ids of what stands between added tokens, none of which is looked for in it. `at_start`: of the prompt."""
        ...


class Detokenizer:
    """Ids to text, one at a time, never half a character. The pieces add up to the decoded bytes of all ids.

    With `at_start` the text begins with these ids and the pieces add up to `Tokenizer.decode`; otherwise it goes on
    after a prompt, and a space that the first token brings belongs to it.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = at_start and tokenizer.adds_space

    def push(self, token_id: int) -> str:
        return self._without_first_space(self._decoder.decode(padded_bytes(self._tokenizer, token_id)))

    def finish(self) -> str:
        return self._without_first_space(self._decoder.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def padded_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """`token_bytes`, or nothing for an id beyond the vocabulary: some embeddings are padded to a round size."""
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool = True) -> list[int]:
    """Ids of a whole prompt as its writer means it: names of control tokens in it are those tokens.

    Begin-of-text is put before it with `add_bos`, unless it is there. Only for prompts that no user's text could have
    slipped into unseen by the writer; elsewhere a name in a text is text.
    """
    ids, bos = encode_marked(tokenizer, clean(text)), tokenizer.bos_id
    return ids if bos is None or not add_bos or ids[:1] == [bos] else [bos, *ids]


def encode_marked(tokenizer: Tokenizer, text: str, mark: str = "") -> list[int]:
    """Ids of a text in which names of added tokens are those tokens, but where `mark` stands inside a name; it is taken
    out again."""
    parts: Iterable[str | int] = added_tokens(tokenizer).split(text, special=True, mark=mark)
    if mark:
        parts = (part.replace(mark, "") if isinstance(part, str) else part for part in parts)
    if isinstance(tokenizer, MarkedTokenizer):
        return encode_parts(tokenizer.encode_chunk, parts)
    return encode_parts(lambda text, at_start: tokenizer.encode(text, add_bos=False), parts)


class EncodeChunk(Protocol):
    """`MarkedTokenizer.encode_chunk`."""

    def __call__(self, text: str, at_start: bool) -> list[int]: ...


def encode_parts(encode_chunk: EncodeChunk, parts: Iterable[str | int]) -> list[int]:
    """Ids of texts, and ids that stand between them."""
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
        elif part:
            ids += encode_chunk(part, at_start=i == 0)
    return ids


def added_tokens(tokenizer: Tokenizer) -> AddedTokens:
    """All that is found in a prompt as a whole. A name of one character could not be told apart from text."""
    if isinstance(tokenizer, MarkedTokenizer):
        return tokenizer.added_tokens
    named = {i: AddedToken(name, special=True) for name, i in tokenizer.control_tokens.items() if len(name) > 1}
    return AddedTokens(named)


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest one, names of control tokens included: no token takes more of a text than that."""
    return max(
        *(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)),
        *(len(name.encode()) for name in tokenizer.control_tokens),
        1,
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the checkpoint at `path`. Raises `CheckpointError` if there is none we can read."""
    if str(path).startswith(SHAPE):
        from model.text.tokenizer.dummy import DummyTokenizer

        return DummyTokenizer(shape_config(path).vocab_size)
    gguf_file = find_gguf_vocabulary(path)
    if gguf_file is not None:
        return _from_gguf(gguf_file)
    if (path / "tokenizer.model").is_file():
        from model.text.tokenizer.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(path / "tokenizer.model")
    if (path / "tokenizer.json").is_file():
        from model.text.tokenizer.bpe import JSONTokenizer

        return JSONTokenizer(path / "tokenizer.json")
    raise CheckpointError(f"{path} has no tokenizer: put the model's tokenizer.model or tokenizer.json there")


def _from_gguf(path: Path) -> Tokenizer:
    from model.weights.gguf import required_field

    kind = required_field(path, "tokenizer.ggml.model")
    if kind == "llama":
        from model.text.tokenizer.spm import GGUFSentencePieceTokenizer

        return GGUFSentencePieceTokenizer(path)
    if kind == "gpt2":
        from model.text.tokenizer.bpe import GGUFTokenizer

        return GGUFTokenizer(path)
    raise CheckpointError(f"{path}: tokenizer.ggml.model = {kind} is not supported, only llama and gpt2 are")


def check_fits(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    """Raise `CheckpointError` if text may become ids that the model at `path` has no embedding for.

    Control tokens beyond it do no harm: <pad>, say, which some checkpoints bring and no prompt holds.
    """
    beyond = set(range(vocab_size, tokenizer.vocab_size)) - set(tokenizer.control_tokens.values())
    if beyond:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {vocab_size}: they belong "
            "to different models; put the right tokenizer files beside the weights"
        )


def clean(text: str) -> str:
    """Lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_id(token_id: int, vocab_size: int) -> None:
    """Raise `ValueError` for an id outside the vocabulary."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is not in the vocabulary of {vocab_size}")

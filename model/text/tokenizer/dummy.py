"""A vocabulary for shapes without a checkpoint, so that capacity can be measured through HTTP too."""

from collections.abc import Mapping, Sequence

from model.text.tokenizer import check_id, clean

FIRST_BYTE = 3  # after <unk>, <s>, </s>, as in Llama 2


class DummyTokenizer:
    """See `Tokenizer`. Text is its bytes; ids beyond those stand for made-up words."""

    adds_space = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bos_id: int | None = 1
        self.eos_ids = frozenset({2})
        self.control_tokens: Mapping[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids = [FIRST_BYTE + byte for byte in clean(text).encode("utf-8")]
        return [1, *ids] if add_bos else ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        if token_id < FIRST_BYTE:
            return b""
        return bytes([token_id - FIRST_BYTE]) if token_id < FIRST_BYTE + 256 else b" w%d" % token_id

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

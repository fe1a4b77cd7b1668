"""Llama's own vocabulary, by the sentencepiece library: from tokenizer.model, or from inside a GGUF file.

Code Llama's infill marks are ordinary pieces in its tokenizer.model, so that text could become one; here they are made
control tokens before the library sees the vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.text.tokenizer import check_id, clean
from model.text.tokenizer.companions import AddedToken, read_companions

CONTROL = 3  # type of a piece
INFILL_MARKS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


class SentencePieceTokenizer:
    """See `Tokenizer`. What tokenizer_config.json or added_tokens.json put behind the vocabulary belongs to it."""

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    control_tokens: Mapping[str, int]
    adds_space: bool

    def __init__(self, path: Path) -> None:
        companions = read_companions(path.parent)
        proto = _parse(path.read_bytes(), path)
        size = len(proto.pieces)
        added = {i: token for i, token in companions.added.items() if i >= size}
        self._build(proto, path, added)
        if companions.add_bos is False:
            self.bos_id = None
        self.eos_ids |= {i for i in companions.eos_ids if i < self.vocab_size}

    def _build(self, proto: Any, path: Path, added: Mapping[int, AddedToken]) -> None:
        import sentencepiece

        for piece in proto.pieces:
            if piece.piece in INFILL_MARKS:
                piece.type = CONTROL
        try:
            sp = self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a sentencepiece model: {error}") from error
        self.adds_space = bool(proto.normalizer_spec.add_dummy_prefix)
        self.vocab_size = max([sp.vocab_size(), *(i + 1 for i in added)])
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = frozenset({sp.eos_id()} if sp.eos_id() >= 0 else set())
        control = {sp.id_to_piece(i): i for i in range(sp.vocab_size()) if sp.is_control(i)}
        self.control_tokens = control | {token.text: i for i, token in added.items()}
        self._bytes = [self._piece_bytes(i) for i in range(sp.vocab_size())]
        self._bytes += [b""] * (self.vocab_size - len(self._bytes))
        for i, token in added.items():
            self._bytes[i] = b"" if token.special else token.text.encode("utf-8")

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
        return text.removeprefix(" ") if self.adds_space else text


class GGUFSentencePieceTokenizer(SentencePieceTokenizer):
    """The same from the pieces, scores and types in a GGUF file."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import sentencepiece_model_pb2

        from model.weights.gguf import field, required_field

        pieces: list[str] = required_field(path, "tokenizer.ggml.tokens")
        scores: list[float] = required_field(path, "tokenizer.ggml.scores")
        types: list[int] = required_field(path, "tokenizer.ggml.token_type")
        if not len(pieces) == len(scores) == len(types):
            raise CheckpointError(
                f"{path}: {len(pieces)} tokens have {len(scores)} scores and {len(types)} types: the file is damaged"
            )
        proto: Any = sentencepiece_model_pb2.ModelProto()
        for piece, score, kind in zip(pieces, scores, types, strict=True):
            proto.pieces.add(piece=piece, score=score, type=int(kind))  # the types' numbers are sentencepiece's own
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
        proto.trainer_spec.byte_fallback = True
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.add_dummy_prefix = bool(field(path, "tokenizer.ggml.add_space_prefix", True))
        proto.normalizer_spec.remove_extra_whitespaces = False
        names = {kind: field(path, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "eot", "eom")}
        if names["bos"] is not None:
            proto.trainer_spec.bos_piece = pieces[names["bos"]]
        if names["eos"] is not None:
            proto.trainer_spec.eos_piece = pieces[names["eos"]]
        self._build(proto, path, {})
        self.bos_id = names["bos"] if field(path, "tokenizer.ggml.add_bos_token", True) else None
        self.eos_ids = frozenset(names[kind] for kind in ("eos", "eot", "eom") if names[kind] is not None)


def _parse(content: bytes, path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise CheckpointError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    return proto

"""Llama's own vocabulary, by the sentencepiece library: from tokenizer.model, or from inside a GGUF file.

Code Llama's infill marks are ordinary pieces in its tokenizer.model, so that text could become one; here they are made
control tokens before the library sees the vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.text.tokenizer import check_id, clean, encode_parts
from model.text.tokenizer.added import AddedToken, AddedTokens, with_added
from model.text.tokenizer.companions import SpaceRule, read_companions
from model.text.tokenizer.gguf import CONTROL, USER_DEFINED, gguf_added, gguf_ends

UNKNOWN, BYTE = 2, 6  # types of a piece
INFILL_MARKS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")


class SentencePieceTokenizer:
    """See `MarkedTokenizer`. What the files beside tokenizer.model put behind the vocabulary belongs to it."""

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    control_tokens: Mapping[str, int]
    added_tokens: AddedTokens
    adds_space: bool

    def __init__(self, path: Path) -> None:
        companions = read_companions(path.parent)
        proto = _parse(path.read_bytes(), path)
        named = [token.text for token in companions.named]
        self._build(proto, path, companions.added, named, companions.space, companions.embeddings)
        bos = self.control_tokens.get(companions.special_tokens.get("bos_token", ""))
        self.bos_id = None if companions.add_bos is False else self.bos_id if bos is None else bos
        ends = {self.control_tokens[name] for name in companions.end_names if name in self.control_tokens}
        self.eos_ids |= ends | {i for i in companions.end_ids if i < self.vocab_size}

    def _build(
        self,
        proto: Any,
        path: Path,
        added: Mapping[int, AddedToken],
        named: Sequence[str],
        space: SpaceRule,
        embeddings: int | None = None,
    ) -> None:
        import sentencepiece

        for piece in proto.pieces:
            if piece.piece in INFILL_MARKS:
                piece.type = CONTROL
        tokens = with_added(_special_pieces(proto), _ids(proto), added, named, embeddings)
        for i, token in tokens.items():  # found in text by us, so that the library must not
            kind = proto.pieces[i].type if i < len(proto.pieces) else BYTE
            if kind == USER_DEFINED or (token.special and kind not in (UNKNOWN, BYTE)):
                proto.pieces[i].type = CONTROL
        self._proto, self._space = proto, space
        try:
            sp = self._sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a sentencepiece model: {error}") from error
        self.adds_space = bool(proto.normalizer_spec.add_dummy_prefix) and space != "never"
        self.vocab_size = max([sp.vocab_size(), *(i + 1 for i in tokens)])
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_ids = frozenset({sp.eos_id()} if sp.eos_id() >= 0 else set())
        self.added_tokens = AddedTokens(tokens)
        self.control_tokens = {name: i for name, i in self.added_tokens.control.items() if i != sp.unk_id()}
        self._bytes = [_piece_bytes(piece) for piece in proto.pieces]
        self._bytes += [b""] * (self.vocab_size - len(self._bytes))
        for i, token in tokens.items():
            self._bytes[i] = b"" if token.special else token.text.encode("utf-8")

    @cached_property
    def _sp_without_space(self) -> Any:
        """The same vocabulary, with no space put before the text."""
        import sentencepiece

        proto: Any = type(self._proto)()
        proto.CopyFrom(self._proto)
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids = encode_parts(self.encode_chunk, self.added_tokens.split(clean(text), special=False))
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_chunk(self, text: str, at_start: bool) -> list[int]:
        space = {
            "each": True,
            "always": at_start or not text.startswith((" ", "\u2581")),
            "first": at_start,
            "never": False,
        }[self._space]
        ids: list[int] = (self._sp if space else self._sp_without_space).encode(text)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The first piece's leading space is the one that encoding put there, so it is taken off."""
        text = b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space else text


class GGUFSentencePieceTokenizer(SentencePieceTokenizer):
    """The same from the pieces, scores and types in a GGUF file, with llama.cpp's rules."""

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
        bos, eos, ends = gguf_ends(path, pieces, types)
        if bos is not None:
            proto.trainer_spec.bos_piece = pieces[bos]
        if eos is not None:
            proto.trainer_spec.eos_piece = pieces[eos]
        self._build(proto, path, gguf_added(pieces, types, ends), (), "each")
        self.bos_id = bos if field(path, "tokenizer.ggml.add_bos_token", True) else None
        self.eos_ids = ends


def _ids(proto: Any) -> dict[str, int]:
    return {piece.piece: i for i, piece in enumerate(proto.pieces)}


def _special_pieces(proto: Any) -> dict[int, AddedToken]:
    return {
        i: AddedToken(piece.piece, special=True)
        for i, piece in enumerate(proto.pieces)
        if piece.type in (CONTROL, UNKNOWN)
    }


def _piece_bytes(piece: Any) -> bytes:
    if piece.type in (CONTROL, UNKNOWN):
        return b""
    if piece.type == BYTE:
        return bytes([int(piece.piece[3:5], 16)])  # <0xE2>
    return str(piece.piece).replace("\u2581", " ").encode("utf-8")


def _parse(content: bytes, path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise CheckpointError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    return proto

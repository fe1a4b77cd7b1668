"""What the small JSON files beside a Hugging Face checkpoint say of its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.weights.hf import read_json


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beyond the vocabulary's own."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class Companions:
    """Collected from tokenizer_config.json, added_tokens.json, generation_config.json and config.json."""

    added: Mapping[int, AddedToken]
    bos_token: str | None
    eos_token: str | None
    add_bos: bool | None  # None: not said
    eos_ids: frozenset[int]


def read_companions(directory: Path) -> Companions:
    """Raises `CheckpointError` for files that are no JSON."""
    config = _object(directory / "tokenizer_config.json")
    added = {int(i): AddedToken(text, True) for text, i in _object(directory / "added_tokens.json").items()}
    for i, entry in (config.get("added_tokens_decoder") or {}).items():
        added[int(i)] = AddedToken(entry["content"], bool(entry.get("special", True)))
    eos_ids: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        given = _object(directory / file).get("eos_token_id")
        eos_ids |= {i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int)}
    add_bos = config.get("add_bos_token")
    return Companions(
        added,
        token_text(config.get("bos_token")),
        token_text(config.get("eos_token")),
        bool(add_bos) if add_bos is not None else None,
        frozenset(eos_ids),
    )


def token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json is its text, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _object(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}

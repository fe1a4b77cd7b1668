"""What the small JSON files beside a Hugging Face checkpoint say of its tokenizer.

    tokenizer_config.json    the class and its settings, special tokens by name, added tokens by id, the chat template
    special_tokens_map.json  special tokens by name, in older checkpoints
    added_tokens.json        added tokens by name, in older checkpoints; whether special is not said
    generation_config.json   which ids end an answer
    config.json              the same, the model's type, and for how many ids it has an embedding

The rules are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained`), but that ids are kept as declared
(it numbers added tokens anew), and that whatever any file calls an end is one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.errors import CheckpointError
from model.text.tokenizer.added import AddedToken
from model.weights.hf import read_json

# Where a space is put before text: before each part between control tokens ("each"), unless the part begins with one
# ("always"), before the whole prompt only ("first"), nowhere ("never").
SpaceRule = Literal["each", "always", "first", "never"]

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLAMA_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
MAX_IDS = 1_000_000  # the largest vocabularies have a quarter of that


@dataclass(frozen=True, slots=True)
class Companions:
    """Collected from all of them."""

    added: Mapping[int, AddedToken]  # with the id that they declare
    named: tuple[AddedToken, ...]  # special by name; they may stand in the vocabulary, in `added`, or behind both
    special_tokens: Mapping[str, str]  # text by name (bos_token, ...), as templates know them
    end_names: frozenset[str]
    end_ids: frozenset[int]
    add_bos: bool | None  # None: not said
    tokenizer_class: str | None  # without "Fast"
    space: SpaceRule
    embeddings: int | None  # None: not said


def read_companions(directory: Path) -> Companions:
    """Raises `CheckpointError` for files that are no JSON, or hold something else than they should."""
    with damaged(directory / "tokenizer_config.json"):
        config = _object(directory / "tokenizer_config.json")
        declared = {int(i): _token(entry) for i, entry in (config.get("added_tokens_decoder") or {}).items()}
    with damaged(directory / "special_tokens_map.json"):
        mapped = {str(k): v for k, v in _object(directory / "special_tokens_map.json").items()}
    with damaged(directory / "added_tokens.json"):
        beside = {
            int(i): AddedToken(text, special=True) for text, i in _object(directory / "added_tokens.json").items()
        }
    model = _object(directory / "config.json")
    kind = _class(config, model)
    settings = config if "added_tokens_decoder" in config else config | mapped
    with damaged(directory / "tokenizer_config.json"):
        special = _special_tokens(settings, kind)
        named = (*special.values(), *_extra(settings))
    added = check_ids(directory, beside | declared)
    return Companions(
        added=added,
        named=tuple(AddedToken(text, special=True) for text in named),
        special_tokens=special,
        end_names=frozenset(filter(None, (*map(token_text, (mapped.get("eos_token"),)), special.get("eos_token")))),
        end_ids=_end_ids(directory, model),
        add_bos=bool(config["add_bos_token"]) if config.get("add_bos_token") is not None else None,
        tokenizer_class=kind,
        space=_space(config, kind, (directory / "tokenizer_config.json").is_file()),
        embeddings=model["vocab_size"] if isinstance(model.get("vocab_size"), int) else None,
    )


@contextmanager
def damaged(file: Path) -> Iterator[None]:
    """Whatever wrongly typed content causes becomes a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} holds what it should not ({type(error).__name__}: {error})") from error


def check_ids(where: Path, added: Mapping[int, AddedToken]) -> Mapping[int, AddedToken]:
    """Raise `CheckpointError` for ids that no vocabulary has."""
    wrong = next((i for i in added if not 0 <= i < MAX_IDS), None)
    if wrong is not None:
        raise CheckpointError(
            f"{where}: the added token {added[wrong].text!r} has the id {wrong}: no vocabulary has it"
        )
    return added


def token_text(token: Any) -> str | None:
    """A token in these files is its text, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def added_token(entry: Mapping[str, Any]) -> AddedToken:
    """As transformers and the tokenizers library store it."""
    text = entry["content"]
    if not isinstance(text, str):
        raise TypeError(f"the content of an added token is {text!r}")
    flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
    special = bool(entry.get("special", True))
    return AddedToken(text, special, **flags, normalized=bool(entry.get("normalized", not special)))


def _token(entry: Any) -> AddedToken:
    return AddedToken(entry, special=True) if isinstance(entry, str) else added_token(entry)


def _class(config: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """The class that transformers would take."""
    given = config.get("tokenizer_class") or model.get("tokenizer_class")
    if isinstance(given, str):
        return given.removesuffix("Fast")
    return LLAMA_CLASSES[0] if model.get("model_type") == "llama" else None


def _special_tokens(settings: Mapping[str, Any], kind: str | None) -> dict[str, str]:
    defaults: Mapping[str, Any] = LLAMA_DEFAULTS if kind in LLAMA_CLASSES else {}
    others = [name for name in settings if name.endswith("_token") and name not in NAMES]
    found = {name: token_text(settings.get(name, defaults.get(name))) for name in (*NAMES, *others)}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, dict):
        found |= {str(name): token_text(token) for name, token in extra.items()}
    return {name: text for name, text in found.items() if text is not None}


def _extra(settings: Mapping[str, Any]) -> list[str]:
    """Special tokens without a name."""
    given = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    return [text for token in given if (text := token_text(token))] if isinstance(given, list) else []


def _space(config: Mapping[str, Any], kind: str | None, said: bool) -> SpaceRule:
    """What `legacy` and `add_prefix_space` mean to sentencepiece's vocabularies.

    Without a tokenizer_config.json nobody but Meta's own code has used the files: it encodes each part for itself.
    """
    if not said:
        return "each"
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") and kind != "CodeLlamaTokenizer" else "first"


def _end_ids(directory: Path, model: Mapping[str, Any]) -> frozenset[int]:
    ids: set[int] = set()
    for content in (_object(directory / "generation_config.json"), model):
        given = content.get("eos_token_id")
        ids |= {i for i in (given if isinstance(given, list) else [given]) if type(i) is int and i >= 0}
    return frozenset(ids)


def _object(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}

"""What a GGUF file says of its tokens, read with llama.cpp's rules (src/llama-vocab.cpp)."""

from collections.abc import Sequence
from pathlib import Path

from model.text.tokenizer.added import AddedToken
from model.weights.gguf import field

CONTROL, USER_DEFINED = 3, 4  # types of a token
# Names that end a turn, whatever the model (special_eog_ids).
END_NAMES = frozenset(
    {
        *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<|end|>"),
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "[e~["),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<｜end▁of▁sentence｜>"),
    }
)


def gguf_ends(path: Path, tokens: Sequence[str], types: Sequence[int]) -> tuple[int | None, int | None, frozenset[int]]:
    """Begin, end, and everything that ends an answer: what the file calls so, and llama.cpp's names of ends.

    A name counts where it is a token of its own kind, not an ordinary one that text may be made of, and has no other
    job: SmolLM2's <|endoftext|> is its unknown token.
    """
    keys = ("bos", "eos", "eot", "eom", "unknown")
    found = {key: field(path, f"tokenizer.ggml.{key}_token_id") for key in keys}
    ids = {key: i for key, i in found.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    by_name = {i for i, t in enumerate(tokens) if t in END_NAMES and types[i] in (CONTROL, USER_DEFINED)}
    by_name -= {ids[key] for key in ("bos", "unknown") if key in ids}
    said = {ids[key] for key in ("eos", "eot", "eom") if key in ids}
    return ids.get("bos"), ids.get("eos"), frozenset(said | by_name)


def gguf_added(tokens: Sequence[str], types: Sequence[int], ends: frozenset[int]) -> dict[int, AddedToken]:
    """Tokens that are found as a whole; one whose name ends a turn is a control token whatever the file says."""
    kinds = {CONTROL: True, USER_DEFINED: False}
    return {
        i: AddedToken(text, special=kinds[types[i]] or i in ends) for i, text in enumerate(tokens) if types[i] in kinds
    }

"""Code Llama's infilling: a prompt from what stands before and after the gap.

Prefix, suffix, middle (PSM), as in Meta's codellama: the marks are ids, and the suffix is encoded without the space
that sentencepiece puts before a text.
"""

from model.text.tokenizer import Tokenizer

PRE, SUF, MID, EOT = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"
ANCHOR = "☺"  # takes the space that would be put before the suffix; its own ids are cut off again


def can_infill(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the marks. Code Llama 70B has them too and was not trained on them; it has <step>."""
    names = tokenizer.control_tokens
    return {PRE, SUF, MID, EOT} <= names.keys() and "<step>" not in names


def encode_infill(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids after which the model writes what belongs between `prefix` and `suffix`, up to EOT."""
    names = tokenizer.control_tokens
    anchor = tokenizer.encode(ANCHOR, add_bos=False)
    after = tokenizer.encode(ANCHOR + suffix, add_bos=False)[len(anchor) :]
    before = tokenizer.encode(prefix, add_bos=False)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, names[PRE], *before, names[SUF], *after, names[MID]]


def infill_stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends the middle, beside the tokenizer's own."""
    return frozenset({tokenizer.control_tokens[EOT]})

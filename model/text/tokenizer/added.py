"""Tokens that are found in a text as a whole, before it is cut into pieces of the vocabulary.

Special ones (control tokens) only where a prompt's writer means them, others in any text. The rules are those of the
tokenizers library: of several that begin at one place the longest wins, and each may take white space beside it.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class AddedToken:
    """Text, and how it is looked for."""

    text: str
    special: bool
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # and after it
    single_word: bool = False  # not inside a word
    normalized: bool = False  # looked for in what the others leave over


class AddedTokens:
    """The added tokens of one vocabulary, by id."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self.tokens = tokens
        self._ids = {token.text: i for i, token in tokens.items()}
        self._words = frozenset(token.text for token in tokens.values() if token.single_word)
        # A control token's name of one character could not be told apart from text, so it stays text.
        names = [token for token in tokens.values() if not (token.special and len(token.text) == 1)]
        self._any = _patterns(names)
        self._plain = _patterns(token for token in names if not token.special)

    @property
    def control(self) -> dict[str, int]:
        """Ids of the special ones by name."""
        return {token.text: i for i, token in self.tokens.items() if token.special}

    def split(self, text: str, *, special: bool, mark: str = "") -> Iterator[str | int]:
        """Ids of the tokens in `text` and what stands between them, in order; special ones only if asked for.

        `mark`: a character that hides names (see model/text/chat.py) and is no text.
        """
        parts: Iterable[str | int] = [text] if text else []
        for pattern in self._any if special else self._plain:
            parts = self._cut(parts, pattern, mark)
        yield from parts

    def _cut(self, parts: Iterable[str | int], pattern: re.Pattern[str], mark: str) -> Iterator[str | int]:
        for part in parts:
            if isinstance(part, int):
                yield part
                continue
            end = 0
            for match in pattern.finditer(part):
                if match["name"] in self._words and _inside_word(part, *match.span("name"), mark):
                    continue
                if match.start() > end:
                    yield part[end : match.start()]
                yield self._ids[match["name"]]
                end = match.end()
            if end < len(part):
                yield part[end:]


def _patterns(tokens: Iterable[AddedToken]) -> list[re.Pattern[str]]:
    """In the order in which the library looks for them."""
    both = list(tokens)
    found = [_pattern(token for token in both if token.normalized == later) for later in (False, True)]
    return [pattern for pattern in found if pattern is not None]


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Finds any of these, the longest first; None if there are none. A name of no characters is in no text."""
    ordered = sorted((token for token in tokens if token.text), key=lambda token: len(token.text), reverse=True)
    if not ordered:
        return None
    left, right = ([re.escape(t.text) for t in ordered if getattr(t, side)] for side in ("lstrip", "rstrip"))
    # White space is taken only as a whole, and looked at once: a long run of it costs no more than its length.
    before = rf"(?:(?<!\s)\s++(?={'|'.join(left)}))?" if left else ""
    after = "".join(rf"(?:(?<={name})\s+)?" for name in right)
    return re.compile(f"{before}(?P<name>{'|'.join(re.escape(token.text) for token in ordered)}){after}")


def _inside_word(text: str, start: int, end: int, mark: str) -> bool:
    while mark and text[start - 1 : start] == mark:
        start -= 1
    while mark and text[end : end + 1] == mark:
        end += 1
    return any(_of_a_word(c) for c in (text[max(0, start - 1) : start], text[end : end + 1]) if c)


def _of_a_word(character: str) -> bool:
    """What the library's regular expressions mean by it: letters with their marks, digits, connectors, joiners."""
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"


def with_added(
    own: Mapping[int, AddedToken],
    ids: Mapping[str, int],
    added: Mapping[int, AddedToken],
    named: Sequence[str],
    embeddings: int | None,
) -> dict[int, AddedToken]:
    """A vocabulary's own special tokens, those that files beside it declare, and those that they only name.

    `ids`: of all tokens in the vocabulary. A control token for which the model has no embedding is left out: no text
    makes it, so the model is none the worse for it.
    """
    tokens = dict(own)
    for i, token in added.items():
        tokens[ids.get(token.text, i)] = token
    by_text = {token.text: i for i, token in tokens.items()}
    following = max([*ids.values(), *tokens], default=-1) + 1
    for text in named:
        if text not in ids and text not in by_text:
            by_text[text], following = following, following + 1
        i = ids[text] if text in ids else by_text[text]
        tokens[i] = _as_special(tokens.get(i), text)
    own_size = max(ids.values(), default=-1) + 1
    beyond = embeddings if embeddings is not None and embeddings >= own_size else None
    return {i: t for i, t in tokens.items() if beyond is None or i < beyond or not t.special}


def _as_special(token: AddedToken | None, text: str) -> AddedToken:
    if token is None or token.text != text:
        return AddedToken(text, special=True)
    return replace(token, special=True)

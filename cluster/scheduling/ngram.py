"""Drafts from the sequence's own tokens: what followed the same few tokens before. No model, nothing to load.

Texts repeat what they are about: an edit its original, a quote its source, a form its names.
"""

from cluster.scheduling.sequence import Drafter, Request

TOKENS = 3  # that must be the same for a draft
INDEXED = 2048  # tokens that one call looks at: the rest of a long prompt follows with later ones


class NgramDrafter:
    """Follows the latest repetition for as long as it goes on; looks for another one once it has ended.

    The longer it has gone on already the further it is trusted.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # few tokens -> the place behind where they came last
        self._indexed = 0  # tokens that are looked at
        self._next = -1  # place of the token that should come next; -1: there is no repetition
        self._length = 0  # of the repetition so far

    def draft(self, token_ids: list[int], most: int) -> list[int]:
        self._follow(token_ids)
        if self._next < 0 or self._indexed < len(token_ids):
            return []
        count = min(most, self._length)
        draft = token_ids[self._next : self._next + count]
        if len(draft) < count:  # it has caught up with itself: what repeats, repeats
            draft = (draft * count)[:count]
        return draft

    def _follow(self, token_ids: list[int]) -> None:
        stop = min(len(token_ids), self._indexed + INDEXED)
        after = self._after
        for place in range(self._indexed, stop):
            key = tuple(token_ids[place - TOKENS + 1 : place + 1])
            if 0 <= self._next < place and token_ids[self._next] == token_ids[place]:
                self._next += 1
                self._length += 1
            elif (found := after.get(key, -1)) >= 0:
                self._next, self._length = found, TOKENS
            else:
                self._next = -1
            if len(key) == TOKENS:
                after[key] = place + 1
        self._indexed = max(stop, self._indexed)


class NgramProposer:
    """See `Proposer`."""

    def drafter(self, request: Request) -> Drafter | None:
        return NgramDrafter()

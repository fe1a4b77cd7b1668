"""Drafts of how sequences go on, so that one step can compute several tokens of each.

A step computes a sequence's newest token and so many drafted ones, and draws after each of them. A draw is a function
of (seed, position) and of what is before it: as long as the draft is what was drawn, the next draw is the one that a
step without drafts would have made. The first draw that differs is the token, and what is behind it is computed
again: tokens are never others for being drafted.

A draft continues what is known. So a sequence for which there is one waits for its newest token, where others are
scheduled ahead of it. Constrained ones are not drafted: each token would need a mask that follows from the one before.
"""

from collections import Counter
from typing import Protocol

import numpy as np

from cluster.scheduling.running import Running, Slots
from cluster.scheduling.sequence import NO_TOKEN, Drafter, Request
from cluster.scheduling.step_times import StepTimes

MOST_DRAFTED = 16  # tokens of one sequence in a step
MOST_DECODES = 64  # tokens of a step that only decodes, if no more sequences than that run: captured on a GPU
MEMORY = 0.9  # of a drafted token in what is expected of the next one
LEAST_CHANCE = 0.2  # of a sequence whose drafts are computed


class Proposer(Protocol):
    """Where drafts come from."""

    def drafter(self, request: Request) -> Drafter | None:
        """For one request; None: it is not drafted."""
        ...


class Speculation:
    """Who is drafted, and how far: as far as the tokens per second that are expected grow with it.

    What was accepted is the wrong measure of that: it is as good with many streams, where more tokens take longer.
    """

    def __init__(self, proposer: Proposer, running: Running, tokens: int | None = None) -> None:
        """So many `tokens` of each sequence are drafted; None: what pays, see `StepTimes`."""
        self.proposer = proposer
        self.proposed: Counter[int] = Counter()  # since the start, by place in a draft: 0, 1, ...
        self.accepted: Counter[int] = Counter()
        self.times = StepTimes()
        self._running, self._tokens = running, tokens
        self._next = np.full(len(running.serials), NO_TOKEN, np.int32)  # by slot: what should come, as a draft begins
        self._chance = np.full(len(running.serials), 0.5)  # by slot: how often that was right, fading
        self._serials = np.zeros(len(running.serials), np.int64)  # by slot: of whom these are
        self._num_decodes, self._room = 1, MOST_DRAFTED  # in the last step, and for drafted tokens

    def look(self, slots: Slots) -> None:
        """New tokens of these are known: who of them can be drafted now waits for its newest one.

        Whoever is not drafted because it does not pay is followed too, or nobody would know when it does.
        """
        running = self._running
        pays = self._length(self._num_decodes, 1.0) > 0
        for slot in slots.tolist():
            seq = running.sequences[slot]
            if seq is None or seq.drafter is None:
                continue
            if self._serials[slot] != running.serials[slot]:
                self._serials[slot], self._next[slot], self._chance[slot] = running.serials[slot], NO_TOKEN, 0.5
            if (expected := self._next[slot]) != NO_TOKEN:
                self._learn(slot, int(expected == running.newest[slot]), 1)
            draft = seq.drafter.draft(seq.token_ids, 1)
            self._next[slot] = draft[0] if draft else NO_TOKEN
            running.is_drafted[slot] = pays and bool(draft) and (self._tokens or self._chance[slot] > LEAST_CHANCE)

    def draft(self, decodes: Slots, most: int) -> dict[int, list[int]]:
        """By slot, how those of `decodes` go on that can be drafted; `most` tokens in all, and blocks for them."""
        running, self._num_decodes, self._room = self._running, max(1, len(decodes)), most
        drafted = decodes[running.is_drafted[decodes] & (running.num_pending[decodes] == 0)]
        found: dict[int, list[int]] = {}
        if not len(drafted):
            return found
        length = self._length(len(drafted), float(self._chance[drafted].mean()))
        for slot in drafted.tolist():
            seq = running.sequences[slot]
            count = min(length, most, int(running.max_computed[slot] - running.num_known[slot]))
            draft = seq.drafter.draft(seq.token_ids, count) if count > 0 else []
            if draft and (draft := draft[: running.stretch(seq, 1 + len(draft)) - 1]):
                found[slot] = draft
                running.num_drafted[slot] = len(draft)
                most -= len(draft)
                self._next[slot] = NO_TOKEN  # it will be judged
        return found

    def judge(self, slot: int, num_drafted: int, num_right: int) -> None:
        """So many tokens of a draft were what was drawn."""
        self.proposed.update(range(num_drafted))
        self.accepted.update(range(num_right))
        self._learn(slot, num_right, min(num_right + 1, num_drafted))  # behind the first wrong one it says nothing

    def _learn(self, slot: int, num_right: int, num_drafted: int) -> None:
        kept = MEMORY**num_drafted
        self._chance[slot] = kept * self._chance[slot] + (1.0 - kept) * num_right / num_drafted

    def _length(self, num_drafted: int, chance: float) -> int:
        """Tokens to draft of each of so many sequences, as far as there is room in a step for all of them."""
        room = max(1, self._room // num_drafted)
        if self._tokens is not None:
            return min(self._tokens, room)
        return self.times.best_length(self._num_decodes, num_drafted, chance, min(room, MOST_DRAFTED))

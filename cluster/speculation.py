"""Guesses of how sequences go on, so that one step can compute several tokens of each.

A step computes a sequence's newest token and so many guessed ones, and draws after each of them. A draw is a function
of (seed, position) and of what is before it: as long as the guess is what was drawn, the next draw is the one that a
step without guesses would have made. The first draw that differs is the token, and what is behind it is computed
again: tokens are never others for being guessed.

A guess continues what is known. So a sequence for which there is one waits for its newest token, where others are
scheduled ahead of it. Constrained ones are not guessed: each token would need a mask that follows from the one before.
"""

from collections import Counter
from typing import Protocol

import numpy as np

from cluster.running import Running, Slots
from cluster.sequence import NO_TOKEN, Guesser, Request
from cluster.step_times import StepTimes

MOST_GUESSED = 16  # tokens of one sequence in a step
MOST_DECODES = 64  # tokens of a step that only decodes, if no more sequences than that run: captured on a GPU
MEMORY = 0.9  # of a guessed token in what is expected of the next one
LEAST_CHANCE = 0.2  # of a sequence whose guesses are computed


class Proposer(Protocol):
    """Where guesses come from."""

    def guesser(self, request: Request) -> Guesser | None:
        """For one request; None: it is not guessed."""
        ...


class Speculation:
    """Who is guessed, and how far: as far as the tokens per second that are expected grow with it.

    What was accepted is the wrong measure of that: it is as good with many streams, where more tokens take longer.
    """

    def __init__(self, proposer: Proposer, running: Running, tokens: int | None = None) -> None:
        """So many `tokens` of each sequence are guessed; None: what pays, see `StepTimes`."""
        self.proposer = proposer
        self.proposed: Counter[int] = Counter()  # since the start, by place in a guess: 0, 1, ...
        self.accepted: Counter[int] = Counter()
        self.times = StepTimes()
        self._running, self._tokens = running, tokens
        self._next = np.full(len(running.serials), NO_TOKEN, np.int32)  # by slot: what should come, as a guess begins
        self._chance = np.full(len(running.serials), 0.5)  # by slot: how often that was right, fading
        self._serials = np.zeros(len(running.serials), np.int64)  # by slot: of whom these are
        self._num_decodes, self._room = 1, MOST_GUESSED  # in the last step, and for guessed tokens

    def look(self, slots: Slots) -> None:
        """New tokens of these are known: who of them can be guessed now waits for its newest one.

        Whoever is not guessed because it does not pay is followed too, or nobody would know when it does.
        """
        running = self._running
        pays = self._length(self._num_decodes, 1.0) > 0
        for slot in slots.tolist():
            seq = running.sequences[slot]
            if seq is None or seq.guesser is None:
                continue
            if self._serials[slot] != running.serials[slot]:
                self._serials[slot], self._next[slot], self._chance[slot] = running.serials[slot], NO_TOKEN, 0.5
            if (expected := self._next[slot]) != NO_TOKEN:
                self._learn(slot, int(expected == running.newest[slot]), 1)
            guess = seq.guesser.guess(seq.token_ids, 1)
            self._next[slot] = guess[0] if guess else NO_TOKEN
            running.is_guessed[slot] = pays and bool(guess) and (self._tokens or self._chance[slot] > LEAST_CHANCE)

    def guess(self, decodes: Slots, most: int) -> dict[int, list[int]]:
        """By slot, how those of `decodes` go on that can be guessed; `most` tokens in all, and blocks for them."""
        running, self._num_decodes, self._room = self._running, max(1, len(decodes)), most
        guessed = decodes[running.is_guessed[decodes] & (running.num_pending[decodes] == 0)]
        found: dict[int, list[int]] = {}
        if not len(guessed):
            return found
        length = self._length(len(guessed), float(self._chance[guessed].mean()))
        for slot in guessed.tolist():
            seq = running.sequences[slot]
            count = min(length, most, int(running.max_computed[slot] - running.num_known[slot]))
            guess = seq.guesser.guess(seq.token_ids, count) if count > 0 else []
            if guess and (guess := guess[: running.stretch(seq, 1 + len(guess)) - 1]):
                found[slot] = guess
                running.num_guessed[slot] = len(guess)
                most -= len(guess)
                self._next[slot] = NO_TOKEN  # it will be judged
        return found

    def judge(self, slot: int, num_guessed: int, num_right: int) -> None:
        """So many tokens of a guess were what was drawn."""
        self.proposed.update(range(num_guessed))
        self.accepted.update(range(num_right))
        self._learn(slot, num_right, min(num_right + 1, num_guessed))  # behind the first wrong one it says nothing

    def _learn(self, slot: int, num_right: int, num_guessed: int) -> None:
        kept = MEMORY**num_guessed
        self._chance[slot] = kept * self._chance[slot] + (1.0 - kept) * num_right / num_guessed

    def _length(self, num_guessed: int, chance: float) -> int:
        """Tokens to guess of each of so many sequences, as far as there is room in a step for all of them."""
        room = max(1, self._room // num_guessed)
        if self._tokens is not None:
            return min(self._tokens, room)
        return self.times.best_length(self._num_decodes, num_guessed, chance, min(room, MOST_GUESSED))

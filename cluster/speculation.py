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

from cluster.running import Running, Slots
from cluster.sequence import Guesser, Request
from cluster.step_times import StepTimes

MOST_GUESSED = 16  # tokens of one sequence in a step
MOST_DECODES = 64  # tokens of a step that only decodes, if no more sequences than that run: captured on a GPU
MEMORY = 0.9  # of a guess in what is expected of the next one


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
        self.proposed: Counter[int] = Counter()  # since the start, by place in a guess: 0, 1, ...
        self.accepted: Counter[int] = Counter()
        self.times = StepTimes()
        self.proposer, self._running, self._tokens = proposer, running, tokens
        self._chance = 0.5 / (1.0 - MEMORY), 1.0 / (1.0 - MEMORY)  # accepted, of how many: both fading
        self._num_decodes = 1  # in the last step

    def look(self, slots: Slots) -> None:
        """New tokens of these are known: who of them can be guessed now waits for its newest one."""
        running = self._running
        if not self._length(self._num_decodes, self._num_decodes):
            running.is_guessed[slots] = False
            return
        for slot in slots.tolist():
            seq = running.sequences[slot]
            if seq is not None and seq.guesser is not None:
                running.is_guessed[slot] = bool(seq.guesser.guess(seq.token_ids, 1))

    def guess(self, decodes: Slots, most: int) -> dict[int, list[int]]:
        """By slot, how those of `decodes` go on that can be guessed; `most` tokens in all, and blocks for them."""
        running, self._num_decodes = self._running, max(1, len(decodes))
        guessed = decodes[running.is_guessed[decodes] & (running.num_pending[decodes] == 0)]
        length = self._length(len(decodes), len(guessed)) if len(guessed) else 0
        found: dict[int, list[int]] = {}
        for slot in guessed.tolist():
            seq = running.sequences[slot]
            left = int(running.max_computed[slot] - running.num_known[slot])
            count = min(length, most, left)
            guess = seq.guesser.guess(seq.token_ids, count) if count > 0 else []
            if guess and (guess := guess[: running.stretch(seq, 1 + len(guess)) - 1]):
                found[slot] = guess
                running.num_guessed[slot] = len(guess)
                most -= len(guess)
        return found

    def judge(self, num_guessed: int, num_accepted: int) -> None:
        """So many tokens of a guess were what was drawn."""
        self.proposed.update(range(num_guessed))
        self.accepted.update(range(num_accepted))
        tried = min(num_accepted + 1, num_guessed)  # what is behind the first wrong one says nothing
        accepted, of = self._chance
        self._chance = MEMORY * accepted + num_accepted, MEMORY * of + tried

    def _length(self, num_decodes: int, num_guessed: int) -> int:
        """Tokens to guess of each of `num_guessed` sequences in a step of `num_decodes`."""
        if self._tokens is not None:
            return self._tokens
        accepted, tried = self._chance
        return self.times.best_length(num_decodes, num_guessed, accepted / tried, MOST_GUESSED)

"""Open answers in sums: what is asked of them takes as long for ten as for ten thousand."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

BUCKETS, PER_OCTAVE, FIRST = 96, 6, 8  # by output so far: each an eighth longer than the one before
_ENDS = [FIRST * (2 ** ((i + 1) / PER_OCTAVE) - 1) for i in range(BUCKETS - 1)] + [math.inf]


@dataclass(slots=True)
class Answer:
    """One open answer, in tokens."""

    prompt: int
    max_tokens: int
    output: int = 0  # so far

    @property
    def waiting(self) -> int:
        """Prompt tokens that are still to be computed, as far as is known: all until the first token."""
        return 0 if self.output else self.prompt


def _bucket(output: int) -> int:
    return min(BUCKETS - 1, int(PER_OCTAVE * math.log2(1 + output / FIRST)))


@dataclass(slots=True)
class Crowd:
    """Answers, forgotten one by one: how many, how long, and how far they have come."""

    count: int = 0
    held: int = 0  # tokens, prompts and outputs
    waiting: int = 0  # prompt tokens of those that have not begun
    begun: int = 0
    # Of those that have begun, by output: how many, their outputs, and what they may have at most.
    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    outputs: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    limits: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> "Crowd":
        crowd = cls()
        for answer in answers:
            crowd.add(answer)
        return crowd

    def add(self, answer: Answer, times: int = 1) -> None:
        """`times` such answers more; fewer, if it is negative."""
        self.count += times
        self.held += times * (answer.prompt + answer.output)
        self.waiting += times * answer.waiting
        if answer.output:
            self.begun += times
            self._put(_bucket(answer.output), answer, times)

    def _put(self, i: int, answer: Answer, times: int) -> None:
        self.counts[i] += times
        self.outputs[i] += times * answer.output
        self.limits[i] += times * answer.max_tokens

    def grow(self, answer: Answer, tokens: int) -> None:
        """One of them is about to have so many tokens more."""
        i = _bucket(answer.output)
        if not answer.output or answer.output + tokens >= _ENDS[i]:
            self.add(answer, -1)
            self.add(Answer(answer.prompt, answer.max_tokens, answer.output + tokens))
        else:
            self.held += tokens
            self.outputs[i] += tokens

    def left(self, place: int, mean_output: float) -> float:
        """What is still to come of the answer that ends as number `place`, if all are average.

        Those that have come furthest end first; who has not begun yet has all of it to come.
        """
        for i in range(BUCKETS - 1, -1, -1):
            if count := self.counts[i]:
                if place < count:
                    return max(1.0, min(mean_output, self.limits[i] / count) - self.outputs[i] / count)
                place -= count
        return max(1.0, mean_output)

    def __add__(self, other: "Crowd") -> "Crowd":
        def both(mine: list[int], theirs: list[int]) -> list[int]:
            return [a + b for a, b in zip(mine, theirs, strict=True)]

        return Crowd(
            self.count + other.count, self.held + other.held, self.waiting + other.waiting, self.begun + other.begun,
            both(self.counts, other.counts), both(self.outputs, other.outputs), both(self.limits, other.limits),
        )  # fmt: skip

"""A fixed list of request lengths in the shape of MLPerf Inference's llama2-70b (OpenOrca): the same for every engine.

Prompts and outputs are lognormal around 294 tokens with a fixed seed; token ids are random. Two other lists, that
nothing was tuned for: long ones (3,000 tokens in, 1,000 out), and prompts that share four beginnings of 1,500 tokens.
"""

import math
import random
from typing import Literal

ListName = Literal["mixed", "long", "shared"]
Work = tuple[list[int], int]

MEAN, SIGMA, SEED = 294, 0.6, 20231219
SHORTEST, LONGEST = 8, 1024
VOCAB_SIZE = 32_000  # token ids are below it


def lengths(count: int) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request."""
    rng = random.Random(SEED)
    location = math.log(MEAN) - SIGMA**2 / 2  # so that the mean, not the median, is MEAN

    def draw() -> int:
        return min(LONGEST, max(SHORTEST, round(rng.lognormvariate(location, SIGMA))))

    return [(draw(), draw()) for _ in range(count)]


def requests(name: ListName, count: int, vocab_size: int = VOCAB_SIZE, longest: int = LONGEST) -> list[Work]:
    """Token ids of each prompt, and how many tokens are to follow; `longest` cuts those of the mixed list."""
    if name == "long":
        return [(prompt(i, 3000, vocab_size), 1000) for i in range(count)]
    if name == "shared":  # of four beginnings, each with an end of its own
        tails = lengths(count)
        starts = [prompt(-1 - i, 1500, vocab_size) for i in range(4)]
        return [(starts[i % 4] + prompt(i, tail, vocab_size)[1:], new) for i, (tail, new) in enumerate(tails)]
    return [(prompt(i, min(n, longest), vocab_size), min(new, longest)) for i, (n, new) in enumerate(lengths(count))]


def prompt(index: int, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids of request `index`: a beginning-of-text token, then random ones."""
    rng = random.Random(1_000_003 * (index + 1))
    return [1, *(rng.randrange(3, vocab_size) for _ in range(length - 1))]

"""A fixed list of request lengths in the shape of MLPerf Inference's llama2-70b (OpenOrca): the same for every engine.

Prompts and outputs are lognormal around 294 tokens with a fixed seed; token ids are random.
"""

import math
import random

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


def prompt(index: int, length: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids of request `index`: a beginning-of-text token, then random ones."""
    rng = random.Random(1_000_003 * (index + 1))
    return [1, *(rng.randrange(3, vocab_size) for _ in range(length - 1))]

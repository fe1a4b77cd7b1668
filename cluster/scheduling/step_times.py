"""How long steps that only decode take, by how many tokens they compute."""

WEIGHT = 0.1  # of a step in what is known of its size
FORGOTTEN = 0.999  # of what other steps took, with every step: so they are tried again, about one step in hundreds
EXACT = 16  # sizes up to here are told apart, larger ones in eights, as captured steps are


def size_of(num_tokens: int) -> int:
    return num_tokens if num_tokens <= EXACT else -(-num_tokens // 8) * 8


class StepTimes:
    """Measured; what was never seen is supposed to go on as before, and tried if it should pay."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._once: set[int] = set()  # sizes seen once: a first time may be no measure

    def observe(self, num_tokens: int, seconds: float) -> None:
        size, known = size_of(num_tokens), self._seconds
        for other in known:
            known[other] *= 1.0 if other == size else FORGOTTEN
        if size not in known:
            known[size] = seconds
            self._once.add(size)
        elif size in self._once:
            known[size] = min(known[size], seconds)
            self._once.remove(size)
        else:
            known[size] += WEIGHT * (seconds - known[size])

    def of(self, num_tokens: int) -> float:
        """Seconds; 0 if nothing is known. Between two known sizes, or beyond them, on the line through two of them."""
        size, known = size_of(num_tokens), self._seconds
        if size in known or not known:
            return known.get(size, 0.0)
        high = min((s for s in known if s >= size), default=max(known))
        low = max((s for s in known if s <= (size if high > size else high // 2)), default=high)
        slope = (known[high] - known[low]) / (high - low) if high > low else 0.0
        return known[high] + max(0.0, slope) * (size - high) if size > high else known[high] - slope * (high - size)

    def best_length(self, num_decodes: int, num_drafted: int, chance: float, most: int) -> int:
        """How many tokens to draft of each of `num_drafted` sequences, that are right with this chance one by one.

        What gives most tokens per second in a step of `num_decodes` sequences; the shortest of equals.
        """
        if size_of(num_decodes) not in self._seconds:
            return 0  # first of all it must be known what is to be beaten
        best, length, right, expected = 0.0, 0, 1.0, float(num_decodes)
        farthest = 2 * max(self._seconds)  # what is not known is tried little by little
        for drafted in range(most + 1):
            if num_decodes + drafted * num_drafted > farthest:
                break
            rate = expected / (self.of(num_decodes + drafted * num_drafted) or 1.0)
            if rate > best:
                best, length = rate, drafted
            right *= chance
            expected += right * num_drafted
        return length

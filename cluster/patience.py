"""How long a step may take before its stage counts as hung: learned from the steps that have finished."""

FACTOR = 10.0  # a step that takes so many times what one of its size ever took is not slow, it hangs
FADE = 0.95  # per finished step of its size: one slow step is not held against detection for ever
FRESH_STEPS = 8  # steps of a pipeline that was just started or rebuilt, which warm up caches and kernels


class Patience:
    """A deadline that scales with the work: `floor_s` plus FACTOR times what such a step took, at most `ceiling_s`.

    After `floor_s` already a process that does not answer is at fault, whatever the size of its step.

    Sizes are powers of two of tokens; a size not seen yet is scaled up from the next smaller one, which is generous,
    for small steps are bound by reading weights. As long as nothing is known the ceiling holds.
    """

    def __init__(self, floor_s: float, ceiling_s: float) -> None:
        self.floor_s = min(floor_s, ceiling_s)
        self.ceiling_s = ceiling_s
        self._slowest: dict[int, float] = {}  # size -> seconds, fading
        self._finished = 0  # steps since `restart`

    def restart(self) -> None:
        """The pipeline is new or rebuilt: its first steps may take longer."""
        self._finished = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` finished after `seconds` at the head of the queue."""
        size = num_tokens.bit_length()
        if self._finished >= FRESH_STEPS or size not in self._slowest:  # a warm-up is no measure of what follows
            self._slowest[size] = max(seconds, FADE * self._slowest.get(size, 0.0))
        self._finished += 1

    def limit(self, num_tokens: int) -> float:
        """Seconds that a step of `num_tokens` may take now."""
        if not self._slowest:
            return self.ceiling_s
        fresh = 3.0 if self._finished < FRESH_STEPS else 1.0
        return min(self.ceiling_s, fresh * (self.floor_s + FACTOR * self._expected(num_tokens.bit_length())))

    def _expected(self, size: int) -> float:
        below = [s for s in self._slowest if s <= size]
        if not below:
            return self._slowest[min(self._slowest)]
        nearest = max(below)
        return self._slowest[nearest] * 2.0 ** (size - nearest)

"""What one tenant was given, what it holds, and what it waits for."""

from typing import Generic, TypeVar

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # of arXiv 2401.00588: an output token costs a pass of its own over the weights

Waiting = TypeVar("Waiting")
Held = tuple[int, int]  # running sequences, and their KV blocks


class Account(Generic[Waiting]):
    """The books of one tenant."""

    __slots__ = ("counter", "num_blocks", "num_running", "tenant", "waiting", "weight")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.weight = 1.0  # its share of the engine, compared with others'
        self.counter = 0.0  # weighted tokens computed for it, divided by its weight
        self.num_running = 0
        self.num_blocks = 0  # KV blocks its running sequences hold
        self.waiting: list[Waiting] = []  # next first

    @property
    def held(self) -> Held:
        return self.num_running, self.num_blocks

    def charge(self, num_input: int, num_output: int) -> None:
        """Count tokens that are computed for it."""
        self.counter += (INPUT_WEIGHT * num_input + OUTPUT_WEIGHT * num_output) / self.weight

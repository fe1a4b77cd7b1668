"""A batch on its way, as the scheduler remembers it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.scheduling.running import Slots
from cluster.scheduling.sequence import Sequence
from model.batch import Int32Array


@dataclass(frozen=True, slots=True)
class Step:
    """What is in flight of a batch: its sequences, who may have left since, in its order."""

    sequences: list[Sequence]
    slots: Slots
    serials: NDArray[np.int64]  # of the slots' owners then
    stops: Int32Array  # how many tokens of each are computed with it, drafted ones included
    sampled: Slots  # places of those that a token is sampled of
    drafts: dict[int, list[int]]  # by slot: how these may go on; a token is sampled after each of them too

    @property
    def sampled_sequences(self) -> list[Sequence]:
        return self.sequences if len(self.sampled) == len(self.sequences) else [self.sequences[i] for i in self.sampled]

    def first_rows(self) -> Slots:
        """Where the tokens sampled of each begin in the step's output."""
        slots = self.slots[self.sampled]
        if not self.drafts:
            return np.arange(len(slots))
        counts = [1 + len(self.drafts.get(slot, ())) for slot in slots.tolist()]
        return np.cumsum([0, *counts[:-1]])

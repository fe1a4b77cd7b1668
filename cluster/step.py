"""A batch on its way, as the scheduler remembers it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.running import Slots
from cluster.sequence import Sequence
from model.batch import Int32Array


@dataclass(frozen=True, slots=True)
class Step:
    """What is in flight of a batch: its sequences, who may have left since, in its order."""

    sequences: list[Sequence]
    slots: Slots
    serials: NDArray[np.int64]  # of the slots' owners then
    stops: Int32Array  # how many tokens of each are computed with it
    sampled: Slots  # places of those that a token is sampled of

    @property
    def sampled_sequences(self) -> list[Sequence]:
        return self.sequences if len(self.sampled) == len(self.sequences) else [self.sequences[i] for i in self.sampled]

"""Batches that are on their way before it is known what some of their rows may draw.

Which token may come next in a constrained answer follows from the one before it. Its mask is made while the batch that
needs it is being computed, and reaches the last stage before it samples: so constraints cost no time between tokens.
"""

from collections import OrderedDict
from dataclasses import dataclass

from cluster.scheduling.sequence import Sequence
from model.batch import LateMasks


@dataclass(frozen=True, slots=True)
class Unmasked:
    """A row of a batch that was sent without its mask."""

    row: int  # of Batch.sample_rows
    seq: Sequence
    position: int  # of the token that is drawn there, in the sequence


class AwaitedMasks:
    """What batches in flight lack. A sequence that runs no longer does not want what is drawn for it."""

    def __init__(self) -> None:
        self._steps: OrderedDict[int, list[Unmasked]] = OrderedDict()  # oldest first

    def expect(self, step_id: int, rows: list[Unmasked]) -> None:
        """This batch has gone out without the masks of these rows."""
        if rows:
            self._steps[step_id] = rows

    def take(self, epoch: int) -> LateMasks | None:
        """Those of the oldest batch, once all are known. They are given out once."""
        if not self._steps:
            return None
        step_id, rows = next(iter(self._steps.items()))
        if any(self._is_missing(one) for one in rows):
            return None
        del self._steps[step_id]
        return LateMasks(epoch, step_id, {one.row: self._mask(one) for one in rows})

    def missing(self, step_id: int) -> list[Sequence]:
        """Whose masks this batch still lacks."""
        return [one.seq for one in self._steps.get(step_id, []) if self._is_missing(one)]

    def clear(self) -> None:
        self._steps.clear()

    def _is_missing(self, one: Unmasked) -> bool:
        if not one.seq.is_running or one.seq.matcher is None:
            return False
        return one.seq.num_tokens < one.position or not one.seq.matcher.ready

    def _mask(self, one: Unmasked) -> bytes:
        """Of a sequence that has left, none: what is drawn for it is dropped."""
        return one.seq.matcher.mask if one.seq.is_running and one.seq.matcher is not None else b""

"""What the garbage collector has left to do in a process that has started."""

import gc
import weakref

from model.heap import freeze_heap


class Node:
    """Holds itself: only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_only_what_comes_later_is_looked_through() -> None:
    before = len(gc.get_objects())
    freeze_heap()
    try:
        assert len(gc.get_objects()) < before / 10
        seen = weakref.ref(Node())
        gc.collect()
        assert seen() is None
    finally:
        gc.unfreeze()

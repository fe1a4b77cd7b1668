"""What masks cost, and whom: dear ones their tenant alone."""

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from model.text import grammar
from model.text.constraint import TOO_DEAR, Constraint
from model.text.grammar import DEAR_S, MAX_MASK_S, Masks, Matcher
from tests.conftest import eventually
from tests.model.text.test_grammar import tokenizer

DEAR = "root ::= [a-z ] root [a-z ]? | [a-z ]"  # dearer with every token; judged by its beginning, it is cheap


class Costing:
    """A matcher of the library's whose masks take so much of a processor."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.made, self.niceness = seconds, 0, 0

    def accept_token(self, token_id: int) -> bool:
        return True

    def fill_next_token_bitmask(self, bits: Any) -> None:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        bits.fill_(-1)
        self.made += 1


@pytest.fixture
def masks() -> Iterator[Masks]:
    made = Masks(tokenizer, lambda: None)
    yield made
    made.close()


def matcher(masks: Masks, seconds: float, owner: str = "") -> tuple[Matcher, Costing]:
    costing = Costing(seconds)
    made = Matcher(masks._move_on, costing, 64, None, owner)
    made.step()
    return made, costing


def test_a_dear_mask_is_known_by_its_first_time_and_made_apart(masks: Masks) -> None:
    cheap, dear = matcher(masks, 0.0), matcher(masks, 4 * DEAR_S)
    assert cheap[0].seconds < DEAR_S < dear[0].seconds
    for made, _ in (cheap, dear):
        made.advance(5)
    eventually(lambda: cheap[0].ready and dear[0].ready, 10, "both masks")
    assert cheap[1].niceness < dear[1].niceness == grammar.DEAR_NICENESS


def test_cheap_masks_do_not_wait_for_dear_ones(masks: Masks) -> None:
    dear = [matcher(masks, 0.2, "greedy")[0] for _ in range(8)]
    cheap, _ = matcher(masks, 0.0, "small")
    for one in dear:
        one.advance(5)
    for _ in range(2):
        cheap.advance(5)
        deadline = time.monotonic() + 10
        while not cheap.ready and time.monotonic() < deadline:
            time.sleep(0.001)
        assert cheap.ready
    assert not all(one.ready for one in dear)


def test_of_dear_masks_every_tenant_has_its_turn(masks: Masks) -> None:
    order: list[str] = []

    class Noting(Costing):
        def __init__(self, owner: str) -> None:
            super().__init__(0.02)
            self.owner = owner

        def accept_token(self, token_id: int) -> bool:
            order.append(self.owner)
            return True

    made = []
    for owner in ["greedy"] * 12 + ["small"] * 2:
        one = Matcher(masks._move_on, Noting(owner), 64, None, owner)
        one.step()
        made.append(one)
    for one in made:
        one.advance(5)
    eventually(lambda: all(one.ready for one in made), 30, "all masks")
    assert Counter(order) == {"greedy": 12, "small": 2}
    assert max(i for i, owner in enumerate(order) if owner == "small") <= 4, order


def test_what_no_batch_is_to_wait_for_stays_so(masks: Masks) -> None:
    one, _ = matcher(masks, 0.0)
    one.seconds = math.inf  # as the scheduler says
    one.advance(5)
    eventually(lambda: one.ready, 10, "a mask")
    assert one.seconds == math.inf


def test_a_constraint_that_becomes_too_dear_ends_with_the_reason(
    masks: Masks, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, which any look at its beginning lets through."""
    monkeypatch.setattr(grammar, "MAX_MASK_S", 0.05)
    t = tokenizer()
    made = masks.open(Constraint("grammar", DEAR, tuple(sorted(t.eos_ids))), [])
    assert made.seconds < 0.05 < MAX_MASK_S
    (letter,) = t.encode("a", add_bos=False)
    for _ in range(500):
        made.step(letter)
        if made.failure is not None:
            break
    assert made.failure == TOO_DEAR
    assert made.mask == b""
    assert not caplog.records, "that is no fault of ours"

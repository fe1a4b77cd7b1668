"""Streams on replicas that leave, fall silent, and come back."""

import asyncio
from collections.abc import Callable

import pytest

from cluster.errors import CaravanError, EngineLeaving, EngineStopped
from deployments.routing import assignments
from deployments.routing.assignments import Assignments


class Waiting:
    """A stream's inbox, as far as failing goes."""

    def __init__(self) -> None:
        self.errors: list[CaravanError] = []

    def fail(self, error: CaravanError) -> None:
        self.errors.append(error)


def after(act: Callable[[Assignments], None], replica: str = "a") -> list[CaravanError]:
    """What a stream on `replica` is told when `act` happens."""

    async def main() -> list[CaravanError]:
        book, waiting = Assignments(), Waiting()
        book.set_running({"a", "b"})
        book.open("r", waiting, asyncio.get_running_loop())
        if replica:
            book.assign("r", replica)
        act(book)
        await asyncio.sleep(0)
        return waiting.errors

    return asyncio.run(main())


def test_a_replica_that_leaves_hands_its_streams_over() -> None:
    (error,) = after(lambda book: book.set_running({"b"}))
    assert isinstance(error, EngineLeaving)


@pytest.mark.parametrize("running", [{"a"}, {"a", "b", "c"}, set[str]()], ids=str)
def test_streams_stay_where_they_can(running: set[str]) -> None:
    """Nobody to take them over is a reason to stay, too: a replica that leaves finishes what it has."""
    assert after(lambda book: book.set_running(running)) == []


def test_a_stream_that_was_left_alone_moves_once_somebody_comes() -> None:
    def act(book: Assignments) -> None:
        book.set_running(set())
        book.set_running({"new"})

    (error,) = after(act)
    assert isinstance(error, EngineLeaving)


def test_requests_without_a_replica_or_closed_are_left_alone() -> None:
    assert after(lambda book: book.set_running({"b"}), replica="") == []

    def close_first(book: Assignments) -> None:
        book.close("r")
        book.set_running({"b"})

    assert after(close_first) == []


def test_silence_ends_the_waiting_once_and_raises_doubts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignments, "SILENCE_S", -1.0)
    doubts: list[bool] = []

    def act(book: Assignments) -> None:
        for clear in (lambda: book.heard("a", True), lambda: book.reported("a")):
            book.assign("r", "a")
            book.fail_silent()
            book.fail_silent()
            doubts.append(book.is_doubtful("a"))
            clear()
            doubts.append(book.is_doubtful("a"))

    errors = after(act)
    assert len(errors) == 2
    assert all(isinstance(error, EngineStopped) and not isinstance(error, EngineLeaving) for error in errors)
    assert doubts == [True, False, True, False]


def test_who_speaks_is_not_silent() -> None:
    def act(book: Assignments) -> None:
        book.heard("a", True)
        book.fail_silent()

    assert after(act) == []


def test_streams_move_while_their_engine_rebuilds_its_pipeline_if_another_one_works() -> None:
    doubts: list[bool] = []

    def act(book: Assignments) -> None:
        book.heard("a", False)
        doubts.append(book.is_doubtful("a"))
        book.heard("a", True)
        doubts.append(book.is_doubtful("a"))

    (error,) = after(act)
    assert isinstance(error, EngineLeaving)
    assert error.cause == "rebuilding"
    assert doubts == [True, False]

    def both(book: Assignments) -> None:
        book.heard("b", False)
        book.heard("a", False)

    assert after(both) == [], "nobody else works: the stream waits where it is"


def test_open_requests_are_counted_by_replica() -> None:
    async def main() -> None:
        book = Assignments()

        def counts() -> tuple[int, int]:
            return book.count("a"), book.count("b")

        for name, replica in (("1", "a"), ("2", "a"), ("3", "b"), ("4", "")):
            book.open(name, Waiting(), asyncio.get_running_loop())
            if replica:
                book.assign(name, replica)
        assert counts() == (2, 1)
        book.assign("2", "a")  # what the router chose is what Serve has sent it to
        assert counts() == (2, 1)
        book.assign("2", "b")
        assert counts() == (1, 2)
        book.close("1")
        book.close("1")
        book.close("4")
        assert counts() == (0, 2)
        book.set_running({"a"})  # those of b are to ask again
        assert counts() == (0, 0)
        book.assign("3", "a")
        assert counts() == (1, 0)

    asyncio.run(main())

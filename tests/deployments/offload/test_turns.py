"""Tenants take turns: whoever asks for much waits for itself, and places are given back whatever happens."""

import asyncio
import os
import random
import threading
import time

import pytest

from deployments.errors import ApiError
from deployments.offload.turns import MODEST, ModestThreads, Turns


def test_a_tenant_with_one_piece_of_work_waits_for_one_of_another_with_many() -> None:
    async def test() -> None:
        turns, order = Turns(1, 1, 100), list[str]()

        async def work(name: str) -> None:
            order.append(name)
            await asyncio.sleep(0)

        many = [asyncio.create_task(turns.run("greedy", lambda: work("greedy"))) for _ in range(40)]
        await asyncio.sleep(0)
        for name in ("small", "other"):
            many.append(asyncio.create_task(turns.run(name, lambda name=name: work(name))))  # type: ignore[misc]
        await asyncio.gather(*many)
        assert order.index("small") <= 3
        assert order.index("other") <= 4
        assert len(order) == 42

    asyncio.run(test())


def test_no_tenant_holds_all_places_and_too_many_waiting_are_sent_away() -> None:
    async def test() -> None:
        turns, hold = Turns(3, 2, 4), asyncio.Event()
        tasks = [asyncio.create_task(turns.run("greedy", hold.wait)) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await turns.run("greedy", hold.wait)
        assert refused.value.status == 429
        assert refused.value.headers["Retry-After"]

        async def quick() -> str:
            return "done"

        assert await asyncio.wait_for(turns.run("small", quick), 1) == "done", "one place is not the greedy one's"
        hold.set()
        await asyncio.gather(*tasks)

    asyncio.run(test())


def test_the_books_are_right_whoever_is_cancelled_or_fails() -> None:
    async def test() -> None:
        rng, turns = random.Random(5), Turns(4, 2, 1000)
        running: dict[str, int] = {}

        async def work(name: str, fails: bool) -> None:
            running[name] = running.get(name, 0) + 1
            assert running[name] <= 2
            assert sum(running.values()) <= 4
            try:
                await asyncio.sleep(rng.random() * 0.003)
                if fails:
                    raise ValueError
            finally:
                running[name] -= 1

        def ask(name: str, fails: bool) -> "asyncio.Task[None]":
            return asyncio.create_task(turns.run(name, lambda: work(name, fails)))

        tasks = [ask(rng.choice("abc"), rng.random() < 0.2) for _ in range(300)]
        for task in tasks:
            if rng.random() < 0.3:
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        many = [ask(rng.choice("abc"), False) for _ in range(50)]
        await asyncio.sleep(0)
        for task in many:
            task.cancel()  # those that run, and those that would follow them
        found = await asyncio.wait_for(asyncio.gather(*many, return_exceptions=True), 20)
        assert all(isinstance(one, asyncio.CancelledError) for one in found)
        hold = asyncio.Event()
        last = [asyncio.create_task(turns.run(name, hold.wait)) for name in "abcd"]
        await asyncio.sleep(0.01)
        hold.set()
        await asyncio.wait_for(asyncio.gather(*last), 1)

    asyncio.run(test())


def test_threads_are_modest_and_a_turn_lasts_as_long_as_its_thread() -> None:
    async def test() -> None:
        threads, let_go = ModestThreads("test", 1, 1, 10), threading.Event()
        assert await threads.run("a", lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == MODEST
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < MODEST, "nobody else is"
        held = asyncio.create_task(threads.run("a", lambda: let_go.wait(5)))
        await asyncio.sleep(0.01)
        held.cancel()
        after = asyncio.create_task(threads.run("b", lambda: 3))
        await asyncio.sleep(0.05)
        assert not after.done(), "the thread is still at work"
        started = time.monotonic()
        let_go.set()
        assert await after == 3
        assert time.monotonic() - started < 2
        with pytest.raises(asyncio.CancelledError):
            await held
        with pytest.raises(KeyError):
            await threads.run("a", lambda: {}["x"])
        threads.close()

    asyncio.run(test())

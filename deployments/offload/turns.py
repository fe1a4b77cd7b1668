"""Who goes next where only so much can be done at once: tenants take turns, so that nobody waits for another's all."""

import asyncio
import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.errors import too_many

RETRY_S = 2.0
# Niceness: about a third of what others get of a processor that both want. Not less: between two calls of a library
# such a thread holds the interpreter, and then the event loop waits for it.
MODEST = 5

T = TypeVar("T")


class Turns:
    """At most `at_once` pieces of work are under way, `each` of them one tenant's; `waiting` more of it may wait.

    For one event loop.
    """

    def __init__(self, at_once: int, each: int, waiting: int) -> None:
        self._free = at_once
        self._each = each
        self._most_waiting = waiting
        self._running: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # next tenant first; none is empty

    async def run(self, tenant: str, work: Callable[[], Awaitable[T]]) -> T:
        """`work`, when it is this tenant's turn. Whoever is cancelled while it waits gives up its place.

        Raises `ApiError` 429 if too many of the tenant wait already.
        """
        await self._begin(tenant)
        try:
            return await work()
        finally:
            self._end(tenant)

    async def _begin(self, tenant: str) -> None:
        queue = self._waiting.get(tenant, ())
        if len(queue) >= self._most_waiting:
            message = "Too many of your requests are being prepared. Please try again later."
            raise too_many(message, "overloaded", "overloaded", RETRY_S)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(place)
        self._admit()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._end(tenant)  # its turn had just come
            else:
                self._leave(tenant, place)
            raise

    def _leave(self, tenant: str, place: asyncio.Future[None]) -> None:
        queue = self._waiting.get(tenant)
        if queue is not None and place in queue:
            queue.remove(place)
            if not queue:
                del self._waiting[tenant]

    def _admit(self) -> None:
        """Let in whoever may begin, the tenant first that had its last turn longest ago."""
        while self._free:
            tenant = next((name for name in self._waiting if self._running[name] < self._each), None)
            if tenant is None:
                return
            queue = self._waiting[tenant]
            place = queue.popleft()
            self._waiting.move_to_end(tenant)
            if not queue:
                del self._waiting[tenant]
            if place.cancelled():  # and its task does not know yet
                continue
            self._free -= 1
            self._running[tenant] += 1
            place.set_result(None)

    def _end(self, tenant: str) -> None:
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._admit()


class ModestThreads:
    """Threads for work that lets go of the interpreter but takes long: they leave the processors to others."""

    def __init__(self, name: str, at_once: int, each: int, waiting: int, niceness: int = MODEST) -> None:
        self._turns = Turns(at_once, each, waiting)
        self._threads = ThreadPoolExecutor(at_once, name, be_modest, (niceness,))

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns. Raises as `Turns.run` does, and what `work` raises."""

        async def to_the_end() -> T:
            # A thread cannot be stopped: the turn lasts as long as it does, whoever has left.
            done = asyncio.get_running_loop().run_in_executor(self._threads, work)
            try:
                return await asyncio.shield(done)
            except asyncio.CancelledError:
                await asyncio.wait({done})
                raise

        return await self._turns.run(tenant, to_the_end)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def be_modest(niceness: int) -> None:
    """For the calling thread: Linux keeps the niceness of each thread apart."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

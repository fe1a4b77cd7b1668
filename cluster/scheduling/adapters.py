"""Which LoRA adapters may run at this moment, and where on the stages' devices they are. An adapter is its digest."""

from collections import Counter, OrderedDict

from cluster.errors import RequestRejected
from model.batch import Placed


class AdapterRoom:
    """Slots 1 to `count` of every stage's device, and what is in them.

    An adapter that nobody runs with keeps its slot until it is needed: the one that was used longest ago goes. One that
    is *drained* takes nobody new in, so that its slot is free once those who run with it have ended.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: set[str] = set()  # those that every stage has in its host's memory
        self.num_placed = 0  # since the start
        self._slots: dict[str, int] = {}
        self._users: Counter[str] = Counter()  # sequences that run with each
        self._idle: OrderedDict[str, None] = OrderedDict()  # of those in slots, least recently used first
        self._drained: set[str] = set()
        self._free = list(range(count, 0, -1))
        self._placed: list[Placed] = []  # what stages have not been told yet

    def validate(self, wants_one: bool) -> None:
        """Raise `RequestRejected` if a request with an adapter can never run."""
        if wants_one and not self.count:
            raise RequestRejected("this engine has no room for adapters: set model.max_loaded_adapters")

    def is_placed(self, digest: str) -> bool:
        return digest in self._slots

    def can_run(self, digest: str) -> bool:
        """Whether somebody with this adapter could begin now."""
        if digest in self._slots:
            return digest not in self._drained
        return digest in self.held and bool(self._free or self._idle)

    def acquire(self, digest: str) -> int:
        """The adapter's slot, for one more that runs; it can."""
        assert self.can_run(digest)
        if digest not in self._slots:
            self._slots[digest] = slot = self._free.pop() if self._free else self._evict()
            self._placed.append(Placed(slot, digest))
            self.num_placed += 1
        self._idle.pop(digest, None)
        self._users[digest] += 1
        return self._slots[digest]

    def release(self, digest: str) -> None:
        """One that ran with it runs no longer."""
        self._users[digest] -= 1
        if self._users[digest]:
            return
        del self._users[digest]
        if digest in self._drained:
            self._drained.remove(digest)
            self._free.append(self._slots.pop(digest))
        else:
            self._idle[digest] = None

    def drain(self) -> None:
        """Make one more slot come free: that of the adapter that the fewest run with."""
        candidates = [digest for digest in self._users if digest not in self._drained]
        if candidates and not self._free and not self._idle:
            self._drained.add(min(candidates, key=lambda digest: self._users[digest]))

    @property
    def num_drained(self) -> int:
        return len(self._drained)

    def take_placed(self) -> list[Placed]:
        """What the next step has to tell the stages."""
        placed, self._placed = self._placed, []
        return placed

    def forget(self) -> None:
        """Nothing runs, and the stages may hold nothing any more."""
        assert not self._users
        self.held.clear()
        self._slots.clear()
        self._idle.clear()
        self._drained.clear()
        self._placed.clear()
        self._free = list(range(self.count, 0, -1))

    def check(self, users: Counter[str]) -> None:
        """Assert that the books are right, if so many run with each."""
        assert self._users == users, f"{self._users} run with adapters, not {users}"
        assert self._idle.keys() | self._users.keys() == self._slots.keys()
        assert not self._idle.keys() & self._users.keys()
        assert sorted([*self._slots.values(), *self._free]) == list(range(1, self.count + 1)), (
            "a slot is lost or shared"
        )
        assert self._slots.keys() <= self.held
        assert self._drained <= self._users.keys()

    def _evict(self) -> int:
        digest, _ = self._idle.popitem(last=False)
        return self._slots.pop(digest)

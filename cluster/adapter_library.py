"""The adapters that the stages keep in their hosts' memory, from the engine's side: who reads which, and which go.

Loading is in two phases: every stage reads its part beside its steps and says so; only when all have it may the
scheduler give it a slot. Adapters with open requests stay, of the others the one that was asked for longest ago goes
first. After a stage's death all of them are read again where they are missing, before anybody runs with them.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from cluster.scheduling.adapters import AdapterRoom
from cluster.scheduling.sequence import AdapterRef
from cluster.transport import AdapterLoaded, LoadAdapter

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """One adapter."""

    path: str
    users: set[str] = field(default_factory=set)  # open requests
    missing: set[int] = field(default_factory=set)  # stages that have not said that they have it
    error: str | None = None  # what one of them said
    waiting: "list[Future[None]]" = field(default_factory=list)  # who wants to know


class AdapterLibrary:
    """`send` hands an order to all stages. For the engine's thread alone."""

    def __init__(self, room: AdapterRoom, num_stages: int, most: int, send: Callable[[LoadAdapter], None]) -> None:
        self._room, self._num_stages, self._most, self._send = room, num_stages, most, send
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently asked for first

    def open(self, ref: AdapterRef, request_id: str) -> None:
        """A request has come that needs it."""
        entry, is_new = self._entry(ref)
        entry.users.add(request_id)
        if is_new:
            self._order(ref.digest, entry, self._make_room())

    def close(self, ref: AdapterRef, request_id: str) -> None:
        """That request has ended."""
        if (entry := self._entries.get(ref.digest)) is not None:
            entry.users.discard(request_id)

    def load(self, ref: AdapterRef, done: "Future[None]") -> None:
        """Have it read, if it is not held; `done` learns how that went."""
        entry, is_new = self._entry(ref)
        if not is_new and not entry.missing:
            done.set_result(None)
            return
        entry.waiting.append(done)
        if is_new:
            self._order(ref.digest, entry, self._make_room())

    def take(self, loaded: Iterable[AdapterLoaded]) -> list[tuple[str, str]]:
        """What stages have said. Returns the requests that cannot run, each with the reason."""
        failed: list[tuple[str, str]] = []
        for one in loaded:
            entry = self._entries.get(one.digest)
            if entry is None or one.stage not in entry.missing:
                continue
            entry.missing.discard(one.stage)
            entry.error = entry.error or one.error
            if entry.missing:
                continue
            if entry.error is None:
                self._room.held.add(one.digest)
            else:
                log.warning("an adapter cannot be served: %s", entry.error)
                del self._entries[one.digest]
                failed += [(request_id, entry.error) for request_id in entry.users]
            for done in entry.waiting:
                if not done.done():
                    done.set_result(None) if entry.error is None else done.set_exception(ValueError(entry.error))
            entry.waiting.clear()
        return failed

    def read_again(self) -> None:
        """The stages have been rebuilt: those with open requests are read where they are missing, others go."""
        needed = {digest: e for digest, e in self._entries.items() if e.users or e.waiting}
        gone = [digest for digest in self._entries if digest not in needed]
        for digest in gone:
            del self._entries[digest]
        for digest, entry in needed.items():
            self._order(digest, entry, gone)
            gone = []

    def _entry(self, ref: AdapterRef) -> tuple[Entry, bool]:
        """And whether nobody has asked for it before."""
        is_new = ref.digest not in self._entries
        entry = self._entries.setdefault(ref.digest, Entry(ref.path))
        self._entries.move_to_end(ref.digest)
        return entry, is_new

    def _order(self, digest: str, entry: Entry, drop: list[str]) -> None:
        entry.missing, entry.error = set(range(self._num_stages)), None
        self._send(LoadAdapter(digest, entry.path, drop))

    def _make_room(self) -> list[str]:
        """Whom all stages let go of, so that no more than there may be are held; who is needed stays all the same."""
        idle = [d for d, e in self._entries.items() if self._may_go(d, e)]
        gone = idle[: max(0, len(self._entries) - self._most)]
        for digest in gone:
            del self._entries[digest]
            self._room.held.discard(digest)
        return gone

    def _may_go(self, digest: str, entry: Entry) -> bool:
        return not entry.users and not entry.waiting and not entry.missing and not self._room.is_placed(digest)

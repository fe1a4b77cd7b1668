"""All that waits, and every tenant's account. In which order is said in fairness.py.

Who is next but finds no slot for its adapter is *parked*, with all that come after it with the same adapter, so that it
holds nobody up. Once its adapter can run it stands where it stood. Whoever has been overtaken too often gets a slot
that is kept free for it.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from cluster.scheduling.account import Account
from cluster.scheduling.adapters import AdapterRoom
from cluster.scheduling.fairness import Fairness
from cluster.scheduling.sequence import Sequence

OVERTAKEN = 64  # admissions of others that somebody parked puts up with


class Parked:
    """Those who wait with one adapter, by request id, and since which admission."""

    def __init__(self, since: int) -> None:
        self.since = since
        self.sequences: dict[str, Sequence] = {}


class WaitingQueue:
    """A tenant that comes back with nothing waiting is lifted to the least counter of those that wait, so that
    idleness buys nothing.
    """

    def __init__(self, fairness: Fairness, adapters: AdapterRoom) -> None:
        self._adapters = adapters
        self._parked: dict[str, Parked] = {}  # by adapter
        self._num_admitted = 0
        self.num_tokens = 0  # of all waiting sequences
        self._fairness = fairness
        self._accounts: dict[str, Account[Sequence]] = {}
        self._waiting: dict[str, Sequence] = {}  # by request id
        self._last_counter = 0.0  # of the tenant served last: where newcomers to an empty queue begin

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._waiting.get(request_id)

    @property
    def accounts(self) -> Iterable[Account[Sequence]]:
        return self._accounts.values()

    def account(self, seq: Sequence) -> Account[Sequence]:
        """The account of a sequence's tenant, opened if need be."""
        account = self._accounts.get(seq.request.tenant)
        if account is None:
            account = self._accounts[seq.request.tenant] = Account(seq.request.tenant)
        return account

    def add(self, seq: Sequence) -> None:
        """A new sequence, which says how much its tenant weighs from now on. What is queued again does not.

        Weights must not change while room is made: two that displace each other would never come to an end.
        """
        seq.account = self.account(seq)
        seq.account.weight = seq.request.weight
        self.push(seq)

    def push(self, seq: Sequence) -> None:
        """A sequence that has an account."""
        account = seq.account
        if not account.waiting:
            others = (a.counter for a in self._accounts.values() if a.waiting)
            account.counter = max(account.counter, min(others, default=self._last_counter))
        insort(account.waiting, seq, key=self._fairness.rank)
        self._waiting[seq.request_id] = seq
        self.num_tokens += seq.num_tokens

    def next(self) -> Sequence | None:
        """Whoever should be admitted next, of those whose adapters can run."""
        while (seq := self._fairness.first_of(a.waiting[0] for a in self._accounts.values() if a.waiting)) is not None:
            adapter = seq.request.adapter
            if adapter is None or self._adapters.can_run(adapter.digest):
                return seq
            self._leave_line(seq)
            parked = self._parked.setdefault(adapter.digest, Parked(self._num_admitted))
            parked.sequences[seq.request_id] = seq
        return None

    def unpark(self) -> None:
        """Let those back into the line whose adapters have slots, and of those that could have one the first."""
        if not self._parked:
            return
        can = [digest for digest in self._parked if self._adapters.can_run(digest)]
        self._unpark([digest for digest in can if self._adapters.is_placed(digest)])
        heads = [min(p.sequences.values(), key=self._fairness.rank) for d in can if (p := self._parked.get(d))]
        if (head := self._fairness.first_of(heads)) is not None and head.request.adapter is not None:
            self._unpark([head.request.adapter.digest])
            return
        late = [d for d, p in self._parked.items() if self._num_admitted - p.since > OVERTAKEN]
        if self._adapters.num_drained < len(self._adapters.held.intersection(late)):
            self._adapters.drain()

    def _unpark(self, digests: Iterable[str]) -> None:
        for digest in digests:
            for seq in self._parked.pop(digest).sequences.values():
                insort(seq.account.waiting, seq, key=self._fairness.rank)

    def _leave_line(self, seq: Sequence) -> None:
        waiting, rank = seq.account.waiting, self._fairness.rank
        del waiting[bisect_left(waiting, rank(seq), key=rank)]

    def serve(self, seq: Sequence) -> None:
        """It waits no longer, for it is served: whoever comes to an empty queue begins where its tenant is."""
        self.remove(seq.request_id)
        self._num_admitted += 1
        self._last_counter = seq.account.counter

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, wherever it stands; None if it does not wait."""
        seq = self._waiting.pop(request_id, None)
        if seq is not None:
            adapter = seq.request.adapter
            parked = self._parked.get(adapter.digest) if adapter is not None else None
            if parked is None or parked.sequences.pop(request_id, None) is None:
                self._leave_line(seq)
            elif not parked.sequences and adapter is not None:
                del self._parked[adapter.digest]
            self.num_tokens -= seq.num_tokens
        return seq

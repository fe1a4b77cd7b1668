"""All that waits, and every tenant's account. In which order is said in fairness.py."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from cluster.account import Account
from cluster.fairness import Fairness
from cluster.sequence import Sequence


class WaitingQueue:
    """A tenant that comes back with nothing waiting is lifted to the least counter of those that wait, so that
    idleness buys nothing.
    """

    def __init__(self, fairness: Fairness) -> None:
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
        """Whoever should be admitted next."""
        return self._fairness.first_of(a.waiting[0] for a in self._accounts.values() if a.waiting)

    def serve(self, seq: Sequence) -> None:
        """It waits no longer, for it is served: whoever comes to an empty queue begins where its tenant is."""
        self.remove(seq.request_id)
        self._last_counter = seq.account.counter

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, wherever it stands; None if it does not wait."""
        seq = self._waiting.pop(request_id, None)
        if seq is not None:
            waiting, rank = seq.account.waiting, self._fairness.rank
            del waiting[bisect_left(waiting, rank(seq), key=rank)]
            self.num_tokens -= seq.num_tokens
        return seq

"""Who is served next: fair between tenants in tokens; within each by priority, who has begun, and the policy.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588): a tenant's
counter holds the service it got, and the one that got least is next. A tenant that comes back with nothing waiting is
lifted to the least counter of those that wait, so that idleness buys nothing.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from cluster.account import Account
from cluster.sequence import Sequence

Policy = Literal["fcfs", "longest_first"]


def _before_policy(seq: Sequence) -> tuple[int, int]:
    """Priority, then who has tokens already (preempted, or from a lost engine): its client waits mid-stream."""
    return seq.request.priority, not seq.num_output_tokens


def _fcfs(seq: Sequence) -> tuple[int, ...]:
    """First come, first served. Who was preempted arrived before who waits, and so comes first again."""
    return *_before_policy(seq), seq.arrival


def _longest_first(seq: Sequence) -> tuple[int, ...]:
    """By the tokens that may still come: a list is done sooner if what takes longest does not begin last.

    (Graham, "Bounds on Multiprocessing Timing Anomalies", SIAM J. Appl. Math. 17(2), 1969.)
    """
    return *_before_policy(seq), seq.num_tokens - seq.max_computed_tokens, seq.arrival


RANKS: dict[Policy, Callable[[Sequence], tuple[int, ...]]] = {"fcfs": _fcfs, "longest_first": _longest_first}


class WaitingQueue:
    """All that waits, and every tenant's account."""

    def __init__(self, max_num_seqs: int, num_blocks: int, slack: float, policy: Policy = "fcfs") -> None:
        self.num_tokens = 0  # of all waiting sequences
        self._max_num_seqs, self._num_blocks = max_num_seqs, num_blocks  # what there is to hold
        self._rank = RANKS[policy]  # within a tenant
        self.slack = slack  # counters no further apart count as equal: then who holds less comes first
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

    def share(self, account: Account[Sequence], num_seqs: int = 0, num_blocks: int = 0) -> float:
        """The larger of its shares of sequences and KV, by weight, if it held so many more."""
        seqs = (account.num_running + num_seqs) / self._max_num_seqs
        return max(seqs, (account.num_blocks + num_blocks) / self._num_blocks) / account.weight

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
        insort(account.waiting, seq, key=self._rank)
        self._waiting[seq.request_id] = seq
        self.num_tokens += seq.num_tokens

    def next(self) -> Sequence | None:
        """Whoever should be admitted next."""
        return self.first_of(a.waiting[0] for a in self._accounts.values() if a.waiting)

    def first_of(self, candidates: Iterable[Sequence]) -> Sequence | None:
        """The most urgent, of the tenant that got least, or about as little and holds least."""
        found = [(seq, seq.account) for seq in candidates]
        if len(found) < 2:
            return found[0][0] if found else None
        urgent = min(seq.request.priority for seq, _ in found)
        found = [(seq, account) for seq, account in found if seq.request.priority == urgent]
        limit = min(account.counter for _, account in found) + self.slack
        found = [(seq, account) for seq, account in found if account.counter <= limit]
        return min(found, key=lambda item: (self.share(item[1]), item[1].counter, self._rank(item[0])))[0]

    def remove(self, request_id: str) -> Sequence | None:
        """Take a sequence out, wherever it stands; None if it does not wait."""
        seq = self._waiting.pop(request_id, None)
        if seq is not None:
            account = seq.account
            del account.waiting[bisect_left(account.waiting, self._rank(seq), key=self._rank)]
            self._last_counter = account.counter
            self.num_tokens -= seq.num_tokens
        return seq

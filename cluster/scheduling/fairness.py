"""Who is served next, and who makes way for it: every question of fairness, answered without changing anything.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588): a tenant's
counter holds the service it got, and the one that got least is next; among those that got about as much, the one that
holds least. Whoever is next but finds no room gets it from who is less urgent, or from the tenant that holds more, up
to an equal share.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from cluster.scheduling.account import Account, Held
from cluster.scheduling.running import Running, Vacancy
from cluster.scheduling.sequence import Sequence

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


class Fairness:
    """The rules, for an engine of a given size."""

    def __init__(self, max_num_seqs: int, num_blocks: int, slack: float, policy: Policy = "fcfs") -> None:
        self.rank = RANKS[policy]  # within a tenant: the least is next
        self._max_num_seqs, self._num_blocks = max_num_seqs, num_blocks  # what there is to hold
        self._slack = slack  # counters no further apart count as equal: then who holds less comes first

    def share(self, account: Account[Sequence], held: Held | None = None) -> float:
        """The larger of its shares of sequences and KV, by weight: of what it holds, or if it held so much."""
        num_seqs, num_blocks = held or account.held
        return max(num_seqs / self._max_num_seqs, num_blocks / self._num_blocks) / account.weight

    def first_of(self, candidates: Iterable[Sequence]) -> Sequence | None:
        """The most urgent, of the tenant that got least, or about as little and holds least."""
        found = [(seq, seq.account) for seq in candidates]
        if len(found) < 2:
            return found[0][0] if found else None
        urgent = min(seq.request.priority for seq, _ in found)
        found = [(seq, account) for seq, account in found if seq.request.priority == urgent]
        limit = min(account.counter for _, account in found) + self._slack
        found = [(seq, account) for seq, account in found if account.counter <= limit]
        return min(found, key=lambda item: (self.share(item[1]), item[1].counter, self.rank(item[0])))[0]

    def expendable(self, seq: Sequence) -> tuple[int, float, int]:
        """Who has most is preempted first: the least urgent, of the tenant that holds most, that arrived last."""
        return seq.request.priority, self.share(seq.account), seq.arrival

    def victims(
        self, seq: Sequence, vacancy: Vacancy, running: Running, accounts: Iterable[Account[Sequence]]
    ) -> list[Sequence] | None:
        """Who makes way for `seq`, which is next: nobody if there is room; None if it has to wait.

        Those are who is less urgent; among equals, the youngest of the tenant that holds most, as long as `seq`'s
        tenant stays within its fair share and has not had more service. They may be in flight: what comes of that is
        dropped.
        """
        if vacancy.fits:
            return []
        if running.worst_priority <= seq.request.priority and seq.account.num_running == len(running):
            return None  # it is so with a single tenant
        left = set(running)
        held = {account: account.held for account in accounts if account.num_running or account.waiting}
        victims: list[Sequence] = []
        while not vacancy.fits:
            victim = self._victim(seq, vacancy.num_blocks, left, held)
            if victim is None:
                return None
            victims.append(victim)
            left.remove(victim)
            vacancy.without(victim)
            num_seqs, num_blocks = held[victim.account]
            held[victim.account] = num_seqs - 1, num_blocks - len(victim.block_table)
        return victims

    def _victim(
        self, seq: Sequence, num_blocks: int, running: set[Sequence], held: dict[Account[Sequence], Held]
    ) -> Sequence | None:
        """The next one to make way for `seq` and its blocks, if these run and tenants hold so much."""
        worst = max((s.request.priority for s in running), default=seq.request.priority)
        candidates = [s for s in running if s.request.priority == worst]
        if worst <= seq.request.priority:
            most = max(held, key=lambda account: self.share(account, held[account]))
            own = self.share(seq.account, (held[seq.account][0] + 1, held[seq.account][1] + num_blocks))
            due = own <= 1 / sum(a.weight for a in held) and own < self.share(most, held[most])
            if worst < seq.request.priority or not due or seq.account.counter > most.counter + self._slack:
                return None
            candidates = [s for s in candidates if s.account is most]
        return max(candidates, key=lambda s: (self.share(s.account, held[s.account]), s.arrival), default=None)

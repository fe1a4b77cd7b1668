"""Who runs, and what each of them holds: a slot, KV blocks, a place in its tenant's account."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from cluster.account import Account
from cluster.block_manager import BlockManager
from cluster.sequence import Found, Sequence


class Vacancy:
    """Whether a sequence could run, if some who do were gone."""

    def __init__(self, blocks: BlockManager, seq: Sequence, num_free_slots: int, num_running: int) -> None:
        self._blocks, self._seq = blocks, seq
        self.num_blocks = blocks.blocks_for(seq.num_tokens)  # that it needs
        self._num_free_slots, self._num_running = num_free_slots, num_running
        self._users_gone: Counter[int] = Counter()  # block -> how many of its users
        self._freed: set[int] = set()

    def without(self, seq: Sequence) -> None:
        """And this one too."""
        self._num_free_slots += 1
        self._num_running -= 1
        self._users_gone.update(seq.block_table)
        self._freed.update(i for i in seq.block_table if self._users_gone[i] == self._blocks.num_users(i))

    @property
    def fits(self) -> bool:
        """With one block more for everybody who runs then, or what is admitted now is preempted soon."""
        num_tokens = self._seq.num_tokens + self._num_running * self._blocks.block_size
        found = self._seq.found.blocks
        return self._num_free_slots > 0 and self._blocks.can_allocate(found, num_tokens, self._freed)


class Running:
    """The running sequences, each in one of three lists, least recently scheduled first.

    `decoding`: one token is left to compute. `prefilling`: several are. `apart`: suspects, whatever is left; they share
    no batch. What sequences hold is given and taken back here alone.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int) -> None:
        self._blocks = blocks
        self._num_slots = max_num_seqs
        self.prefilling: dict[str, Sequence] = {}
        self.decoding: dict[str, Sequence] = {}
        self.apart: dict[str, Sequence] = {}
        self._slots = list(range(max_num_seqs))  # free ones
        self._priorities: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding) + len(self.apart)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.prefilling.values(), self.decoding.values(), self.apart.values())

    def get(self, request_id: str) -> Sequence | None:
        found = self.decoding.get(request_id) or self.prefilling.get(request_id)
        return found or self.apart.get(request_id)

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def worst_priority(self) -> int:
        """Of those that run: who is least urgent has the largest. 0 if nobody runs."""
        return max(self._priorities, default=0)

    def vacancy_for(self, seq: Sequence) -> "Vacancy":
        """What there is for a waiting sequence."""
        if seq.prompt_logprobs is None:  # otherwise it must be computed, even if its keys and values are there
            self._blocks.look_up(seq.found, seq.token_ids)
        return Vacancy(self._blocks, seq, len(self._slots), len(self))

    def admit(self, seq: Sequence) -> None:
        """Let it run, with blocks for all it knows now, of which those that were found are computed."""
        prefix, seq.found = seq.found.blocks.tolist(), Found()
        self._blocks.allocate(seq, prefix, seq.num_tokens)
        seq.account.num_running += 1
        seq.account.num_blocks += len(seq.block_table)
        self._priorities[seq.request.priority] += 1
        seq.slot = self._slots.pop()
        seq.num_computed_tokens = len(prefix) * self._blocks.block_size
        seq.num_uncomputed_tokens = seq.num_tokens - seq.num_computed_tokens
        if seq.num_output_tokens == len(seq.request.output_ids):
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
        self._list_of(seq)[seq.request_id] = seq

    def _list_of(self, seq: Sequence) -> dict[str, Sequence]:
        """Where it belongs by its counters. They change in `advance` and `clear` alone, which move it."""
        if seq.num_deaths:
            return self.apart
        return self.decoding if seq.num_uncomputed_tokens == 1 else self.prefilling

    def clear(self, seq: Sequence) -> None:
        """It is no longer suspect."""
        del self.apart[seq.request_id]
        seq.num_deaths = 0
        self._list_of(seq)[seq.request_id] = seq

    def grow(self, seq: Sequence) -> bool:
        """Blocks for one token more, if it needs any; False if there are none."""
        before, num_tokens = len(seq.block_table), seq.num_computed_tokens + 1
        if not self._blocks.can_grow(seq, num_tokens):
            return False
        self._blocks.grow(seq, num_tokens)
        seq.account.num_blocks += len(seq.block_table) - before
        return True

    def advance(self, sequences: list[Sequence], counts: list[int], step_id: int) -> None:
        """What this step computes counts as computed from now on, and who is in it is behind all others."""
        caching, block_size = self._blocks.prefix_caching, self._blocks.block_size
        for seq, count in zip(sequences, counts, strict=True):
            del self._list_of(seq)[seq.request_id]
            seq.num_computed_tokens += count
            seq.num_in_flight += 1
            seq.last_step = step_id
            if count == seq.num_uncomputed_tokens:  # what follows is sampled
                seq.num_pending_tokens += 1
                seq.num_uncomputed_tokens = 1
            else:
                seq.num_uncomputed_tokens -= count
            self._list_of(seq)[seq.request_id] = seq
            if caching and seq.num_computed_tokens // block_size > seq.num_full_blocks:
                self._blocks.mark_computed(seq)

    def release(self, seq: Sequence) -> None:
        """Take back what it holds.

        A batch in flight may still write to it, but stages work in order: before anything its next owner writes.
        """
        del self._list_of(seq)[seq.request_id]
        seq.account.num_running -= 1
        seq.account.num_blocks -= len(seq.block_table)
        self._priorities[seq.request.priority] -= 1
        self._priorities += Counter()  # forgets what is at zero
        self._blocks.free(seq)
        self._slots.append(seq.slot)
        seq.slot = -1

    def check(self, accounts: Iterable[Account[Sequence]]) -> None:
        """Assert that the books are right, those of the blocks and of the tenants too."""
        self._blocks.check(list(self))
        for seq in self:
            listed = [seq.request_id in phase for phase in (self.prefilling, self.decoding, self.apart)]
            assert listed.count(True) == 1, f"{seq.request_id} is in {listed.count(True)} lists"
            assert seq.request_id in self._list_of(seq), f"{seq.request_id} is in the wrong list"
        taken = [seq.slot for seq in self]
        assert sorted(taken + self._slots) == list(range(self._num_slots)), "a slot is lost or shared"
        for account in accounts:
            own = [seq for seq in self if seq.account is account]
            held = sum(len(seq.block_table) for seq in own)
            assert (account.num_running, account.num_blocks) == (len(own), held), f"{account.tenant}'s books are wrong"

"""Who runs, and what each of them holds: a slot, KV blocks, a place in its tenant's account."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from cluster.scheduling.account import Account
from cluster.scheduling.adapters import AdapterRoom
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.host_tier import Load
from cluster.scheduling.sequence import Found, Sequence
from model.batch import Int32Array

Slots = NDArray[np.intp]


def places(condition: NDArray[np.bool_]) -> Slots:
    """Where it holds."""
    return condition.nonzero()[0]


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
    """The running sequences. What a step asks of all of them and changes in them stands in arrays, by slot.

    At least one token of each is left to compute, be it one that is not known yet. If it is one, the sequence decodes;
    if there are more, it prefills. What they hold is given and taken back here alone.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, adapters: AdapterRoom) -> None:
        self._blocks, self.adapters = blocks, adapters
        self._seqs: dict[str, Sequence] = {}
        self._free = list(range(max_num_seqs))  # slots
        self._serial = 0
        self.num_constrained = self.num_suspects = 0  # sequences that have a matcher; that are apart
        self.drafts = False  # whether any are drafted, see speculation.py
        self._priorities: Counter[int] = Counter()
        self._stop_ids: Counter[int] = Counter()
        self.sequences: NDArray[np.object_] = np.full(max_num_seqs, None)
        self.serials = np.zeros(max_num_seqs, np.int64)  # 0: nobody has the slot; otherwise never the same again
        self.num_known = np.zeros(max_num_seqs, np.int32)  # tokens
        self.num_pending = np.zeros(max_num_seqs, np.int32)  # tokens that a step in flight samples
        self.num_computed = np.zeros(max_num_seqs, np.int32)  # tokens, once all that is scheduled is
        self.num_drafted = np.zeros(max_num_seqs, np.int32)  # of num_pending and num_computed, see speculation.py
        self.num_in_flight = np.zeros(max_num_seqs, np.int32)  # steps
        self.last_step = np.zeros(max_num_seqs, np.int32)  # the newest that computes it; -1: none
        self.newest = np.zeros(max_num_seqs, np.int32)  # the id of its last known token
        self.max_computed = np.zeros(max_num_seqs, np.int32)  # then it ends
        self.num_cacheable = np.zeros(max_num_seqs, np.int32)  # tokens that are needed to fill its next block
        self.charged_from = np.zeros(max_num_seqs, np.int32)  # tokens from this one on are output to be paid for
        self.adapter_slots = np.zeros(max_num_seqs, np.int32)  # 0: none
        self.has_rules = np.zeros(max_num_seqs, np.bool_)  # its tokens are not simply the likeliest
        self.rules_told = np.zeros(max_num_seqs, np.bool_)  # to the last stage, for this slot
        self.is_loading = np.zeros(max_num_seqs, np.bool_)  # what it begins with comes from host memory
        self.is_apart = np.zeros(max_num_seqs, np.bool_)  # suspects: they share no batch
        self.is_plain = np.zeros(max_num_seqs, np.bool_)  # see Sequence.is_plain
        self.is_drafted = np.zeros(max_num_seqs, np.bool_)  # it is scheduled only once all its tokens are known

    def __len__(self) -> int:
        return len(self._seqs)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._seqs.values())

    def get(self, request_id: str) -> Sequence | None:
        return self._seqs.get(request_id)

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def worst_priority(self) -> int:
        """Of those that run: who is least urgent has the largest. 0 if nobody runs."""
        return max(self._priorities, default=0)

    @property
    def num_left(self) -> Int32Array:
        """Tokens to compute, by slot; 0 where nobody is."""
        left: Int32Array = self.num_known + self.num_pending - self.num_computed
        return left

    @property
    def num_prefill_tokens(self) -> int:
        """That are left to compute of prompts."""
        left = self.num_left
        return int(left[left > 1].sum())

    def decoding(self) -> Slots:
        """Slots of those that have one token left, but for suspects."""
        decoding = (self.num_left == 1) & ~self.is_loading
        return places(decoding & ~self.is_apart if self.num_suspects else decoding)

    def prefilling(self) -> list[Sequence]:
        """Those that have more, but for suspects."""
        found: list[Sequence] = self.sequences[(self.num_left > 1) & ~(self.is_apart | self.is_loading)].tolist()
        return found

    def apart(self) -> list[Sequence]:
        """Suspects, least recently scheduled first."""
        if not self.num_suspects:
            return []
        slots = places(self.is_apart & ~self.is_loading)
        found: list[Sequence] = self.sequences[slots[np.argsort(self.last_step[slots], kind="stable")]].tolist()
        return found

    def idle(self) -> list[Sequence]:
        """Those that no step in flight computes."""
        found: list[Sequence] = self.sequences[(self.serials > 0) & (self.num_in_flight == 0)].tolist()
        return found

    def is_stop(self, token_ids: list[int]) -> list[int]:
        """Which of these tokens ends anybody's answer: indices."""
        if self._stop_ids.keys().isdisjoint(token_ids):
            return []
        return [i for i, token_id in enumerate(token_ids) if token_id in self._stop_ids]

    def vacancy_for(self, seq: Sequence) -> Vacancy:
        """What there is for a waiting sequence."""
        if seq.prompt_logprobs is None:  # otherwise it must be computed, even if its keys and values are there
            self._blocks.look_up(seq)
        return Vacancy(self._blocks, seq, len(self._free), len(self))

    def admit(self, seq: Sequence) -> None:
        """Let it run, with blocks for all it knows now, of which those that were found are computed."""
        prefix, copies, seq.found = seq.found.blocks.tolist(), seq.found.places.tolist(), Found()
        if copies and not (self._blocks.host and self._blocks.host.is_worth(len(copies), self._blocks.block_size)):
            copies = []
        self._blocks.allocate(seq, prefix, seq.num_tokens)
        seq.account.num_running += 1
        seq.account.num_blocks += len(seq.block_table)
        self._priorities[seq.request.priority] += 1
        self._stop_ids.update(seq.stop_token_ids)
        self.num_constrained += seq.matcher is not None
        self.num_suspects += seq.num_deaths > 0
        self._seqs[seq.request_id] = seq
        slot = seq.slot = self._free.pop()
        computed = len(prefix) * self._blocks.block_size
        if seq.num_output_tokens == len(seq.request.output_ids):
            seq.num_cached_tokens = min(computed, seq.num_prompt_tokens)
        adapter = seq.request.adapter
        self.adapter_slots[slot] = self.adapters.acquire(adapter.digest) if adapter is not None else 0
        self._serial += 1
        self.sequences[slot], self.serials[slot] = seq, self._serial
        self.num_known[slot], self.num_computed[slot], self.newest[slot] = seq.num_tokens, computed, seq.token_ids[-1]
        self.last_step[slot] = -1
        self.max_computed[slot] = seq.max_computed_tokens
        self.num_cacheable[slot] = computed + self._blocks.block_size
        self.charged_from[slot] = max(seq.num_paid_tokens, seq.num_prompt_tokens)
        self.is_apart[slot], self.is_plain[slot], self.is_drafted[slot] = seq.num_deaths > 0, seq.is_plain, False
        self.has_rules[slot], self.rules_told[slot] = not seq.is_greedy, False
        if copies:
            self._load(seq, len(prefix), copies)

    def _load(self, seq: Sequence, first: int, copies: list[int]) -> None:
        """Bring these copies into its blocks from number `first` on; it counts as in flight until they are there."""
        blocks, host, slot = seq.block_table[first : first + len(copies)], self._blocks.host, seq.slot
        assert host is not None
        hashes = [seq.chain.hash(seq.token_ids, first + i, self._blocks.block_size) for i in range(len(copies))]
        self._blocks.hold(blocks)
        host.load(Load(slot, int(self.serials[slot]), copies, blocks, hashes))
        self.is_loading[slot] = True
        self.num_in_flight[slot] += 1

    def loaded(self, load: Load, num_good: int) -> int:
        """The first so many of these blocks are there. Returns how many tokens less its sequence has to compute."""
        self._blocks.let_go(load.blocks)
        slot, size = load.slot, self._blocks.block_size
        if self.serials[slot] != load.serial:
            return 0  # it has left
        seq, computed = self.sequences[slot], int(self.num_computed[slot]) + num_good * size
        self.is_loading[slot] = False
        self.num_in_flight[slot] -= 1
        self.num_computed[slot], self.num_cacheable[slot] = computed, computed + size
        self._blocks.mark_computed(seq, computed)
        if seq.num_output_tokens == len(seq.request.output_ids):
            seq.num_cached_tokens = min(computed, seq.num_prompt_tokens)
            self.is_plain[slot] = seq.is_plain
        return num_good * size

    def grow(self, seq: Sequence) -> bool:
        """Blocks for one token more, if it needs any; False if there are none."""
        missing = self._blocks.blocks_for(int(self.num_computed[seq.slot]) + 1) - len(seq.block_table)
        if missing > self._blocks.num_free:
            return False
        if missing > 0:
            seq.block_table += self._blocks.take(missing)
            seq.account.num_blocks += missing
        return True

    def stretch(self, seq: Sequence, count: int) -> int:
        """Blocks for so many tokens more, if there are any that nobody who runs may need soon; for how many it has."""
        computed = int(self.num_computed[seq.slot])
        missing = self._blocks.blocks_for(computed + count) - len(seq.block_table)
        spare = min(missing, self._blocks.num_free - len(self))
        if spare > 0:
            seq.block_table += self._blocks.take(spare)
            seq.account.num_blocks += spare
        return min(count, len(seq.block_table) * self._blocks.block_size - computed)

    def grow_all(self, slots: Slots) -> None:
        """A block for each of these whose blocks are full, which must be free."""
        size, num_computed = self._blocks.block_size, self.num_computed[slots].tolist()
        sequences = zip(self.sequences[slots].tolist(), num_computed, strict=True)
        full = [seq for seq, computed in sequences if len(seq.block_table) * size <= computed]
        for seq, block_id in zip(full, self._blocks.take(len(full)), strict=True):
            seq.block_table.append(block_id)
            seq.account.num_blocks += 1

    def advance(self, slots: Slots, counts: Int32Array, sampled: Slots, step_id: int) -> None:
        """What this step computes counts as computed from now on; of those at `sampled` it samples a token."""
        self.num_computed[slots] += counts
        self.num_pending[slots[sampled]] += 1 + self.num_drafted[slots[sampled]] if self.drafts else 1
        self.num_in_flight[slots] += 1
        self.last_step[slots] = step_id
        if self._blocks.prefix_caching:
            cacheable = np.minimum(self.num_computed[slots], self.num_known[slots])  # the newest may not be known yet
            full = places(cacheable >= self.num_cacheable[slots])
            slots, cacheable, size = slots[full], cacheable[full], self._blocks.block_size
            self.num_cacheable[slots] = cacheable - cacheable % size + size
            for seq, num_tokens in zip(self.sequences[slots].tolist(), cacheable.tolist(), strict=True):
                self._blocks.mark_computed(seq, num_tokens)

    def take(self, slots: Slots | int, token_ids: Int32Array | int) -> None:
        """Tokens that are known now, one of each."""
        self.num_known[slots] += 1
        self.newest[slots] = token_ids

    def settle(self, seq: Sequence, num_accepted: int) -> None:
        """So much of what was drafted of it is right: what is behind that is yet to be computed."""
        num_drafted = self.num_drafted[seq.slot]
        self.num_pending[seq.slot] -= num_drafted
        self.num_computed[seq.slot] -= num_drafted - num_accepted
        self.num_drafted[seq.slot] = 0

    def clear(self, seq: Sequence) -> None:
        """It is no longer suspect."""
        seq.num_deaths = 0
        self.num_suspects -= 1
        self.is_apart[seq.slot] = False

    def release(self, seq: Sequence) -> None:
        """Take back what it holds.

        A batch in flight may still write to it, but stages work in order: before anything its next owner writes.
        """
        del self._seqs[seq.request_id]
        seq.account.num_running -= 1
        seq.account.num_blocks -= len(seq.block_table)
        self._priorities[seq.request.priority] -= 1
        self._priorities += Counter()  # forgets what is at zero
        if seq.stop_token_ids:
            self._stop_ids.subtract(seq.stop_token_ids)
            self._stop_ids += Counter()
        self.num_constrained -= seq.matcher is not None
        self.num_suspects -= seq.num_deaths > 0
        self._blocks.free(seq)
        if seq.request.adapter is not None:
            self.adapters.release(seq.request.adapter.digest)
        slot, seq.slot = seq.slot, -1
        self._free.append(slot)
        self.sequences[slot], self.serials[slot] = None, 0
        self.is_apart[slot] = self.is_loading[slot] = False
        counted = self.num_known, self.num_pending, self.num_computed, self.num_drafted, self.num_in_flight
        for counts in (*counted, self.adapter_slots):
            counts[slot] = 0

    def check(self, accounts: Iterable[Account[Sequence]]) -> None:
        """Assert that the books are right, those of the blocks and of the tenants too."""
        self._blocks.check(list(self))
        taken = [seq.slot for seq in self]
        assert sorted(taken + self._free) == list(range(len(self.serials))), "a slot is lost or shared"
        assert all(self.sequences[seq.slot] is seq for seq in self)
        assert np.flatnonzero(self.serials).tolist() == sorted(taken)
        left, num_known = self.num_left, self.num_known
        assert not left[self._free].any()
        assert self.num_suspects == np.count_nonzero(self.is_apart)
        for seq in self:
            assert num_known[seq.slot] == seq.num_tokens, f"{seq.request_id} lost count of its tokens"
            assert self.newest[seq.slot] == seq.token_ids[-1]
            assert left[seq.slot] > 0, f"nothing of {seq.request_id} is left to compute"
            assert self.num_in_flight[seq.slot] or not self.num_pending[seq.slot] + self.num_drafted[seq.slot]
            assert self.is_apart[seq.slot] == (seq.num_deaths > 0)
        self.adapters.check(Counter(seq.request.adapter.digest for seq in self if seq.request.adapter is not None))
        for account in accounts:
            own = [seq for seq in self if seq.account is account]
            held = sum(len(seq.block_table) for seq in own)
            assert (account.num_running, account.num_blocks) == (len(own), held), f"{account.tenant}'s books are wrong"

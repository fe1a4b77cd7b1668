"""Which tokens the next batch computes. Pure bookkeeping: no clock, no thread, no Ray, no tensors.

Micro-batches need no name here: a batch takes the sequences that were scheduled longest ago, at most its share of them,
so successive calls of `schedule` form the cohorts that fill the pipeline by themselves. One cohort more than there are
stages is in flight: its tokens are still being sampled when it is scheduled, and the first stage begins with it the
moment they are. What follows from a token that fewer steps ago is sampled waits for a later batch: it would hold up the
first stage while the others run dry. Prompts are spread over many batches, for a pipeline is full only if neighbouring
steps take equally long.

Tenants share fairly: what waits is taken in the order of waiting_queue.py, and whoever is next there but finds no room
gets it from the tenant that holds more, up to an equal share.
"""

import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import RequestRejected
from cluster.scheduling.adapters import AdapterRoom
from cluster.scheduling.awaited_masks import AwaitedMasks
from cluster.scheduling.batch_builder import build_batch, in_order
from cluster.scheduling.block_manager import BlockManager
from cluster.scheduling.fairness import Fairness, Policy
from cluster.scheduling.host_tier import HostStats
from cluster.scheduling.results import Results
from cluster.scheduling.running import Running, Slots, places
from cluster.scheduling.sequence import MAX_PENDING_TOKENS, NO_TOKEN, Matcher, Request, Sequence, TokenEvent
from cluster.scheduling.speculation import MOST_DECODES, Proposer, Speculation
from cluster.scheduling.step import Step
from cluster.scheduling.waiting_queue import WaitingQueue
from model.batch import Batch, Copied, Copies, LateMasks, StepOutput

MASK_SECONDS = 0.03  # a batch starts without masks that take threads no longer altogether: while it is computed
MIN_STEP_TOKENS = 256  # while few run: a smaller step takes nearly as long, for it reads the same weights
MIN_PREFILL_CHUNK = 64
GUILTY = 3  # stage deaths in a row
FATAL = f"a stage died {GUILTY} times while computing it, in the end with nothing else under way"
PREFILL_TURNS = 4  # of the pipeline, that prompts are spread over: fewer make steps less equal, more delay first tokens
NOBODY: Slots = np.empty(0, np.intp)


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot for metrics, routing and autoscaling."""

    running: int
    running_tokens: int  # prompt and output tokens of running requests
    waiting: int
    waiting_tokens: int
    queued_tokens: int  # of running and waiting prompts, not computed yet
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int  # since the start
    prefix_queried_tokens: int  # since the start
    prefix_hit_tokens: int  # since the start, on the device
    proposed_tokens: Counter[int] = field(default_factory=Counter)  # since the start, by place in a draft: 0, 1, ...
    accepted_tokens: Counter[int] = field(default_factory=Counter)
    host_hit_tokens: int = 0  # since the start, copied back from host memory
    blocks_evicted: int = 0  # since the start, of the device
    host: HostStats = HostStats()  # noqa: RUF009


class Scheduler:
    """Continuous batching with chunked prefill under one token budget, balanced cohorts, preemption by recompute."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        depth: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: Policy = "fcfs",
        max_adapters: int = 0,
    ) -> None:
        self.blocks = blocks
        self.adapters = AdapterRoom(max_adapters)
        self.depth = depth  # number of stages: as many cohorts keep the pipeline full
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = min(max_model_len, blocks.num_blocks * blocks.block_size)
        self.epoch = 0
        self.admitted: list[str] = []  # requests that left the waiting queue in the last `schedule`
        self._fairness = Fairness(max_num_seqs, blocks.num_blocks, slack=max_num_batched_tokens, policy=policy)
        self._waiting = WaitingQueue(self._fairness, self.adapters)
        self._running = Running(blocks, max_num_seqs, self.adapters)
        self.speculation: Speculation | None = None
        self._results = Results(self._running)
        self._in_flight: dict[int, Step] = {}  # by step id
        self._cohorts: set[int] = set()  # step ids in flight that decode
        self._awaited = AwaitedMasks()
        self._next_step = 0
        self._arrivals = 0
        self._preemptions = self._prefix_queried = self._prefix_hits = self._host_hits = 0

    # -- requests ---------------------------------------------------------------------------------------------------

    def validate(self, request: Request) -> None:
        """Raise `RequestRejected` if the request can never run here, however empty the engine is."""
        needed = len(request.token_ids) + request.sampling.max_tokens - 1  # the last token needs no room
        if not request.token_ids:
            raise RequestRejected("the prompt is empty: send at least one token")
        if needed > self.max_model_len:
            raise RequestRejected(
                f"prompt and max_tokens need room for {needed} tokens, this engine holds "
                f"{self.max_model_len}: shorten them"
            )
        self.adapters.validate(request.adapter is not None)

    def speculate(self, proposer: Proposer | None, tokens: int | None = None) -> None:
        """What is added from now on is drafted, so many tokens of each in a step (None: as many as pay), or not."""
        assert not self.has_work
        self.speculation = Speculation(proposer, self._running, tokens) if proposer is not None else None
        self._results.speculation, self._running.drafts = self.speculation, proposer is not None

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request, with a matcher if it has a constraint. Raises `RequestRejected` as `validate` does."""
        self.validate(request)
        drafter = self.speculation.proposer.drafter(request) if self.speculation is not None and not matcher else None
        self._waiting.add(Sequence(request, self._arrivals, matcher, drafter))
        self._arrivals += 1

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; unknown ids are ignored, for it may just have finished.

        Safe while in flight: stages work in order, so what the running step still writes to a freed block comes
        before anything its next owner writes there.
        """
        seq = self._running.get(request_id)
        if seq is not None:
            self._running.release(seq)
        else:
            self._waiting.remove(request_id)

    @property
    def has_suspects(self) -> bool:
        """Whether anybody here was in flight when a stage died, and has not been computed as far since."""
        return self._running.num_suspects > 0 or any(seq.num_deaths for seq in self._waiting)

    @property
    def has_work(self) -> bool:
        return len(self._waiting) > 0 or len(self._running) > 0

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self._running),
            running_tokens=sum(s.num_tokens for s in self._running),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.num_tokens,
            queued_tokens=self._waiting.num_tokens + self._running.num_prefill_tokens,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            preemptions=self._preemptions,
            prefix_queried_tokens=self._prefix_queried,
            prefix_hit_tokens=self._prefix_hits,
            proposed_tokens=Counter(self.speculation.proposed) if self.speculation is not None else Counter(),
            accepted_tokens=Counter(self.speculation.accepted) if self.speculation is not None else Counter(),
            host_hit_tokens=self._host_hits,
            blocks_evicted=self.blocks.num_evicted,
            host=self.blocks.host.stats() if self.blocks.host is not None else HostStats(),
        )

    def check(self) -> None:
        """Assert that the books are right: see `Running.check`."""
        self._running.check(self._waiting.accounts)

    # -- the step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next batch, or None if nothing can be computed before an `update`."""
        self.admitted = []
        self._waiting.unpark()
        self._make_way()
        decodes, chunks = self._choose()
        if not len(decodes) and not chunks:
            return None
        running = self._running
        drafts = self._draft(decodes, chunks) if self.speculation is not None else {}
        slots, counts = in_order(running, decodes, chunks)
        batch, unmasked = build_batch(
            self.epoch, self._next_step, running, slots, counts, self.blocks.block_size, drafts
        )
        self._awaited.expect(batch.step_id, unmasked)
        if len(decodes):
            self._cohorts.add(batch.step_id)
        sampled = places(counts >= running.num_left[slots]) if drafts else batch.sample_rows.astype(np.intp)
        running.advance(slots, counts, sampled, batch.step_id)
        sequences, stops = running.sequences[slots].tolist(), running.num_computed[slots]
        self._in_flight[batch.step_id] = Step(sequences, slots, running.serials[slots], stops, sampled, drafts)
        self._next_step += 1
        return batch

    def _draft(self, decodes: Slots, chunks: list[tuple[Sequence, int]]) -> dict[int, list[int]]:
        """How the decoding sequences of a step go on, as far as there is room in it."""
        assert self.speculation is not None
        room = self.max_num_batched_tokens - len(decodes) - sum(count for _, count in chunks)
        return self.speculation.draft(decodes, min(room, max(self.max_num_seqs, MOST_DECODES) - len(decodes)))

    def update(self, batch: Batch, output: StepOutput) -> list[TokenEvent]:
        """Take in the result of the oldest batch in flight; aborted sequences are skipped."""
        assert output.step_id == batch.step_id == min(self._in_flight), "results must come in order"
        step = self._in_flight.pop(batch.step_id)
        self._cohorts.discard(batch.step_id)
        events = self._results.take(batch, output, step)
        if self._running.num_suspects:
            self._reconsider(step)
        return events

    def copies(self) -> Copies | None:
        """What stages are to copy between the last batch and the next one."""
        host = self.blocks.host
        return host.order(self.epoch, self.blocks) if host is not None else None

    def copied(self, done: Copied) -> bool:
        """Take in that a stage has copied, and whether all have: who waited for it goes on with the next batch."""
        loads = self.blocks.host.take(done) if self.blocks.host is not None and done.epoch == self.epoch else None
        for load, num_good in loads or ():
            self._host_hits += self._running.loaded(load, num_good)
        return loads is not None

    def observe_copies(self, num_blocks: int, seconds: float) -> None:
        """So long it took until so many blocks had come from host memory."""
        if self.blocks.host is not None and num_blocks:
            self.blocks.host.copying.add(num_blocks, seconds)

    def observe_step(self, batch: Batch, seconds: float) -> None:
        """So long a step took: what it would take to compute what could be copied."""
        if self.blocks.host is not None and (tokens := int(batch.query_lens[batch.query_lens > 1].sum())):
            self.blocks.host.computing.add(tokens, seconds)

    def forget_cache(self) -> None:
        """Nothing that is cached now is found any more. Who runs goes on with it."""
        self.blocks.forget()
        if self.blocks.host is not None:
            self.blocks.host.forget()

    def _reconsider(self, step: Step) -> None:
        """Clear suspects that have lived through all that they were suspected for."""
        running = self._running
        for seq in step.sequences:
            lives = seq.is_running and seq.num_deaths and not running.num_in_flight[seq.slot]
            if lives and running.num_computed[seq.slot] >= seq.suspect_until:
                running.clear(seq)

    def restart(self, accuse: bool = True) -> list[TokenEvent]:
        """Everything in flight is lost and so is the KV cache: start over at the next epoch.

        No request is lost but one that kills stages. If `accuse`, the death is held against whoever was in flight,
        until all that was scheduled of it by then is computed once more. After one death a sequence shares no batch
        with others, which go on in batches of theirs; after two it has the pipeline to itself; with the third it is
        guilty, for nothing else was in flight, and fails: its last event is returned. So three deaths find one request
        among any number; what has another cause must happen three times around the same one to be blamed on it.
        """
        accused: Counter[str] = Counter()  # how far each came, preempted ones too
        for step in self._in_flight.values() if accuse else ():
            for seq, stop in zip(step.sequences, step.stops.tolist(), strict=True):
                accused[seq.request_id] = max(accused[seq.request_id], stop)
        self._in_flight.clear()
        self._cohorts.clear()
        self._awaited.clear()
        for seq in sorted(self._running, key=lambda s: -s.arrival):
            self._preempt(seq)
        if self.blocks.host is not None:
            for load in self.blocks.host.forget_orders():
                self.blocks.let_go(load.blocks)
        self.blocks.forget()
        self.adapters.forget()
        self.epoch += 1
        self._next_step = 0
        for seq in self._waiting:
            if seq.request_id in accused:
                seq.num_deaths = max(seq.num_deaths, min(seq.request.deaths, 1)) + 1
                seq.suspect_until = max(seq.suspect_until, accused[seq.request_id])
        guilty = [seq.request_id for seq in self._waiting if seq.num_deaths >= GUILTY]
        return [event for name in guilty for event in self.fail(name, FATAL, is_fatal=True)]

    def fail(self, request_id: str, error: str, is_fatal: bool = False) -> list[TokenEvent]:
        """End one request with an error: its last event, or none if it is not here (any more)."""
        if self._running.get(request_id) is None and self._waiting.get(request_id) is None:
            return []
        self.abort(request_id)
        return [TokenEvent(request_id, NO_TOKEN, "error", error=error, is_fatal=is_fatal)]

    def next_masks(self) -> LateMasks | None:
        """What the oldest batch that was sent without its masks lacks, once all of it is known; each only once."""
        return self._awaited.take(self.epoch)

    def missing_masks(self, step_id: int) -> int:
        """How many masks this batch in flight still lacks."""
        return len(self._awaited.missing(step_id))

    def give_up_masks(self, step_id: int) -> None:
        """This batch has waited long enough: whose mask it lacks starts again, and no batch waits for it any more."""
        for seq in self._awaited.missing(step_id):
            assert seq.matcher is not None
            seq.matcher.seconds = math.inf
            self._preempt(seq)

    # -- choosing ---------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[Slots, list[tuple[Sequence, int]]]:
        """Who decodes, and whose prompts are computed. Suspects have every other step, each for itself."""
        if any(step.sequences[0].num_deaths > 1 for step in self._in_flight.values()):
            return NOBODY, []  # it has the pipeline to itself
        suspects = self._running.apart()
        twice = [seq for seq in suspects if seq.num_deaths > 1 and seq.mask is not None]
        if twice and self._in_flight:  # the pipeline runs dry for it
            return NOBODY, []
        if twice and (chunks := self._schedule_apart(twice)):
            return NOBODY, chunks
        if suspects and self._next_step % 2 and (chunks := self._schedule_apart(suspects)):
            return NOBODY, chunks
        decodes = self._schedule_decodes(self._next_step - self.depth)
        chunks = self._schedule_prefills(len(decodes))
        if not len(decodes) and not chunks:  # there is nothing else that the first stage could do meanwhile
            decodes = self._schedule_decodes(self._next_step - 1)
        if not len(decodes) and not chunks:
            admitted = self._running.apart()
            chunks = self._schedule_apart([s for s in admitted if s.num_deaths == 1 or not self._in_flight])
        return decodes, chunks

    def _schedule_apart(self, suspects: list[Sequence]) -> list[tuple[Sequence, int]]:
        """The next tokens of the first suspect that can have some now."""
        running = self._running
        for seq in suspects:
            if not seq.is_running or running.num_pending[seq.slot] or seq.mask is None:
                continue  # it made room for another one, or waits for its token or its mask
            if self._make_room(seq, None, set()):
                count = min(int(running.num_left[seq.slot]), self.max_num_batched_tokens)
                seq.charge(int(running.num_computed[seq.slot]), count)
                return [(seq, count)]
        return []

    def _schedule_decodes(self, latest: int) -> Slots:
        """Up to this batch's share of the decoding sequences, least recently scheduled first.

        None whose newest token is sampled by a step after `latest` and not known yet.
        """
        running = self._running
        if not len(slots := running.decoding()) or self._is_full(slots):
            return NOBODY
        share = min(-(-len(slots) // self.depth), self.max_num_batched_tokens)
        pending, last_step = running.num_pending[slots], running.last_step[slots]
        # As many as may be ahead of what is known are, or the last one is.
        can = (pending < MAX_PENDING_TOKENS) & (running.num_computed[slots] < running.max_computed[slots])
        ahead = last_step <= latest
        if running.drafts:
            ahead &= ~running.is_drafted[slots]
        can &= (pending == 0) | ahead
        slots = slots[can]
        slots = slots[last_step[can].argsort(kind="stable")]
        first = slots[:share]
        grows = first[running.num_computed[first] % self.blocks.block_size == 0]  # only there may a block end
        if running.num_constrained or len(grows) > self.blocks.num_free:
            first = self._one_by_one(slots.tolist(), share)
        else:
            running.grow_all(grows)
        self._charge_decodes(first)
        return first

    def _is_full(self, slots: Slots) -> bool:
        """Whether as many cohorts as there may be are on their way: one is sampled while others are computed.

        Who is drafted waits for what is sampled, and so do the others: in two cohorts each step would read all weights
        for half of them.
        """
        is_drafted = self._running.drafts and self._running.is_drafted[slots].any()
        return len(self._cohorts) > self.depth - bool(is_drafted)

    def _one_by_one(self, slots: list[int], share: int) -> Slots:
        """The first of these that have their masks, or soon will, and for which there is or can be made room."""
        running, seconds_left = self._running, MASK_SECONDS
        victims: list[Sequence] | None = None
        chosen: dict[Sequence, int] = {}
        for slot in slots:
            if len(chosen) == share:
                break
            seq = running.sequences[slot]
            if seq is None:  # it was preempted just now
                continue
            seconds = 0.0
            if seq.matcher is not None and (running.num_pending[slot] or not seq.matcher.ready):
                seconds = seq.matcher.seconds
            if seconds > seconds_left:
                continue
            if not running.grow(seq):
                if victims is None:  # sorted once: a cache that is full for one is full for many
                    victims = sorted(running.idle(), key=self._fairness.expendable)
                if not self._make_room(seq, victims, chosen.keys()):
                    continue
            seconds_left -= seconds
            chosen[seq] = slot
        return np.array([*chosen.values()], np.intp)

    def _charge_decodes(self, slots: Slots) -> None:
        """A token of each, those of a tenant at once."""
        running = self._running
        computed = running.num_computed[slots]
        others = computed < running.charged_from[slots]
        if others.any():
            for slot, start in zip(slots[others].tolist(), computed[others].tolist(), strict=True):
                running.sequences[slot].charge(start, 1)
            slots = slots[~others]
        if len(slots) and (account := running.sequences[slots[0]].account).num_running == len(running):
            account.charge(0, len(slots))  # there is no other tenant
        else:
            for account, count in Counter(seq.account for seq in running.sequences[slots]).items():
                account.charge(0, count)

    def _schedule_prefills(self, num_decodes: int) -> list[tuple[Sequence, int]]:
        """Prompt chunks beside so many decodes: what runs or could, spread over several turns of the pipeline."""
        running = self._running
        if num_decodes == len(running) and not len(self._waiting):
            return []
        prefilling = running.prefilling()
        chunks: list[tuple[Sequence, int]] = []
        left = int(running.num_left[[seq.slot for seq in prefilling]].sum()) + self._admissible_tokens()
        share = -(-left // (PREFILL_TURNS * self.depth if self.depth > 1 else 1))
        budget = max(share, MIN_STEP_TOKENS - len(running), MIN_PREFILL_CHUNK)
        budget = min(budget, self.max_num_batched_tokens - num_decodes)
        while budget > 0 and (seq := self._next_prefill(prefilling)) is not None:
            # Without a mask there is no next token yet: the last one before it is left to a batch of its own.
            count = min(int(running.num_left[seq.slot]) - (seq.mask is None), budget)
            if count > 0:
                seq.charge(int(running.num_computed[seq.slot]), count)
                chunks.append((seq, count))
                budget -= count
        return chunks

    def _admissible_tokens(self) -> int:
        """About how many tokens wait that there are slots and blocks for."""
        tokens, count = self._waiting.num_tokens, len(self._waiting)
        if not count:
            return 0
        by_slots = tokens * min(self._running.num_free_slots, count) // count
        free = self.blocks.num_free - len(self._running)
        return max(0, min(by_slots, free * self.blocks.block_size))

    def _next_prefill(self, prefilling: list[Sequence]) -> Sequence | None:
        """Whose prompt is computed next: one of `prefilling`, which it leaves, or one that is admitted for it."""
        while (head := self._waiting.next()) is not None and self._fairness.first_of([head, *prefilling]) is head:
            if not self._running.vacancy_for(head).fits:
                break
            self._admit(head)
            if not head.num_deaths and not self._running.is_loading[head.slot]:
                return head
        seq = self._fairness.first_of(prefilling)
        if seq is not None:
            prefilling.remove(seq)
        return seq

    def _admit(self, seq: Sequence) -> None:
        """Let a waiting sequence run that there is a vacancy for."""
        self._waiting.serve(seq)
        self._running.admit(seq)
        self._prefix_queried += seq.num_tokens
        self._prefix_hits += int(self._running.num_computed[seq.slot])
        self.admitted.append(seq.request_id)

    def _make_way(self) -> None:
        """Admit who is next at the cost of those that hold more or are less urgent; others wait for free room."""
        while (seq := self._waiting.next()) is not None:
            vacancy = self._running.vacancy_for(seq)
            victims = self._fairness.victims(seq, vacancy, self._running, self._waiting.accounts)
            if not victims:
                return  # it has to wait, or is admitted with its first chunk
            for victim in victims:
                self._preempt(victim)
            self._admit(seq)

    def _make_room(self, seq: Sequence, victims: list[Sequence] | None, chosen: Set[Sequence]) -> bool:
        """Preempt the youngest of `victims` (None: of all) that are not `chosen`, until `seq` can have a token more.

        False if `seq` itself had to go, or if every other sequence is in flight and the next `update` must come first.
        """
        while not self._running.grow(seq):
            if victims is None:
                victims = sorted(self._running.idle(), key=self._fairness.expendable)
            while victims and (victims[-1] in chosen or not victims[-1].is_running):
                victims.pop()
            if not victims or (victims[-1] is seq and len(self._running) > len(victims)):
                return False  # others will finish or become idle: wait rather than throw work away
            victim = victims.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Free the blocks and queue it again: the tokens are kept, their KV is computed again."""
        running, slot = self._running, seq.slot
        paid = int(running.num_computed[slot] - running.num_drafted[slot])
        paid = paid if running.last_step[slot] >= 0 else 0  # not what only the prefix cache gave it
        running.release(seq)
        self._waiting.push(seq.again(paid))
        self._preemptions += 1

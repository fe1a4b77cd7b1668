"""Which tokens the next batch computes. Pure bookkeeping: no clock, no thread, no Ray, no tensors.

Micro-batches need no name here: a batch takes the sequences that were scheduled longest ago, at most its share of them,
so successive calls of `schedule` form the cohorts that fill the pipeline by themselves. One cohort more than there are
stages is in flight: its tokens are still being sampled when it is scheduled, and the first stage begins with it the
moment they are. Prompts are spread over batches by what waits.

Tenants share fairly: what waits is taken in the order of waiting_queue.py, and whoever is next there but finds no room
gets it from the tenant that holds more, up to an equal share.
"""

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from cluster.awaited_masks import AwaitedMasks, Unmasked
from cluster.block_manager import BlockManager
from cluster.errors import RequestRejected
from cluster.sequence import NO_TOKEN, Matcher, Request, Sequence, TokenEvent
from cluster.waiting_queue import WaitingQueue
from model.batch import SAMPLED, Batch, LateMasks, Penalties, PromptRow, SampleRow, StepOutput, TokenLogprobs, uniform

MASK_SECONDS = 0.03  # a batch starts without masks that take threads no longer altogether: while it is computed
MIN_PREFILL_CHUNK = 64  # smaller chunks cost a pass over the weights for too few tokens


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot for metrics, routing and autoscaling."""

    running: int
    running_tokens: int  # prompt and output tokens of running requests
    waiting: int
    waiting_tokens: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int  # since the start
    prefix_queried_tokens: int  # since the start
    prefix_hit_tokens: int  # since the start


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
    ) -> None:
        self.blocks = blocks
        self.depth = depth  # number of stages: as many cohorts keep the pipeline full
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = min(max_model_len, blocks.num_blocks * blocks.block_size)
        self.epoch = 0
        self.admitted: list[str] = []  # requests that left the waiting queue in the last `schedule`
        self._waiting = WaitingQueue(max_num_seqs, blocks.num_blocks, slack=max_num_batched_tokens)
        self._running: OrderedDict[str, Sequence] = OrderedDict()  # least recently scheduled first
        self._in_flight: dict[int, list[Sequence]] = {}  # step id -> the batch's sequences
        self._cohorts: set[int] = set()  # step ids in flight that decode
        self._awaited = AwaitedMasks(self._is_running)
        self._priorities: Counter[int] = Counter()  # of running sequences
        self._slots = list(range(max_num_seqs))  # free ones
        # Block tables as batches carry them, one row per slot: kept up to date rather than made anew for every batch.
        self._tables = np.zeros((max_num_seqs, blocks.blocks_for(self.max_model_len)), np.int32)
        self._next_step = 0
        self._arrivals = 0
        self._preemptions = self._prefix_queried = self._prefix_hits = 0

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

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request, with a matcher if it has a constraint. Raises `RequestRejected` as `validate` does."""
        self.validate(request)
        self._waiting.push(Sequence(request, self._arrivals, matcher))
        self._arrivals += 1

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks; unknown ids are ignored, for it may just have finished.

        Safe while in flight: stages work in order, so what the running step still writes to a freed block comes
        before anything its next owner writes there.
        """
        seq = self._running.get(request_id)
        if seq is not None:
            self._release(seq)
        else:
            self._waiting.remove(request_id)

    @property
    def has_work(self) -> bool:
        return len(self._waiting) > 0 or len(self._running) > 0

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self._running),
            running_tokens=sum(s.num_tokens for s in self._running.values()),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.num_tokens,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            preemptions=self._preemptions,
            prefix_queried_tokens=self._prefix_queried,
            prefix_hit_tokens=self._prefix_hits,
        )

    def check(self) -> None:
        """Assert that the books are right: see `BlockManager.check`."""
        self.blocks.check(list(self._running.values()))
        taken = [seq.slot for seq in self._running.values()]
        assert sorted(taken + self._slots) == list(range(self.max_num_seqs)), "a slot is lost or shared"
        for account in self._waiting.accounts:
            own = [seq for seq in self._running.values() if self._waiting.account(seq) is account]
            held = sum(len(seq.block_table) for seq in own)
            assert (account.num_running, account.num_blocks) == (len(own), held), f"{account.tenant}'s books are wrong"

    # -- the step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next batch, or None if nothing can be computed before an `update`."""
        scheduled: list[tuple[Sequence, int]] = []
        self.admitted = []
        self._make_way()
        self._schedule_decodes(scheduled)
        num_decodes = len(scheduled)
        self._schedule_prefills(scheduled)
        if not scheduled:
            return None
        scheduled.sort(key=_place)
        batch = self._build(scheduled)
        if num_decodes:
            self._cohorts.add(batch.step_id)
        for row in batch.sample_rows.tolist():
            seq, _ = scheduled[row]
            seq.num_pending_tokens += 1
            seq.sampled_by = batch.step_id
        for seq, count in scheduled:
            seq.num_computed_tokens += count
            seq.num_in_flight += 1
            self._running.move_to_end(seq.request_id)
        self._in_flight[batch.step_id] = [seq for seq, _ in scheduled]
        if self.blocks.prefix_caching:
            for seq, _ in scheduled:
                self.blocks.mark_computed(seq)
        self._next_step += 1
        return batch

    def update(self, batch: Batch, output: StepOutput) -> list[TokenEvent]:
        """Take in the result of the oldest batch in flight; aborted sequences are skipped."""
        assert output.step_id == batch.step_id == min(self._in_flight), "results must come in order"
        sequences = self._in_flight.pop(batch.step_id)
        self._cohorts.discard(batch.step_id)
        for seq in sequences:
            seq.num_in_flight -= 1
        self._take_prompt_logprobs(batch, output, sequences)
        advanced: list[tuple[Matcher, int]] = []
        events: list[TokenEvent] = []
        for i, (row, token_id) in enumerate(zip(batch.sample_rows.tolist(), output.token_ids, strict=True)):
            seq = sequences[row]
            seq.num_pending_tokens -= 1
            if not self._is_running(seq):
                continue
            seq.failure = seq.failure or (seq.matcher and seq.matcher.failure) or output.errors.get(i)
            if seq.failure is None:
                events.append(self._take_token(seq, token_id, output.logprobs.get(i)))
                if seq.matcher is not None and events[-1].finish_reason is None:
                    advanced.append((seq.matcher, token_id))
            else:
                self._release(seq)
                events.append(TokenEvent(seq.request_id, NO_TOKEN, "error", error=seq.failure))
        for matcher, token_id in advanced:  # in a row: their masks shall be ready together
            matcher.advance(token_id)
        return events

    def _take_prompt_logprobs(self, batch: Batch, output: StepOutput, sequences: list[Sequence]) -> None:
        """They are kept until the whole prompt's are there, and leave with the first token."""
        for row, found in zip(batch.prompt_rows, output.prompt_logprobs, strict=True):
            seq = sequences[row.row]
            if seq.prompt_logprobs is None or not self._is_running(seq):
                continue
            if found is None:
                seq.failure = "its prompt's logprobs could not be computed"
            else:
                seq.prompt_logprobs += found

    def _take_token(self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        cached = seq.num_cached_tokens if seq.num_output_tokens == len(seq.request.output_ids) else 0
        finish_reason = seq.append(token_id)
        if finish_reason is not None:
            self._release(seq)
        prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, None
        chosen, top = (None, None) if logprobs is None else (logprobs.chosen, logprobs.top)
        return TokenEvent(seq.request_id, token_id, finish_reason, chosen, top, cached, prompt_logprobs)

    def restart(self) -> None:
        """Everything in flight is lost and so is the KV cache: start over at the next epoch, losing no request."""
        self._in_flight.clear()
        self._cohorts.clear()
        self._awaited.clear()
        for seq in sorted(self._running.values(), key=lambda s: -s.arrival):
            self._preempt(seq)
        self.blocks.forget()
        self.epoch += 1
        self._next_step = 0

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

    def _schedule_decodes(self, scheduled: list[tuple[Sequence, int]]) -> None:
        """Up to this batch's share of the decoding sequences, least recently scheduled first."""
        if len(self._cohorts) > self.depth:
            return
        decoding = [s for s in self._running.values() if s.is_decoding]
        mask_seconds = MASK_SECONDS
        share = min(-(-len(decoding) // self.depth), self.max_num_batched_tokens)
        block_size = self.blocks.block_size
        victims: list[Sequence] | None = None
        chosen: set[int] = set()
        for seq in decoding:
            if len(scheduled) == share:
                break
            if not seq.may_decode or not seq.block_table:  # no blocks: it was preempted just now
                continue
            if (missing := _missing_mask_seconds(seq)) > mask_seconds:
                continue
            if seq.num_computed_tokens == len(seq.block_table) * block_size:  # its blocks are full
                if not self.blocks.can_grow(seq, seq.num_computed_tokens + 1):
                    if victims is None:  # sorted once: a cache that is full for one is full for many
                        idle = (s for s in self._running.values() if s.num_in_flight == 0)
                        victims = sorted(idle, key=self._expendable)
                    if not self._make_room(seq, victims, chosen):
                        continue
                self._grow(seq)
            mask_seconds -= missing
            self._waiting.account(seq).charge(seq, 1)
            scheduled.append((seq, 1))
            chosen.add(id(seq))

    def _schedule_prefills(self, scheduled: list[tuple[Sequence, int]]) -> None:
        """Prompt chunks: what waits, spread over the cohorts, within what the budget leaves."""
        prefilling = [s for s in self._running.values() if s.num_uncomputed_tokens > 1]
        waiting = sum(s.num_uncomputed_tokens for s in prefilling) + self._waiting.num_tokens
        budget = min(self.max_num_batched_tokens - len(scheduled), max(MIN_PREFILL_CHUNK, -(-waiting // self.depth)))
        while budget > 0 and (seq := self._next_prefill(prefilling)) is not None:
            # Without a mask there is no next token yet: the last one before it is left to a batch of its own.
            count = min(seq.num_uncomputed_tokens - (seq.mask is None), budget)
            if count > 0:
                self._waiting.account(seq).charge(seq, count)
                scheduled.append((seq, count))
                budget -= count

    def _next_prefill(self, prefilling: list[Sequence]) -> Sequence | None:
        """Whose prompt is computed next: one of `prefilling`, which it leaves, or one that is admitted for it."""
        head = self._waiting.next()
        if head is not None and self._waiting.first_of([head, *prefilling]) is head and self._admit(head):
            return head
        seq = self._waiting.first_of(prefilling)
        if seq is not None:
            prefilling.remove(seq)
        return seq

    def _admit(self, seq: Sequence) -> bool:
        """Let a waiting sequence run, with blocks for all it knows now; False if there is no room."""
        prefix = self._room_for(seq)
        if prefix is None:
            return False
        self._waiting.remove(seq.request_id)
        self.blocks.allocate(seq, prefix, seq.num_tokens)
        account = self._waiting.account(seq)
        account.num_running += 1
        account.num_blocks += len(seq.block_table)
        self._priorities[seq.request.priority] += 1
        seq.slot = self._slots.pop()
        self._tables[seq.slot, : len(seq.block_table)] = seq.block_table
        seq.num_computed_tokens = len(prefix) * self.blocks.block_size
        if seq.num_output_tokens == len(seq.request.output_ids):
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
        self._prefix_queried += seq.num_tokens
        self._prefix_hits += seq.num_computed_tokens
        self._running[seq.request_id] = seq
        self.admitted.append(seq.request_id)
        return True

    def _room_for(self, seq: Sequence) -> list[int] | None:
        """The blocks that hold the beginning of a waiting sequence already, if it may run now; None if not."""
        if not self._slots:
            return None
        # Whose logprobs are wanted must be computed, even if its keys and values are there.
        prefix = self.blocks.cached_prefix(seq.token_ids) if seq.prompt_logprobs is None else []
        # Room is left for one block more of everybody who runs, or what is admitted now is preempted soon.
        headroom = len(self._running) * self.blocks.block_size
        return prefix if self.blocks.can_allocate(prefix, seq.num_tokens + headroom) else None

    def _make_way(self) -> None:
        """Admit who is next at the cost of those that hold more or are less urgent; others wait for free room."""
        while (seq := self._waiting.next()) is not None and self._may_displace(seq):
            displaced = 0
            while self._room_for(seq) is None:
                victim = self._victim_for(seq)
                if victim is None:
                    return
                self._preempt(victim)
                displaced += 1
            if not displaced:
                return  # it is admitted with its first chunk
            self._admit(seq)

    def _may_displace(self, seq: Sequence) -> bool:
        """Whether anybody runs who could have to make way: a quick look that ends the matter with a single tenant."""
        return max(self._priorities, default=0) > seq.request.priority or (
            self._waiting.account(seq).num_running < len(self._running)
        )

    def _victim_for(self, seq: Sequence) -> Sequence | None:
        """Who is to make way for `seq`, or None if it has to wait.

        That is who is less urgent; among equals, the youngest of the tenant that holds most, as long as `seq`'s tenant
        stays within its fair share and has not had more service. It may be in flight: what comes of that is dropped.
        """
        queue, worst = self._waiting, max(self._priorities)
        candidates = (s for s in self._running.values() if s.request.priority == worst)
        if worst <= seq.request.priority:
            account, active = queue.account(seq), [a for a in queue.accounts if a.num_running or a.waiting]
            other = max(active, key=queue.share)
            share = queue.share(account, 1, self.blocks.blocks_for(seq.num_tokens))
            due = share <= 1 / sum(a.weight for a in active) and share < queue.share(other)
            if worst < seq.request.priority or not due or account.counter > other.counter + queue.slack:
                return None
            candidates = (s for s in candidates if queue.account(s) is other)
        return max(candidates, key=self._expendable, default=None)

    def _expendable(self, seq: Sequence) -> tuple[int, float, int]:
        """Who is preempted first: the least urgent, of the tenant that holds most, that arrived last."""
        return seq.request.priority, self._waiting.share(self._waiting.account(seq)), seq.arrival

    def _make_room(self, seq: Sequence, victims: list[Sequence], chosen: set[int]) -> bool:
        """Preempt the youngest of `victims` that are not `chosen`, until `seq` can have one token more.

        False if `seq` itself had to go, or if every other sequence is in flight and the next `update` must come first.
        """
        while not self.blocks.can_grow(seq, seq.num_computed_tokens + 1):
            while victims and (id(victims[-1]) in chosen or not victims[-1].block_table):
                victims.pop()
            if not victims or (victims[-1] is seq and len(self._running) > len(victims)):
                return False  # others will finish or become idle: wait rather than throw work away
            victim = victims.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _grow(self, seq: Sequence) -> None:
        """Blocks for one token more."""
        before = len(seq.block_table)
        self.blocks.grow(seq, seq.num_computed_tokens + 1)
        if len(seq.block_table) > before:
            self._waiting.account(seq).num_blocks += len(seq.block_table) - before
            self._tables[seq.slot, before : len(seq.block_table)] = seq.block_table[before:]

    def _preempt(self, seq: Sequence) -> None:
        """Free the blocks and queue it again: the tokens are kept, their KV is computed again."""
        self._release(seq)
        self._waiting.push(seq.again())
        self._preemptions += 1

    def _is_running(self, seq: Sequence) -> bool:
        """Whether it runs still: a sequence that was preempted goes on as another one."""
        return self._running.get(seq.request_id) is seq

    def _release(self, seq: Sequence) -> None:
        """Take back what a running sequence holds.

        A batch in flight may still write to it, but stages work in order: before anything its next owner writes.
        """
        del self._running[seq.request_id]
        account = self._waiting.account(seq)
        account.num_running -= 1
        account.num_blocks -= len(seq.block_table)
        self._priorities[seq.request.priority] -= 1
        self._priorities += Counter()  # forgets what is at zero
        self.blocks.free(seq)
        self._slots.append(seq.slot)
        seq.slot = -1

    # -- the message ------------------------------------------------------------------------------------------------

    def _build(self, scheduled: list[tuple[Sequence, int]]) -> Batch:
        token_ids: list[int] = []
        sample_rows: list[int] = []
        draws: list[SampleRow] = []
        prompt_rows: list[PromptRow] = []
        unmasked: list[Unmasked] = []
        tokens_from = -1
        for row, (seq, count) in enumerate(scheduled):
            start = seq.num_computed_tokens
            if start < len(seq.token_ids):
                token_ids += seq.token_ids[start : start + count]
            else:
                token_ids.append(SAMPLED)
                tokens_from = max(tokens_from, seq.sampled_by)
            if count == seq.num_uncomputed_tokens:
                if not seq.is_greedy:
                    draws.append(_sample_row(len(sample_rows), seq))
                    if draws[-1].awaits_mask:
                        unmasked.append(Unmasked(len(sample_rows), seq, seq.num_tokens + seq.num_pending_tokens))
                sample_rows.append(row)
            if seq.prompt_logprobs is not None and start < seq.num_prompt_tokens:
                prompt_rows.append(_prompt_row(row, seq, start + count))
        self._awaited.expect(self._next_step, unmasked)
        width = max(len(seq.block_table) for seq, _ in scheduled)
        slots = np.array([seq.slot for seq, _ in scheduled], np.int32)
        return Batch(
            epoch=self.epoch,
            step_id=self._next_step,
            token_ids=np.array(token_ids, np.int32),
            query_lens=np.array([count for _, count in scheduled], np.int32),
            num_computed_tokens=np.array([seq.num_computed_tokens for seq, _ in scheduled], np.int32),
            block_tables=self._tables[slots, :width].reshape(-1),
            slots=slots,
            tokens_from=tokens_from,
            sample_rows=np.array(sample_rows, np.int32),
            draws=draws,
            prompt_rows=prompt_rows,
        )


def _missing_mask_seconds(seq: Sequence) -> float:
    """What it takes to make the mask of its next token, if that is not known yet."""
    return seq.matcher.seconds if seq.matcher is not None and seq.mask is None else 0.0


def _prompt_row(row: int, seq: Sequence, stop: int) -> PromptRow:
    """Of a chunk that ends before token `stop`."""
    wanted = seq.request.sampling.prompt_logprobs
    assert wanted is not None
    return PromptRow(row, seq.token_ids[stop] if stop < seq.num_prompt_tokens else SAMPLED, wanted)


def _place(item: tuple[Sequence, int]) -> int:
    """In the batch: single tokens first, as Batch promises, and of those the longest contexts, which take longest.

    A GPU starts blocks in this order: the last ones to start should not be the last ones to end.
    """
    seq, count = item
    return -seq.num_computed_tokens if count == 1 else 1


def _sample_row(row: int, seq: Sequence) -> SampleRow:
    p, mask = seq.request.sampling, seq.mask  # read once: another thread makes it
    penalties = (
        Penalties(p.repetition_penalty, p.presence_penalty, p.frequency_penalty, seq.output_counts)
        if p.needs_counts
        else None
    )
    return SampleRow(
        row=row,
        uniform=uniform(p.seed, seq.num_tokens + seq.num_pending_tokens) if p.temperature > 0 else 0.0,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        logprobs=-1 if p.logprobs is None else p.logprobs,
        logit_bias=p.logit_bias or None,
        penalties=penalties,
        banned=p.stop_token_ids if seq.num_output_tokens + seq.num_pending_tokens < p.min_tokens else (),
        mask=mask or b"",
        awaits_mask=mask is None,
    )

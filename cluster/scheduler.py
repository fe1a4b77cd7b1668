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
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from cluster.account import Account
from cluster.awaited_masks import AwaitedMasks, Unmasked
from cluster.block_manager import BlockManager
from cluster.errors import RequestRejected
from cluster.sequence import NO_TOKEN, Matcher, Request, Sequence, TokenEvent
from cluster.waiting_queue import Policy, WaitingQueue
from model.batch import SAMPLED, Batch, LateMasks, Penalties, PromptRow, SampleRow, StepOutput, TokenLogprobs, uniform

MASK_SECONDS = 0.03  # a batch starts without masks that take threads no longer altogether: while it is computed
MIN_STEP_TOKENS = 256  # while few run: a smaller step takes nearly as long, for it reads the same weights
MIN_PREFILL_CHUNK = 64
PREFILL_TURNS = 4  # of the pipeline, that prompts are spread over: fewer make steps less equal, more delay first tokens


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
        policy: Policy = "fcfs",
    ) -> None:
        self.blocks = blocks
        self.depth = depth  # number of stages: as many cohorts keep the pipeline full
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = min(max_model_len, blocks.num_blocks * blocks.block_size)
        self.epoch = 0
        self.admitted: list[str] = []  # requests that left the waiting queue in the last `schedule`
        self._waiting = WaitingQueue(max_num_seqs, blocks.num_blocks, slack=max_num_batched_tokens, policy=policy)
        self._running: dict[str, Sequence] = {}  # least recently scheduled first
        self._in_flight: dict[int, list[Sequence]] = {}  # step id -> the batch's sequences
        self._cohorts: set[int] = set()  # step ids in flight that decode
        self._awaited = AwaitedMasks()
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
        self._waiting.add(Sequence(request, self._arrivals, matcher))
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
        for seq in [*self._running.values(), *self._waiting]:
            seq.check()
        taken = [seq.slot for seq in self._running.values()]
        assert sorted(taken + self._slots) == list(range(self.max_num_seqs)), "a slot is lost or shared"
        for account in self._waiting.accounts:
            own = [seq for seq in self._running.values() if seq.account is account]
            held = sum(len(seq.block_table) for seq in own)
            assert (account.num_running, account.num_blocks) == (len(own), held), f"{account.tenant}'s books are wrong"

    # -- the step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """The next batch, or None if nothing can be computed before an `update`."""
        self.admitted = []
        self._make_way()
        decodes = self._schedule_decodes(self._next_step - self.depth)
        chunks = self._schedule_prefills(len(decodes))
        if not decodes and not chunks:  # there is nothing else that the first stage could do meanwhile
            decodes = self._schedule_decodes(self._next_step - 1)
        if not decodes and not chunks:
            return None
        sequences, counts = _placed(decodes, chunks)
        batch = self._build(sequences, counts)
        if decodes:
            self._cohorts.add(batch.step_id)
        self._in_flight[batch.step_id] = sequences
        self._advance(sequences, counts)
        self._next_step += 1
        return batch

    def _advance(self, sequences: list[Sequence], counts: list[int]) -> None:
        """What the next batch computes counts as computed from now on."""
        step_id, running = self._next_step, self._running
        caching, block_size = self.blocks.prefix_caching, self.blocks.block_size
        for seq, count in zip(sequences, counts, strict=True):
            seq.num_computed_tokens += count
            seq.num_in_flight += 1
            seq.last_step = step_id
            if count == seq.num_uncomputed_tokens:  # what follows is sampled
                seq.num_pending_tokens += 1
                seq.num_uncomputed_tokens = 1
            else:
                seq.num_uncomputed_tokens -= count
            running[seq.request_id] = running.pop(seq.request_id)  # it is the last one now
            if caching and seq.num_computed_tokens // block_size > seq.num_full_blocks:
                self.blocks.mark_computed(seq)

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
        errors, logprobs = output.errors, output.logprobs
        for i, (row, token_id) in enumerate(zip(batch.sample_rows.tolist(), output.token_ids, strict=True)):
            seq = sequences[row]
            seq.num_pending_tokens -= 1
            if seq.slot < 0:
                continue
            if errors or seq.matcher is not None:
                seq.failure = seq.failure or (seq.matcher and seq.matcher.failure) or errors.get(i)
            if seq.failure is None:
                events.append(self._take_token(seq, token_id, logprobs.get(i)))
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
            if seq.prompt_logprobs is None or not seq.is_running:
                continue
            if found is None:
                seq.failure = "its prompt's logprobs could not be computed"
            else:
                seq.prompt_logprobs += found

    def _take_token(self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        finish_reason = seq.append(token_id)
        if finish_reason is not None:
            self._release(seq)
        if logprobs is None and not seq.num_cached_tokens and seq.prompt_logprobs is None:
            return TokenEvent(seq.request_id, token_id, finish_reason)
        cached, seq.num_cached_tokens = seq.num_cached_tokens, 0  # they leave with the first token
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

    def _schedule_decodes(self, latest: int) -> list[Sequence]:
        """Up to this batch's share of the decoding sequences, least recently scheduled first.

        None whose newest token is sampled by a step after `latest` and not known yet.
        """
        if len(self._cohorts) > self.depth:
            return []
        running = self._running.values()
        decoding = [seq for seq in running if seq.num_uncomputed_tokens == 1 and seq.num_computed_tokens]
        mask_seconds, block_size = MASK_SECONDS, self.blocks.block_size
        share = min(-(-len(decoding) // self.depth), self.max_num_batched_tokens)
        victims: list[Sequence] | None = None
        chosen: list[Sequence] = []
        for seq in decoding:
            if len(chosen) == share:
                break
            if seq.num_pending_tokens >= seq.max_pending_tokens or seq.num_computed_tokens >= seq.max_computed_tokens:
                continue  # as many as may be ahead of what is known are, or the last one is
            if seq.slot < 0:  # it was preempted just now
                continue
            if seq.num_pending_tokens and seq.last_step > latest:
                continue
            missing = 0.0 if seq.matcher is None else _missing_mask_seconds(seq)
            if missing > mask_seconds:
                continue
            if seq.num_computed_tokens % block_size == 0 and not self._grow(seq):  # only where a block may end
                if victims is None:  # sorted once: a cache that is full for one is full for many
                    victims = sorted((s for s in running if s.num_in_flight == 0), key=self._expendable)
                if not self._make_room(seq, victims, chosen):
                    continue
            mask_seconds -= missing
            chosen.append(seq)
        _charge_decodes(chosen)
        return chosen

    def _schedule_prefills(self, num_decodes: int) -> list[tuple[Sequence, int]]:
        """Prompt chunks beside so many decodes: what runs or could, spread over several turns of the pipeline."""
        chunks: list[tuple[Sequence, int]] = []
        prefilling = [seq for seq in self._running.values() if seq.num_uncomputed_tokens > 1]
        left = sum(seq.num_uncomputed_tokens for seq in prefilling) + self._admissible_tokens()
        share = -(-left // (PREFILL_TURNS * self.depth if self.depth > 1 else 1))
        budget = max(share, MIN_STEP_TOKENS - len(self._running), MIN_PREFILL_CHUNK)
        budget = min(budget, self.max_num_batched_tokens - num_decodes)
        while budget > 0 and (seq := self._next_prefill(prefilling)) is not None:
            # Without a mask there is no next token yet: the last one before it is left to a batch of its own.
            count = min(seq.num_uncomputed_tokens - (seq.mask is None), budget)
            if count > 0:
                seq.charge(count)
                chunks.append((seq, count))
                budget -= count
        return chunks

    def _admissible_tokens(self) -> int:
        """About how many tokens wait that there are slots and blocks for."""
        if not len(self._waiting):
            return 0
        by_slots = self._waiting.num_tokens * min(len(self._slots), len(self._waiting)) // len(self._waiting)
        free = self.blocks.num_free - len(self._running)
        return max(0, min(by_slots, free * self.blocks.block_size))

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
        account = seq.account
        account.num_running += 1
        account.num_blocks += len(seq.block_table)
        self._priorities[seq.request.priority] += 1
        seq.slot = self._slots.pop()
        self._tables[seq.slot, : len(seq.block_table)] = seq.block_table
        seq.num_computed_tokens = len(prefix) * self.blocks.block_size
        seq.num_uncomputed_tokens = seq.num_tokens - seq.num_computed_tokens
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
        return max(self._priorities, default=0) > seq.request.priority or (seq.account.num_running < len(self._running))

    def _victim_for(self, seq: Sequence) -> Sequence | None:
        """Who is to make way for `seq`, or None if it has to wait.

        That is who is less urgent; among equals, the youngest of the tenant that holds most, as long as `seq`'s tenant
        stays within its fair share and has not had more service. It may be in flight: what comes of that is dropped.
        """
        queue, worst = self._waiting, max(self._priorities)
        candidates = (s for s in self._running.values() if s.request.priority == worst)
        if worst <= seq.request.priority:
            account, active = seq.account, [a for a in queue.accounts if a.num_running or a.waiting]
            other = max(active, key=queue.share)
            share = queue.share(account, 1, self.blocks.blocks_for(seq.num_tokens))
            due = share <= 1 / sum(a.weight for a in active) and share < queue.share(other)
            if worst < seq.request.priority or not due or account.counter > other.counter + queue.slack:
                return None
            candidates = (s for s in candidates if s.account is other)
        return max(candidates, key=self._expendable, default=None)

    def _expendable(self, seq: Sequence) -> tuple[int, float, int]:
        """Who is preempted first: the least urgent, of the tenant that holds most, that arrived last."""
        return seq.request.priority, self._waiting.share(seq.account), seq.arrival

    def _make_room(self, seq: Sequence, victims: list[Sequence], chosen: list[Sequence]) -> bool:
        """Preempt the youngest of `victims` that are not `chosen`, until `seq` has blocks for one token more.

        False if `seq` itself had to go, or if every other sequence is in flight and the next `update` must come first.
        """
        while not self._grow(seq):
            while victims and (victims[-1] in chosen or not victims[-1].is_running):
                victims.pop()
            if not victims or (victims[-1] is seq and len(self._running) > len(victims)):
                return False  # others will finish or become idle: wait rather than throw work away
            victim = victims.pop()
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _grow(self, seq: Sequence) -> bool:
        """Blocks for one token more, if it needs any; False if there are none."""
        before, num_tokens = len(seq.block_table), seq.num_computed_tokens + 1
        if not self.blocks.can_grow(seq, num_tokens):
            return False
        self.blocks.grow(seq, num_tokens)
        seq.account.num_blocks += len(seq.block_table) - before
        self._tables[seq.slot, before : len(seq.block_table)] = seq.block_table[before:]
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Free the blocks and queue it again: the tokens are kept, their KV is computed again."""
        self._release(seq)
        self._waiting.push(seq.again())
        self._preemptions += 1

    def _release(self, seq: Sequence) -> None:
        """Take back what a running sequence holds.

        A batch in flight may still write to it, but stages work in order: before anything its next owner writes.
        """
        del self._running[seq.request_id]
        account = seq.account
        account.num_running -= 1
        account.num_blocks -= len(seq.block_table)
        self._priorities[seq.request.priority] -= 1
        self._priorities += Counter()  # forgets what is at zero
        self.blocks.free(seq)
        self._slots.append(seq.slot)
        seq.slot = -1

    # -- the message ------------------------------------------------------------------------------------------------

    def _build(self, sequences: list[Sequence], counts: list[int]) -> Batch:
        token_ids: list[int] = []
        sample_rows: list[int] = []
        draws: list[SampleRow] = []
        prompt_rows: list[PromptRow] = []
        unmasked: list[Unmasked] = []
        tokens_from = -1
        for row, (seq, count) in enumerate(zip(sequences, counts, strict=True)):
            start = seq.num_computed_tokens
            if seq.num_pending_tokens:
                token_ids.append(SAMPLED)
                if seq.last_step > tokens_from:
                    tokens_from = seq.last_step
            else:
                token_ids += seq.token_ids[start : start + count]
            if count == seq.num_uncomputed_tokens:
                if not seq.is_greedy:
                    draws.append(_sample_row(len(sample_rows), seq))
                    if draws[-1].awaits_mask:
                        unmasked.append(Unmasked(len(sample_rows), seq, seq.num_tokens + seq.num_pending_tokens))
                sample_rows.append(row)
            if seq.prompt_logprobs is not None and start < seq.num_prompt_tokens:
                prompt_rows.append(_prompt_row(row, seq, start + count))
        self._awaited.expect(self._next_step, unmasked)
        width = max([len(seq.block_table) for seq in sequences])
        slots = np.array([seq.slot for seq in sequences], np.int32)
        return Batch(
            epoch=self.epoch,
            step_id=self._next_step,
            token_ids=np.array(token_ids, np.int32),
            query_lens=np.array(counts, np.int32),
            num_computed_tokens=np.array([seq.num_computed_tokens for seq in sequences], np.int32),
            block_tables=self._tables[slots, :width].reshape(-1),
            slots=slots,
            tokens_from=tokens_from,
            sample_rows=np.array(sample_rows, np.int32),
            draws=draws,
            prompt_rows=prompt_rows,
        )


def _charge_decodes(decodes: list[Sequence]) -> None:
    """A token of each, those of a tenant at once."""
    outputs: dict[Account[Sequence], int] = {}
    for seq in decodes:
        if seq.num_computed_tokens < seq.num_prompt_tokens or seq.num_computed_tokens < seq.num_paid_tokens:
            seq.charge(1)
        else:
            outputs[seq.account] = outputs.get(seq.account, 0) + 1
    for account, count in outputs.items():
        account.charge(0, count)


def _missing_mask_seconds(seq: Sequence) -> float:
    """What it takes to make the mask of its next token, if that is not known yet."""
    return seq.matcher.seconds if seq.matcher is not None and seq.mask is None else 0.0


def _prompt_row(row: int, seq: Sequence, stop: int) -> PromptRow:
    """Of a chunk that ends before token `stop`."""
    wanted = seq.request.sampling.prompt_logprobs
    assert wanted is not None
    return PromptRow(row, seq.token_ids[stop] if stop < seq.num_prompt_tokens else SAMPLED, wanted)


def _placed(decodes: list[Sequence], chunks: list[tuple[Sequence, int]]) -> tuple[list[Sequence], list[int]]:
    """The batch's sequences and how many tokens of each: single ones first, as Batch promises.

    Of those the longest contexts come first, which take longest: a GPU starts blocks in this order, and the last ones
    to start should not be the last ones to end.
    """
    singles = decodes + [seq for seq, count in chunks if count == 1]
    singles.sort(key=attrgetter("num_computed_tokens"), reverse=True)
    others = [(seq, count) for seq, count in chunks if count > 1]
    return singles + [seq for seq, _ in others], [1] * len(singles) + [count for _, count in others]


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

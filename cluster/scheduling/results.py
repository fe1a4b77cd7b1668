"""What a step has brought: tokens for the sequences that were in it, and what is said of them."""

import numpy as np
from numpy.typing import NDArray

from cluster.scheduling.running import Running, Slots, places
from cluster.scheduling.sequence import NO_TOKEN, Matcher, Sequence, TokenEvent
from cluster.scheduling.speculation import Speculation
from cluster.scheduling.step import Step
from model.batch import Batch, StepOutput, TokenLogprobs


class Results:
    """Takes them in. Whose answer ends with a token no longer runs afterwards."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.speculation: Speculation | None = None

    def take(self, batch: Batch, output: StepOutput, step: Step) -> list[TokenEvent]:
        """Those of the oldest batch in flight; who has left meanwhile is skipped."""
        running = self._running
        live = running.serials[step.slots] == step.serials
        running.num_in_flight[step.slots[live]] -= 1
        slots, live = step.slots[step.sampled], live[step.sampled]
        running.num_pending[slots[live]] -= 1
        events = self._take_prompt_logprobs(batch, output, step) if batch.prompt_rows else []
        events += self._take_sampled(step, slots, live, output)
        if self.speculation is not None:
            self.speculation.look(slots[live])
        return events

    def _take_sampled(self, step: Step, slots: Slots, live: NDArray[np.bool_], output: StepOutput) -> list[TokenEvent]:
        sequences, token_ids = step.sampled_sequences, output.token_ids
        plain = live & self._running.is_plain[slots]
        if not (step.drafts or output.errors or output.logprobs) and plain.all():
            return self._take_plain(sequences, slots, token_ids)
        rows = step.first_rows()
        plain[rows.searchsorted([*output.errors, *output.logprobs], "right") - 1] = False
        plain &= ~np.isin(slots, list(step.drafts))
        few = places(plain)
        events = self._take_plain([sequences[i] for i in few], slots[few], [token_ids[rows[i]] for i in few])
        others = [(sequences[i], int(rows[i])) for i in places(live & ~plain)]
        return events + self._take_others(others, output, step.drafts)

    def _take_plain(self, sequences: list[Sequence], slots: Slots, token_ids: list[int]) -> list[TokenEvent]:
        """Tokens of sequences of which nothing else is to be taken in, and nothing else said."""
        running = self._running
        running.take(slots, np.array(token_ids, np.int32))
        for seq, token_id in zip(sequences, token_ids, strict=True):
            seq.token_ids.append(token_id)
        events = list(map(TokenEvent, [seq.request_id for seq in sequences], token_ids))
        may_end = places(running.num_known[slots] > running.max_computed[slots]).tolist()
        for i in {*may_end, *running.is_stop(token_ids)}:
            if (finish_reason := sequences[i].finish_reason) is not None:
                events[i] = TokenEvent(sequences[i].request_id, token_ids[i], finish_reason)
                running.release(sequences[i])
        return events

    def _take_others(
        self, few: list[tuple[Sequence, int]], output: StepOutput, drafts: dict[int, list[int]]
    ) -> list[TokenEvent]:
        """Tokens that come with more, need more, are none, or several: of these, from these rows on."""
        advanced: list[tuple[Matcher, int]] = []
        events: list[TokenEvent] = []
        for seq, row in few:
            num_right = self._judge(seq, row, output, draft) if (draft := drafts.get(seq.slot)) else 0
            for i in range(row, row + num_right + 1):
                seq.failure = seq.failure or (seq.matcher and seq.matcher.failure) or output.errors.get(i)
                if seq.failure is not None:
                    self._running.release(seq)
                    events.append(TokenEvent(seq.request_id, NO_TOKEN, "error", error=seq.failure))
                    break
                token_id = output.token_ids[i]
                events.append(self._take_token(seq, token_id, output.logprobs.get(i), i < row + num_right))
                if events[-1].finish_reason is not None:
                    break
                if seq.matcher is not None:
                    advanced.append((seq.matcher, token_id))
        for matcher, token_id in advanced:  # in a row: their masks shall be ready together
            matcher.advance(token_id)
        return events

    def _judge(self, seq: Sequence, row: int, output: StepOutput, draft: list[int]) -> int:
        """How many of the drafted tokens are what was drawn."""
        drawn = output.token_ids[row : row + len(draft)]
        right = (a == b and i not in output.errors for i, (a, b) in enumerate(zip(draft, drawn, strict=True), row))
        num_right = next((i for i, is_right in enumerate(right) if not is_right), len(draft))
        self._running.settle(seq, num_right)
        seq.charge(seq.num_tokens, num_right)
        assert self.speculation is not None
        self.speculation.judge(seq.slot, len(draft), num_right)
        return num_right

    def _take_token(
        self, seq: Sequence, token_id: int, logprobs: TokenLogprobs | None, was_drafted: bool = False
    ) -> TokenEvent:
        seq.token_ids.append(token_id)
        self._running.take(seq.slot, token_id)
        cached, seq.num_cached_tokens = seq.num_cached_tokens, 0  # they leave with the first token
        seq.prompt_logprobs = None
        self._running.is_plain[seq.slot] = seq.is_plain
        finish_reason = seq.finish_reason
        if finish_reason is not None:
            self._running.release(seq)
        chosen, top = (None, None) if logprobs is None else (logprobs.chosen, logprobs.top)
        return TokenEvent(seq.request_id, token_id, finish_reason, chosen, top, cached, was_drafted=was_drafted)

    def _take_prompt_logprobs(self, batch: Batch, output: StepOutput, step: Step) -> list[TokenEvent]:
        """Those of a chunk; what has gone out before a preemption, or from another engine, does not do so again."""
        events: list[TokenEvent] = []
        for row, found in zip(batch.prompt_rows, output.prompt_logprobs, strict=True):
            seq = step.sequences[row.row]
            if seq.prompt_logprobs is None or not seq.is_running:
                continue
            if found is None:
                seq.failure = "its prompt's logprobs could not be computed"
                continue
            start = int(step.stops[row.row]) - int(batch.query_lens[row.row])
            new = found[max(0, seq.prompt_logprobs - start) :]
            if new or not found:  # a prompt of one token has none, which is worth knowing
                seq.prompt_logprobs += len(new)
                events.append(TokenEvent(seq.request_id, NO_TOKEN, prompt_logprobs=new))
        return events

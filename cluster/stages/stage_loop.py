"""What a stage does from its start to its end: take orders, launch steps, pass on, report."""

import time
from collections import deque
from dataclasses import dataclass

import torch

from cluster.pipeline import Activity, Doing
from cluster.stages.link import Link
from cluster.transport import AdapterLoaded, LoadAdapter, StageChannel, StepOrder, StopRequested
from model.batch import SAMPLED, Batch, Copied, Copies, LateMasks, SampledTokens, StageTiming
from model.host_copies.copier import Copying
from model.sampling import Sampled
from model.stage import Stage, Unsampled, to_output
from model.timing import Span, Stopwatch
from model.transfer import to_device

POLL_S = 20e-6  # between looks at the device and at the control channel while a step is being computed
READING_S = 1e-3  # the same while nothing is computed and an adapter is read
LINK_MARGIN_S = 1.0  # a stage waits so much longer for its neighbour than the engine does for the step


@dataclass(frozen=True, slots=True)
class Launched:
    """A step the device may still be busy with."""

    batch: Batch
    sampled: Sampled | None  # on the last stage
    span: Span
    transfer: float  # seconds the host was blocked in sending
    at: float  # when it was launched


class StageLoop:
    """One stage at work. A step is launched as soon as its inputs are there, and reported once the device is done."""

    def __init__(
        self,
        index: int,
        stage: Stage,
        channel: StageChannel,
        epoch: int,
        upstream: Link | None,
        downstream: Link | None,
        tokens: Link | None = None,
        max_in_flight: int = 1,
    ) -> None:
        """`tokens`, from the last stage to the first, is None where tokens come by way of the engine instead.

        The engine has at most `max_in_flight` steps under way.
        """
        self._index, self._stage, self._channel, self._epoch = index, stage, channel, epoch
        self._upstream, self._downstream, self._tokens = upstream, downstream, tokens
        self._max_in_flight = max_in_flight
        self._adapters = stage.adapters
        self._stopwatch = Stopwatch(stage.decoder.device)
        self._inbox: deque[StepOrder | Copies] = deque()
        self._copying: deque[Copying] = deque()
        self._outbox: deque[Launched] = deque()
        self._computed: tuple[StepOrder, Unsampled] | None = None  # the last stage: a step whose tokens are to be drawn
        self._masks: dict[int, LateMasks] = {}  # by step id, for batches that were sent without
        self._expected = 0  # step id of the next batch
        # The first stage of several is told what the last one sampled:
        self._is_fed = stage.layers.is_first and not stage.layers.is_last
        self._feeds = stage.layers.is_last and not stage.layers.is_first
        self._awaiting_tokens: deque[StepOrder] = deque()  # those that sample, oldest first
        self._tokens_until = -1  # tokens of all steps up to this one are in
        self._doing: tuple[Activity, float] = "idle", time.monotonic()  # what the host does, and since when
        self._reported = 0.0  # when the last step was

    @property
    def doing(self) -> Doing:
        """Read by another thread, to find the stage that hangs.

        A device is at the oldest step that it has not finished: in it, or still waiting for what it begins with.
        """
        now = time.monotonic()
        for step in tuple(self._outbox):
            if not step.span.is_over():
                return Doing("computing" if step.span.has_begun() else "receiving", now - max(step.at, self._reported))
        activity, since = self._doing
        return Doing(activity, now - since)

    def _turn_to(self, activity: Activity) -> None:
        self._doing = activity, time.monotonic()

    def run(self) -> None:
        """Until told to stop. Raises `LinkBroken` if a neighbour is gone, `RuntimeError` if the order is broken."""
        try:
            while True:
                self._take_orders()
                if self._may_launch():
                    self._begin(self._inbox.popleft())
                if self._computed is not None and self._may_sample(self._computed[0].batch):
                    self._sample(*self._computed)
                while self._outbox and self._outbox[0].span.is_over():
                    self._check_links()
                    self._report(self._outbox.popleft())
                while self._copying and self._copying[0].is_over:
                    self._report_copies(self._copying.popleft())
        except StopRequested:
            return
        except Exception:
            self._check_links()  # what was computed from garbage may fail in any way: that is not this stage's fault
            raise

    def _check_links(self) -> None:
        for link in (self._upstream, self._downstream, self._tokens):
            if link is not None:
                link.check()

    def _take_orders(self) -> None:
        """All that have arrived; waits for one if there is nothing else to do."""
        reading = self._adapters is not None and self._adapters.is_reading
        wait = not self._may_launch() and not self._outbox and not self._copying and not reading
        if wait:
            self._receive_tokens(self._expected)  # nothing is delayed by that now
        while (order := self._channel.receive(wait)) is not None:
            wait = False
            if isinstance(order, SampledTokens):
                self._feed(order)
                continue
            if isinstance(order, LateMasks):
                self._masks[order.step_id] = order
                continue
            if isinstance(order, Copies):
                if order.epoch == self._epoch:
                    self._inbox.append(order)
                continue
            if isinstance(order, LoadAdapter):
                self._load_adapter(order)
                continue
            batch = order.batch
            if (batch.epoch, batch.step_id) != (self._epoch, self._expected):
                expected = f"{self._expected} of epoch {self._epoch}"
                raise RuntimeError(f"got step {batch.step_id} of epoch {batch.epoch}, expected {expected}")
            self._expected += 1
            self._inbox.append(order)
            if self._is_fed and len(batch.sample_rows):
                self._awaiting_tokens.append(order)
        if reading:
            self._report_adapters()
        if not self._may_launch() and (self._outbox or self._copying or reading):
            time.sleep(POLL_S if self._outbox or self._copying else READING_S)

    def _load_adapter(self, order: LoadAdapter) -> None:
        if self._adapters is None:
            raise RuntimeError("got an adapter, and there is no room for any")
        self._adapters.drop(order.drop)
        self._adapters.load(order.digest, order.path)

    def _report_adapters(self) -> None:
        """Those that have been read by now."""
        assert self._adapters is not None
        for loaded in self._adapters.take_loaded():
            self._channel.send(AdapterLoaded(self._index, loaded.digest, loaded.error))

    def _may_sample(self, batch: Batch) -> bool:
        return not batch.awaited or batch.step_id in self._masks

    def _may_launch(self) -> bool:
        if self._computed is not None:
            return False
        if not self._inbox:
            return False
        if isinstance(self._inbox[0], Copies):
            return True
        if self._tokens is not None:
            return True  # what one device waits for, the other has been given before: no host has a part in it
        if self._is_fed and self._inbox[0].batch.tokens_from > self._tokens_until:
            return False
        if not self._feeds or not self._outbox:
            return True
        # The first stage may need tokens of a step that is still in the outbox to send what this launch would wait for.
        # If it is the device that waits, they may be reported meanwhile; but a launch may make the host wait for the
        # device, by loading a kernel or looking for memory, so not even then behind what follows from such tokens.
        assert self._upstream is not None
        return self._upstream.on_device and self._outbox[0].batch.step_id > self._inbox[0].batch.tokens_from

    def _receive_tokens(self, step_id: int) -> None:
        """The device waits for the tokens of all steps up to this one before it does anything else."""
        while self._tokens is not None and self._awaiting_tokens and self._awaiting_tokens[0].batch.step_id <= step_id:
            order = self._awaiting_tokens.popleft()
            count, device = len(order.batch.sample_rows), self._stage.decoder.device
            # If the link is cut, what is there is looked up in the embedding: it had better be tokens.
            into = torch.zeros(count, dtype=torch.int64, device=device)
            self._stage.feed(order.batch, self._tokens.receive(into, order.timeout_s + LINK_MARGIN_S))

    def _feed(self, tokens: SampledTokens) -> None:
        batch = self._awaiting_tokens.popleft().batch
        if batch.step_id != tokens.step_id or len(batch.sample_rows) != len(tokens.token_ids):
            raise RuntimeError(f"got the tokens of step {tokens.step_id}, expected those of step {batch.step_id}")
        assert SAMPLED not in tokens.token_ids
        self._stage.feed(batch, to_device(tokens.token_ids, torch.int64, self._stage.decoder.device))
        self._tokens_until = tokens.step_id

    def _begin(self, order: StepOrder | Copies) -> None:
        if isinstance(order, StepOrder):
            self._launch(order)
        else:
            self._turn_to("computing")
            self._copying.append(self._stage.copier.start(order))
            self._turn_to("idle")

    def _report_copies(self, copying: Copying) -> None:
        bad = self._stage.copier.finish(copying)
        self._channel.send(Copied(self._epoch, copying.copies.number, self._index, bad))

    def _launch(self, order: StepOrder) -> None:
        batch, timeout_s = order.batch, order.timeout_s + LINK_MARGIN_S
        hidden = self._receive(batch, timeout_s)
        # Also tokens that nothing follows from: they have been sampled, and the last stage must get rid of them.
        self._receive_tokens(max(batch.tokens_from, batch.step_id - self._max_in_flight))
        self._turn_to("computing")
        self._stopwatch.start()
        result = self._stage.compute(batch, hidden)
        if isinstance(result, Unsampled):
            self._computed = order, result
        elif isinstance(result, Sampled):
            self._finish(order, result)
        else:
            span = self._stopwatch.stop()
            self._outbox.append(Launched(batch, None, span, self._send(result, timeout_s), time.monotonic()))
        self._turn_to("idle")

    def _sample(self, order: StepOrder, computed: Unsampled) -> None:
        """Masks that come later than what they are for was computed count as computing in the timings."""
        self._turn_to("computing")
        self._computed = None
        self._finish(order, self._stage.sample(computed, self._masks.pop(computed.batch.step_id, None)))
        self._turn_to("idle")

    def _finish(self, order: StepOrder, sampled: Sampled) -> None:
        span = self._stopwatch.stop()
        if self._feeds and self._tokens is not None and len(order.batch.sample_rows):
            self._tokens.send(sampled.token_ids, order.timeout_s + LINK_MARGIN_S)
        self._outbox.append(Launched(order.batch, sampled.on_host(), span, 0.0, time.monotonic()))

    def _receive(self, batch: Batch, timeout_s: float) -> torch.Tensor | None:
        if self._upstream is None:
            return None
        self._turn_to("receiving")
        decoder = self._stage.decoder
        where = decoder.device if self._upstream.on_device else "cpu"
        into = torch.empty(self._stage.hidden_shape(batch), dtype=decoder.dtype, device=where)
        return self._upstream.receive(into, timeout_s).to(decoder.device, non_blocking=True)

    def _send(self, hidden: torch.Tensor, timeout_s: float) -> float:
        """Returns the seconds it took the host."""
        assert self._downstream is not None
        before = time.monotonic()
        if not self._downstream.on_device:
            hidden = hidden.cpu()  # on a GPU this is where the host waits for the step
        self._turn_to("sending")
        self._downstream.send(hidden, timeout_s)
        return time.monotonic() - before

    def _report(self, step: Launched) -> None:
        batch, span = step.batch, step.span
        self._reported = time.monotonic()
        self._stage.group.check()
        if step.sampled is not None:
            self._channel.send(to_output(batch, step.sampled))
        # Waiting for the stage before counts as waiting, not as transfer: that is what a pipeline bubble is.
        wait = max(0.0, span.wait() - step.transfer)
        self._channel.send(
            StageTiming(batch.epoch, batch.step_id, self._index, span.started(), span.finished(), wait, step.transfer)
        )

"""One replica's engine: a scheduler and a pipeline, driven by one thread.

The loop reads as its sentence: take in requests, fill the pipeline while `schedule` gives batches, then take the
oldest result, update, emit.
"""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cluster.adapter_library import AdapterLibrary
from cluster.errors import CaravanError, Cause, EngineStopped, RequestRejected, StageDied
from cluster.patience import Patience
from cluster.pipeline import Pipeline, max_in_flight
from cluster.scheduling.scheduler import Scheduler
from cluster.scheduling.sequence import AdapterRef, Matcher, Request, Start, TokenEvent
from model.batch import Batch, StageTiming, StepOutput

log = logging.getLogger(__name__)

MASKS_LATE_S = 0.25  # how long the oldest batch in flight waits for masks
IDLE_WAIT_S = 1.0  # how often an idle engine looks up
STATS_PERIOD_S = 0.1  # how old `Engine.stats` may be while there is work
DEFAULT_HANG_S, DEFAULT_STEP_TIMEOUT_S = 2.5, 60.0
DEFAULT_RECOVERY_ATTEMPTS = 3
CLOSE_S = 5.0  # how long the loop gets to end, before its stages are killed under it, and again afterwards
STEADY_STEPS = 16  # after a rebuild, with nobody suspect any more: then the next death is the first in a row again
LINKED_AGAIN = 2  # rebuilds in a row that keep sound stages; the next one replaces them all


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one finished step says to metrics."""

    num_tokens: int  # tokens computed
    num_seqs: int
    scheduler_seconds: float  # scheduler time of this step, schedule and update
    queue_waits: list[float]  # seconds from arrival to admission, of requests this step admitted
    seconds: float = 0.0  # since the step before was finished, or this one was begun if none was under way
    num_prefill_tokens: int = 0  # of them in prompts
    num_sampled: int = 0


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What one rebuilt pipeline says to metrics."""

    cause: Cause
    seconds: float  # from the death's being noticed to the pipeline's being ready
    num_replaced: int  # stages; the others kept their weights
    num_seqs: int  # sequences whose KV is computed again


class Listener(Protocol):
    """Where the engine reports to, from its own thread: once per step, not per token."""

    def on_tokens(self, events: list[TokenEvent]) -> None: ...
    def on_step(self, report: StepReport) -> None: ...
    def on_timing(self, timing: StageTiming) -> None: ...
    def on_death(self, death: StageDied) -> None:
        """The pipeline is being rebuilt from now on."""
        ...

    def on_recovery(self, report: RecoveryReport) -> None:
        """The pipeline works again."""
        ...

    def on_failure(self, error: CaravanError) -> None:
        """The engine has stopped; no request that is still open gets any more tokens."""
        ...


@dataclass(slots=True)
class InFlight:
    """A batch on its way through the stages."""

    batch: Batch
    submitted: float
    scheduler_seconds: float
    queue_waits: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Opened:
    """A request that is not done."""

    request: Request
    matcher: Matcher | None
    arrived: float
    admitted: float = 0.0  # when it was, for the first time; 0: not yet
    is_aborted: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """An adapter to be loaded, and who wants to know how that went."""

    adapter: AdapterRef
    done: "Future[None]"


class Engine:
    """Scheduler + pipeline + thread. `add` and `abort` are safe from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        listener: Listener,
        patience: Patience | None = None,
        recovery_attempts: int = DEFAULT_RECOVERY_ATTEMPTS,
        vocab_size: int | None = None,
        max_host_adapters: int = 64,
    ) -> None:
        """`vocab_size`, if given, is what token ids are held against."""
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.last_progress = time.monotonic()  # when a step last finished, or the engine last was idle
        self.stats = scheduler.stats()  # as of the last turn of the loop
        self._stats_at = time.monotonic()
        self._listener = listener
        self._recovery_attempts = recovery_attempts
        self._vocab_size = vocab_size
        self._patience = patience or Patience(DEFAULT_HANG_S, DEFAULT_STEP_TIMEOUT_S)
        self._adapters = AdapterLibrary(scheduler.adapters, pipeline.depth, max_host_adapters, pipeline.load_adapter)
        self._inbox: deque[Opened | Wanted] = deque()  # to be added, or aborted; to be loaded
        self._open: dict[str, Opened] = {}
        self._starting: dict[str, Opened] = {}  # admitted, and without a token yet
        self._in_flight: deque[InFlight] = deque()
        self._copying: dict[int, tuple[float, int]] = {}  # copies under way: since when, how many blocks come in
        self._reset = False  # whether all cached content is to be forgotten
        self._deaths = 0  # in a row: see `_count_step`
        self._steps = 0  # finished since the last rebuild
        self._recovering: StageDied | None = None
        self._turned = time.monotonic()
        self._asked = 0.0  # when the stages were last asked whether they live
        self._closing = False
        self._failure: CaravanError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def failure(self) -> CaravanError | None:
        """Why the engine stopped by itself, or None while it works."""
        return self._failure

    @property
    def recovering(self) -> StageDied | None:
        """The stage death that the pipeline is being rebuilt after, or None."""
        return self._recovering

    @property
    def overdue_s(self) -> float:
        """Seconds that the oldest step is late; 0 or less while work moves or there is none."""
        deadline = self._deadline()
        return time.monotonic() - deadline if deadline is not None else 0.0

    @property
    def idle_s(self) -> float:
        """Seconds since the loop last turned, which it does about every second unless it rebuilds the pipeline."""
        return 0.0 if self._recovering is not None else time.monotonic() - self._turned

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request, with a matcher if it has a constraint; its tokens go to the listener. Never waits.

        Raises `RequestRejected` or `EngineStopped` at once.
        """
        if self._failure is not None or self._closing:
            raise EngineStopped(str(self._failure or "the engine is shutting down"))
        self.scheduler.validate(request)
        self._check_vocabulary(request)
        opened = Opened(request, matcher, time.monotonic())
        if self._open.setdefault(request.request_id, opened) is not opened:
            raise RequestRejected(f"a request with id {request.request_id} is open already")
        self._inbox.append(opened)
        self.pipeline.wake()

    def _check_vocabulary(self, request: Request) -> None:
        size = self._vocab_size
        for token_ids in (request.token_ids, request.output_ids):
            if size is not None and token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
                raise RequestRejected(f"token ids are 0 to {size - 1} with this model: the request has others")

    def abort(self, request_id: str) -> None:
        """Stop a request, whether it waits, runs or is done already. Its id is free again once it has left."""
        opened = self._open.get(request_id)
        if opened is not None:
            opened.is_aborted = True
            self._inbox.append(opened)
            self.pipeline.wake()

    def reset_cache(self) -> None:
        """Forget all cached keys and values; who runs goes on. Never waits."""
        self._reset = True
        self.pipeline.wake()

    def load_adapter(self, adapter: AdapterRef) -> "Future[None]":
        """Have all stages read an adapter, and never wait; the future raises `ValueError` if it cannot be served."""
        done: Future[None] = Future()
        self._inbox.append(Wanted(adapter, done))
        self.pipeline.wake()
        return done

    def close(self) -> None:
        """Stop the loop and end the pipeline. Requests still open get no more tokens. Waits only for seconds."""
        self._closing = True
        self.pipeline.wake()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)
            until = time.monotonic() + CLOSE_S
            while self._thread.is_alive() and time.monotonic() < until:  # it may start stages just now, so again
                self.pipeline.kill()
                self._thread.join(0.1 * CLOSE_S)
            if self._thread.is_alive():
                log.error("the engine's loop does not end; its pipeline is left as it is")
                return
        self.pipeline.close()

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turned = time.monotonic()
                try:
                    self._take_inbox()
                    self._take_adapters()
                    self._fill()
                    self._send_masks()
                    self._refresh_stats()
                    self._take_results()
                except StageDied as death:
                    self._recover(self._cause_of(death))
        except CaravanError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the engine failed")
            self._fail(EngineStopped(f"the engine failed: {type(error).__name__}: {error}"))

    def _refresh_stats(self) -> None:
        """Not on every turn: it counts all sequences."""
        now = time.monotonic()
        if now - self._stats_at > STATS_PERIOD_S or not self.scheduler.has_work:
            self.stats, self._stats_at = self.scheduler.stats(), now

    def _take_inbox(self) -> None:
        if self._reset:
            self._reset = False
            self.scheduler.forget_cache()
        while self._inbox:
            opened = self._inbox.popleft()
            if isinstance(opened, Wanted):
                self._adapters.load(opened.adapter, opened.done)
                continue
            name = opened.request.request_id
            if not opened.is_aborted:
                self.scheduler.add(opened.request, opened.matcher)
                if opened.request.adapter is not None:
                    self._adapters.open(opened.request.adapter, name)
            elif self._open.get(name) is opened:  # and not another one by now
                self._close(name)
                self._starting.pop(name, None)
                self.scheduler.abort(name)

    def _close(self, name: str) -> None:
        opened = self._open.pop(name, None)
        if opened is not None and opened.request.adapter is not None:
            self._adapters.close(opened.request.adapter, name)

    def _take_adapters(self) -> None:
        """Adapters that all stages have by now may run; what one cannot have is the end of who needs it."""
        for name, error in self._adapters.take(self.pipeline.take_loaded()):
            self._emit(self.scheduler.fail(name, error))

    def _fill(self) -> None:
        """As many batches as may be under way."""
        while len(self._in_flight) < max_in_flight(self.pipeline.depth):
            started = time.monotonic()
            batch = self.scheduler.schedule()
            if batch is None:
                break
            if not self._in_flight:
                self.last_progress = started
            now = time.monotonic()
            self._in_flight.append(InFlight(batch, now, now - started, self._waits(now)))
            self.pipeline.submit(batch, self._patience.limit(batch.num_tokens))
            self._copy()
        self._copy()

    def _copy(self) -> None:
        """What the last batch leaves to be copied, and what was admitted needs: behind that batch, before the next."""
        copies = self.scheduler.copies()
        if copies is not None:
            self._copying[copies.number] = time.monotonic(), len(copies.in_blocks)
            self.pipeline.copy(copies)

    def _take_copied(self) -> None:
        for copied in self.pipeline.take_copied():
            if self.scheduler.copied(copied):
                started, num_blocks = self._copying.pop(copied.number)
                self.scheduler.observe_copies(num_blocks, time.monotonic() - started)

    def _waits(self, now: float) -> list[float]:
        """Seconds that requests had waited which were just admitted for the first time."""
        admitted = [self._open[i] for i in self.scheduler.admitted if not self._open[i].admitted]
        for opened in admitted:
            opened.admitted = now
            self._starting[opened.request.request_id] = opened
        return [now - opened.arrived for opened in admitted]

    def _send_masks(self) -> None:
        """To batches that were sent without; the oldest one is not kept waiting for a mask that does not come."""
        while (masks := self.scheduler.next_masks()) is not None:
            self.pipeline.send_masks(masks)
        if (deadline := self._masks_deadline()) is not None and time.monotonic() > deadline:
            log.warning("step %d goes on without masks that are late", self._in_flight[0].batch.step_id)
            self.scheduler.give_up_masks(self._in_flight[0].batch.step_id)
            self._send_masks()

    def _masks_deadline(self) -> float | None:
        """Until when the masks of the oldest batch in flight must be known; None if it lacks none."""
        if not self._in_flight or not self.scheduler.missing_masks(self._in_flight[0].batch.step_id):
            return None
        return max(self.last_progress, self._in_flight[0].submitted) + MASKS_LATE_S

    def _take_results(self) -> None:
        """All that have come; waits for one if there is none."""
        output = self.pipeline.receive(self._wait_s())
        self._take_copied()
        if output is None:
            self._look_for_hang()
        while output is not None:
            self._finish_step(output)
            output = self.pipeline.receive(0.0) if self._in_flight else None
        for timing in self.pipeline.take_timings():
            self._listener.on_timing(timing)

    def _wait_s(self) -> float:
        """Until a step is late enough to be asked about."""
        deadline = self._deadline()
        if deadline is None:
            return IDLE_WAIT_S
        until = min(deadline, self._next_question(), self._masks_deadline() or deadline)
        return max(0.0, until - time.monotonic()) + 0.001

    def _next_question(self) -> float:
        return max(self.last_progress, self._asked) + self._patience.floor_s

    def _look_for_hang(self) -> None:
        deadline, now = self._deadline(), time.monotonic()
        if any(now - started > self._patience.ceiling_s for started, _ in self._copying.values()):
            raise StageDied("blocks are not copied in time", "link")
        if deadline is None:
            return
        late = f"step {self._in_flight[0].batch.step_id} has not finished for {now - self.last_progress:.1f} s"
        if now > deadline:
            raise StageDied(late, "link")
        if now > self._next_question():
            self._asked = now
            if (hung := self.pipeline.unresponsive(late)) is not None:
                raise hung

    def _deadline(self) -> float | None:
        """Until when the oldest step must have finished. Stages share cores, so the largest one in flight counts."""
        return self.last_progress + self._limit_s() if self._in_flight else None

    def _limit_s(self) -> float:
        """What a step may take of those in flight."""
        return self._patience.limit(max((step.batch.num_tokens for step in tuple(self._in_flight)), default=0))

    def _cause_of(self, death: StageDied) -> StageDied:
        """Who waits in vain is a neighbour of whoever is to blame, if anybody is."""
        return self.pipeline.diagnose(str(death), self._limit_s()) if death.cause == "link" else death

    def _finish_step(self, output: StepOutput) -> None:
        step = self._in_flight[0] if self._in_flight else None
        if step is None or (output.epoch, output.step_id) != (step.batch.epoch, step.batch.step_id):
            raise StageDied(f"the last stage answered step {output.step_id} of epoch {output.epoch}, out of order")
        self._in_flight.popleft()
        self._count_step()
        started = time.monotonic()
        since_last = started - max(step.submitted, self.last_progress)
        self._patience.observe(step.batch.num_tokens, since_last)
        if self.scheduler.speculation is not None and step.batch.num_tokens == step.batch.num_seqs:
            self.scheduler.speculation.times.observe(step.batch.num_tokens, started - self.last_progress)
        self.scheduler.observe_step(step.batch, since_last)
        events = self.scheduler.update(step.batch, output)
        self.last_progress = time.monotonic()
        seconds = step.scheduler_seconds + self.last_progress - started
        self._emit(events)
        self._listener.on_step(_report(step, seconds, since_last))

    def _emit(self, events: list[TokenEvent]) -> None:
        if self._starting:
            events = [self._started(event) if event.request_id in self._starting else event for event in events]
        for event in events:
            if event.finish_reason is not None:
                self._close(event.request_id)
                self._starting.pop(event.request_id, None)
            if event.error is not None:
                log.error("request %s failed, and nothing else: %s", event.request_id, event.error)
        if events:
            self._listener.on_tokens(events)

    def _started(self, event: TokenEvent) -> TokenEvent:
        """With how long it took until the first token, if it is the first token."""
        if not event.has_token:
            return event
        opened = self._starting.pop(event.request_id)
        start = Start(opened.admitted - opened.arrived, time.monotonic() - opened.admitted)
        return msgspec.structs.replace(event, start=start)

    def _count_step(self) -> None:
        """One step proves little: what killed a stage may be about to be computed again."""
        self._steps += 1
        if self._deaths and self._steps >= STEADY_STEPS and not self.scheduler.has_suspects:
            self._deaths = 0

    def _recover(self, death: StageDied) -> None:
        """Rebuild the pipeline and compute every open sequence again: its stream goes on with the same tokens."""
        started, running, cause = time.monotonic(), self.scheduler.stats().running, death.cause
        replaced: int | None = None
        while replaced is None:
            self._recovering = death
            self._take_blame(death)
            log.error("%s; %d sequences are recomputed", death, running)
            self._listener.on_death(death)
            try:
                replaced = self.pipeline.recover(self.scheduler.epoch, fresh=self._deaths > LINKED_AGAIN)
                self._adapters.read_again()
            except StageDied as again:
                death, replaced = again, None
        self._patience.restart()
        self._steps = 0
        self.last_progress = time.monotonic()
        report = RecoveryReport(cause, self.last_progress - started, replaced, running)
        self._recovering = None
        log.warning("recovered in %.1f s: %d stages replaced, %d sequences go on", report.seconds, replaced, running)
        self._listener.on_recovery(report)

    def _take_blame(self, death: StageDied) -> None:
        """Start over, without the request that is guilty if there is one. Raises what ends the engine if that is all.

        A request ends before anybody hears of the death: nobody is to take it elsewhere.
        """
        if self._closing:
            raise death
        self._in_flight.clear()
        self._copying.clear()
        guilty = self.scheduler.restart(accuse=death.cause != "link")
        self._emit(guilty)
        self._deaths = 1 if guilty else self._deaths + 1  # those before are explained
        if self._deaths > self._recovery_attempts:
            raise EngineStopped(f"{death} (rebuilt {self._recovery_attempts} times in a row)") from death

    def _fail(self, error: CaravanError) -> None:
        if self._closing:
            return  # that is what it takes to end a rebuild
        self._failure = error
        self._in_flight.clear()
        log.error("engine stopped: %s", error)
        self._listener.on_failure(error)


def _report(step: InFlight, scheduler_seconds: float, seconds: float) -> StepReport:
    batch = step.batch
    return StepReport(
        num_tokens=batch.num_tokens,
        num_seqs=batch.num_seqs,
        scheduler_seconds=scheduler_seconds,
        queue_waits=step.queue_waits,
        seconds=seconds,
        num_prefill_tokens=int(batch.query_lens[batch.query_lens > 1].sum()),
        num_sampled=len(batch.sample_rows),
    )

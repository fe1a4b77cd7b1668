"""A `Link` from GPU to GPU over NCCL: no host waits, neither for the step that is sent nor for the one to come.

What is sent and received is put into the order of the GPU's streams. A send begins when the step before it in the
compute stream is done, and runs beside the next step on NCCL's own stream; a step that needs a hidden state waits for
it on the device. So the host learns late that a neighbour is gone: a thread of the link looks at the deadlines, and
frees whatever waits by aborting the communicator. What was being received then counts as received, though it is
garbage: `check` says so, and must be asked before anything computed from it is passed on.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cluster.errors import LinkBroken
from cluster.stages.link import FROM_PREVIOUS, TO_NEXT, UPSTREAM, broken_if_it_fails
from cluster.transport import interface_of

WATCH_S = 0.05  # between looks at the deadlines
FOREVER = timedelta(days=1)  # to torch: deadlines are kept here

# What torch's own watchdog would do to a process whose neighbour is gone: end it, weights and all.
ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
    # After an error it sleeps four times as long, for others to write reports: who lets go of the group waits for that.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",  # a group sends in one direction only
    "NCCL_NVLS_ENABLE": "0",  # multicast is for collectives; here a pair sends and receives
}


class Events:
    """Tells when an operation is done by an event behind it: torch also calls one completed that has failed."""

    def __init__(self, device: torch.device) -> None:
        # It waits for sends, so that the compute stream need not.
        self._beside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def received(self, work: Any) -> Callable[[], bool]:
        """What is launched on the current stream from here on waits for `work`."""
        work.wait()  # the stream does, not the host
        return self._event(torch.cuda.current_stream())

    def sent(self, work: Any) -> Callable[[], bool]:
        with torch.cuda.stream(self._beside):
            work.wait()
            return self._event(self._beside)

    @staticmethod
    def _event(stream: Any) -> Callable[[], bool]:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return lambda: bool(event.query())


@dataclass(frozen=True, slots=True)
class Pending:
    """One operation that the device may not have finished."""

    is_done: Callable[[], bool]
    tensor: torch.Tensor  # kept alive: another stream than the allocator's reads or writes it
    deadline: float
    what: str


class NcclLink:
    """See `Link`; made by `connect`. `group` is a process group of two that nobody else uses.

    `to` and `from_` say in errors what is done: sending, receiving.
    """

    on_device = True

    def __init__(
        self, group: Any, peer: int, events: Events, store: Any = None, to: str = TO_NEXT, from_: str = FROM_PREVIOUS
    ) -> None:
        self._group, self._peer, self._events = group, peer, events
        self._to, self._from = to, from_
        self._store = store  # the group needs it as long as it lives
        self._sent: deque[Pending] = deque()
        self._received: deque[Pending] = deque()
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="link-watch", daemon=True).start()

    # -- the protocol -------------------------------------------------------------------------------------------------

    def send(self, hidden: torch.Tensor, timeout_s: float) -> None:
        self.check()
        hidden = hidden.contiguous()
        with broken_if_it_fails(self._to):
            is_done = self._events.sent(self._group.send([hidden], self._peer, 0))
        self._remember(self._sent, Pending(is_done, hidden, time.monotonic() + timeout_s, self._to))

    def flush(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._oldest(self._sent) is not None:
            self.check()
            if time.monotonic() > deadline:
                raise LinkBroken(f"{self._to}: not taken within {timeout_s:g} s")
            time.sleep(0.001)

    def receive(self, into: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """`into` is on the GPU; whatever is launched on the current stream from here on waits for it there."""
        self.check()
        with broken_if_it_fails(self._from):
            # It begins when what was launched before is done: until then somebody may still read this memory.
            is_done = self._events.received(self._group.recv([into], self._peer, 0))
        self._remember(self._received, Pending(is_done, into, time.monotonic() + timeout_s, self._from))
        return into

    def check(self) -> None:
        if self._broken is not None:
            raise LinkBroken(self._broken)

    def close(self) -> None:
        self.abort("the link was closed")

    # -- from other threads -------------------------------------------------------------------------------------------

    def abort(self, why: str) -> None:
        """Free whoever waits, on the host or on the device. Safe from any thread, and to call twice."""
        with self._lock:
            if self._broken is not None:
                return
            self._broken = why  # first: what is freed now looks as if it had been received
        self._closed.set()
        self._group.abort()
        self._store = None

    def _watch(self) -> None:
        while not self._closed.wait(WATCH_S):
            for pending in (self._oldest(self._sent), self._oldest(self._received)):
                if pending is not None and time.monotonic() > pending.deadline:
                    self.abort(f"{pending.what}: the neighbour was silent until the deadline")
                    return

    def _remember(self, operations: deque[Pending], pending: Pending) -> None:
        with self._lock:
            operations.append(pending)

    def _oldest(self, operations: deque[Pending]) -> Pending | None:
        """The first that is not finished; those that are, are forgotten, and their memory with them."""
        with self._lock:
            while operations and self._broken is None and operations[0].is_done():
                operations.popleft()
            return operations[0] if operations else None


def connect(
    store: TCPStore, rank: int, host: str, key: str, timeout_s: float, device: torch.device,
    to: str = TO_NEXT, from_: str = FROM_PREVIOUS,
) -> NcclLink:  # fmt: skip
    """The link of `rank` in its pair. Returns when both are connected; raises `LinkBroken` after `timeout_s`.

    `host` is this node's address: NCCL meets on the interface that has it, unless NCCL_SOCKET_IFNAME is set.
    """
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface_of(host)}")
    here = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    groups: list[Any] = []
    ends: list[RuntimeError | None] = []

    def meet() -> None:
        try:
            groups.append(_group(PrefixStore(key, store), rank, here))
            _exchange_a_word(groups[0], rank, here)
            ends.append(None)
        except RuntimeError as error:
            ends.append(error)

    # In a thread: if the other one dies in the middle of it, nothing else would end the wait.
    thread = threading.Thread(target=meet, name="link-connect", daemon=True)
    thread.start()
    thread.join(timeout_s)
    with broken_if_it_fails("connecting with the neighbour"):
        if not ends:
            if groups:
                groups[0].abort()  # or the streams wait for its word for ever
            raise RuntimeError(f"it did not come within {timeout_s:g} s")
        if ends[0] is not None:
            raise ends[0]
    return NcclLink(groups[0], 1 - rank, Events(here), store, to, from_)


def _group(store: PrefixStore, rank: int, device: torch.device) -> Any:
    """A process group of two with its communicator."""
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(device)  # of this thread
    options = ProcessGroupNCCL.Options()
    options._timeout = FOREVER
    group: Any = ProcessGroupNCCL(store, rank, 2, options)
    group.eager_connect_single_device(device)
    return group


def _exchange_a_word(group: Any, rank: int, device: torch.device) -> None:
    """NCCL opens the way between two only when something is sent: that is not to happen in a step."""
    word = torch.zeros(1, device=device)
    (group.send if rank == UPSTREAM else group.recv)([word], 1 - rank, 0).wait()
    torch.cuda.synchronize(device)

"""The requests that gateways wait for in one engine, and their tokens' way out: one message per step and gateway."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.errors import CaravanError, EngineStopped, RequestRejected
from cluster.scheduling.sequence import TokenEvent
from deployments.engine.load import EngineLoad
from deployments.engine.token_link import GatewayLost, ReplyAddress, TokenSender


@dataclass(frozen=True, slots=True)
class Stream:
    """A request some gateway waits for."""

    reply_to: ReplyAddress
    done: asyncio.Future[None]

    def finish(self, error: CaravanError | None = None) -> None:
        """From the event loop's thread."""
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class Streams:
    """Opened in the event loop's thread; tokens come in the engine's, and beats in another one."""

    def __init__(self, sender: TokenSender, load: EngineLoad) -> None:
        self._sender = sender
        self._load = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[str, Stream] = {}

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @contextmanager
    def open(self, request_id: str, reply_to: ReplyAddress) -> Iterator[asyncio.Future[None]]:
        """Yields what is done when the last token is on its way. Raises `RequestRejected` for an id that is open."""
        self._loop = self._loop or asyncio.get_running_loop()
        if request_id in self._open:
            raise RequestRejected(f"a request with id {request_id} is running already")
        self._load.begin()
        stream = self._open[request_id] = Stream(reply_to, self._loop.create_future())
        try:
            yield stream.done
        finally:
            del self._open[request_id]

    def deliver(self, events: list[TokenEvent]) -> None:
        """A step's tokens, each to the gateway that waits for it."""
        by_gateway: dict[ReplyAddress, list[TokenEvent]] = {}
        finished: list[Stream] = []
        for event in events:
            stream = self._open.get(event.request_id)
            if stream is not None:  # probes have none, and clients may have left
                by_gateway.setdefault(stream.reply_to, []).append(event)
                if event.finish_reason is not None:
                    finished.append(stream)
        self._load.add(sum(map(len, by_gateway.values())), len(finished))
        for gateway, its_events in by_gateway.items():
            try:
                self._sender.send(gateway, its_events)
            except GatewayLost as error:
                self._end([s for s in list(self._open.values()) if s.reply_to == gateway], EngineStopped(str(error)))
        self._end(finished)

    def beat(self, ready: bool) -> None:
        """Tell the gateways that the engine lives, and whether its pipeline works."""
        self._sender.beat({stream.reply_to for stream in list(self._open.values())}, ready)

    def fail(self, error: CaravanError) -> None:
        """No request gets any more tokens."""
        self._end(list(self._open.values()), EngineStopped(str(error)))

    def _end(self, streams: list[Stream], error: CaravanError | None = None) -> None:
        """Let the calls of these requests return, or fail, in their own thread."""
        if not streams or self._loop is None:
            return

        def end() -> None:
            for stream in streams:
                stream.finish(error)

        self._loop.call_soon_threadsafe(end)

    def close(self) -> None:
        self._sender.close()

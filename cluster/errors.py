"""Everything that can go wrong in a pipeline, as exceptions.

CaravanError
├── RequestRejected   the request can never run here (a `ValueError`: the client must change it)
├── RequestFailed     something went wrong with this request alone; trying again would not help
│   └── RequestFatal  stages die of it: it was tried by itself, and must not be tried again anywhere
├── EngineStopped     the engine is closing or has failed; the request may run elsewhere
│   └── EngineLeaving the engine goes as planned, or rebuilds its pipeline; another one is there for the request
└── StageDied         a stage exited, hung past its deadline or answered nonsense

LinkBroken            in a stage: its neighbour is gone or silent. Says nothing against this stage itself.
"""

from typing import Literal

Cause = Literal["killed", "failed", "hung", "link", "start"]  # labels of the recovery metrics
MoveCause = Literal["leaving", "rebuilding"]


class CaravanError(Exception):
    """Base of every error Caravan raises on purpose."""


class RequestRejected(CaravanError, ValueError):
    """The request can never run on this engine; the message says why."""


class RequestFailed(CaravanError):
    """Handling this request failed, and no other one with it; the message is for the log."""


class RequestFatal(RequestFailed):
    """Stages died of this request, in the end with nothing else under way."""


class EngineStopped(CaravanError):
    """The engine no longer takes or finishes requests; the message gives the first cause."""


class EngineLeaving(EngineStopped):
    """The engine goes as planned (an update, fewer replicas), or rebuilds its pipeline while another one serves."""

    def __init__(self, message: str, cause: MoveCause) -> None:
        super().__init__(message)
        self.cause: MoveCause = cause


class StageDied(CaravanError):
    """A stage can no longer compute; the message names the stage, its node and the first cause."""

    def __init__(self, message: str, cause: Cause = "failed") -> None:
        super().__init__(message)
        self.cause: Cause = cause


class LinkBroken(RuntimeError):
    """A hidden state could not be sent or received. Raised in a stage, whose weights are as good as before."""

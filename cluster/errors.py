"""Everything that can go wrong in a pipeline, as exceptions.

CaravanError
├── RequestRejected   the request can never run here (a `ValueError`: the client must change it)
├── RequestFailed     something went wrong with this request alone; trying again would not help
├── EngineStopped     the engine is closing or has failed; the request may run elsewhere
└── StageDied         a stage exited, hung past its deadline or answered nonsense
"""


class CaravanError(Exception):
    """Base of every error Caravan raises on purpose."""


class RequestRejected(CaravanError, ValueError):
    """The request can never run on this engine; the message says why."""


class RequestFailed(CaravanError):
    """Handling this request failed, and no other one with it; the message is for the log."""


class EngineStopped(CaravanError):
    """The engine no longer takes or finishes requests; the message gives the first cause."""


class StageDied(CaravanError):
    """A stage can no longer compute; the message names the stage, its node and the first cause."""

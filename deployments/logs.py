"""Structured logs: one JSON object a line, with fields from a closed list, so that no prompt text can slip in."""

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

FIELDS = (
    "request_id", "tenant", "endpoint", "outcome", "prompt_tokens", "completion_tokens", "ttft_s", "e2e_s",
    "status", "parts_s", "audit", "replica", "stage",
)  # fmt: skip


PROMPT_FIELDS = ("prompt", "answer")  # only where `logging.log_prompts` is on

# What is known of the request that is being served. One dictionary, shared by the tasks that serve it.
_bound: ContextVar[dict[str, Any]] = ContextVar("bound")


def begin(**fields: Any) -> None:
    """From now on every line of this task, and of those it starts, carries these fields."""
    _bound.set(fields)


def bind(**fields: Any) -> None:
    """More of them, or newer ones."""
    _bound.get({}).update(fields)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, the known extra fields, those of `always`, and a traceback if there is one."""

    def __init__(self, fields: tuple[str, ...] = FIELDS, **always: str) -> None:
        super().__init__()
        self._fields = fields
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        known = {**self._always, **_bound.get({}), **vars(record)}
        line |= {name: known[name] for name in self._fields if known.get(name) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str = "INFO", log_prompts: bool = False, **always: str) -> None:
    """Send the logs of our own packages to standard error, as JSON; everybody else's stay as they are.

    The fields `always` are on every line, unless it has its own.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter((*FIELDS, *PROMPT_FIELDS) if log_prompts else FIELDS, **always))
    for package in ("model", "cluster", "deployments", "ops"):
        logger = logging.getLogger(package)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("deployments.telemetry.audit").setLevel(logging.INFO)  # whatever else is not wanted

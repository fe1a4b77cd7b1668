"""Structured logs: one JSON object a line, with fields from a closed list, so that no prompt text can slip in."""

import json
import logging
import sys
import time
from typing import Any

FIELDS = (
    "request_id", "tenant", "endpoint", "outcome", "prompt_tokens", "completion_tokens", "ttft_s", "e2e_s",
    "replica", "stage",
)  # fmt: skip


PROMPT_FIELDS = ("prompt", "answer")  # only where `logging.log_prompts` is on


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, the known extra fields, and a traceback if there is one."""

    def __init__(self, fields: tuple[str, ...] = FIELDS) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in self._fields if getattr(record, name, None) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: int = logging.INFO, log_prompts: bool = False) -> None:
    """Send the logs of our own packages to standard error, as JSON; everybody else's stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter((*FIELDS, *PROMPT_FIELDS) if log_prompts else FIELDS))
    for package in ("model", "cluster", "deployments", "ops"):
        logger = logging.getLogger(package)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False

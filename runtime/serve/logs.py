"""Logs: a line of JSON on standard error for each answer and each event. No line has a prompt, a picture or a key."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

LOGGER = logging.getLogger("prebake.serve")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; `extra={"facts": {...}}` are further keys."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, Any] = {"time": at, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


LOG_CONFIG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonFormatter}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False} for name in ("prebake.serve", "uvicorn")
    },
}
"""uvicorn's `log_config`. Its access log is off: `app.py` has its own."""


def log_event(event: str, **facts: Any) -> None:
    LOGGER.info(event, extra={"facts": {name: value for name, value in facts.items() if value is not None}})


def log_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """In the place of `warnings.showwarning`, which would print what of a prompt was cut off."""
    LOGGER.warning(str(message).partition("; cut off: ")[0], extra={"facts": {"category": category.__name__}})


def log_failure(event: str, error: BaseException, *, bug: bool = False, **facts: Any) -> None:
    """The error as a sentence; with its traceback where it is a bug."""
    told = {**facts, "error": str(error)}
    LOGGER.error(event, exc_info=error if bug else None, extra={"facts": told})

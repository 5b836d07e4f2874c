"""Log lines: one JSON object each, on standard error, every line carrying the request it belongs to.

A line holds time, level, logger, process, message, request_id (when inside a request) and whatever `extra` the caller
gave. It never holds a prompt, a completion or a key: nothing in the service passes one to a logger. json.dumps escapes
control characters and everything beyond ASCII, so no input can start a line of its own or colour a terminal.
"""

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

request_id_of_context: ContextVar[str | None] = ContextVar("request_id", default=None)

# What logging itself puts on a record; the rest came through `extra` and is ours to print.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

# Libraries that tell more than an operator wants at the level of our own lines.
_NOISY = ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "uvicorn.error", "dbos", "transformers")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        request_id = request_id_of_context.get()
        if request_id is not None:
            line["request_id"] = request_id
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Send every logger of the process through one JSON handler.

    Args:
        level: debug, info, warning or error; libraries speak from warning on, except at debug.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    if level != "debug":
        for name in _NOISY:
            logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def adopt_logger(name: str, level: int = logging.WARNING) -> None:
    """Send a library's lines through our handler, where it brought its own.

    Args:
        name: of the library's top logger; call after importing the library.
        level: least level that is of interest.
    """
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(level)

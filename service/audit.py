"""Who did what to this server, when, from where, and how it ended: one JSON object a line.

    {"time": ..., "action": "load_model", "method": "POST", "route": "/admin/models/load", "key_id": "alice",
     "source": "10.0.0.7", "request_id": ..., "target": {"path": "smol-3bit"}, "result": "smol",
     "status": 200, "outcome": "done", "error": null, "seconds": 3.1}

The line goes to the log and, where a file is named, to the end of that. The file is opened for each line and only
appended to, so a tool like logrotate may move it at any time, and nobody has to be told. A line that cannot be written
there is in the log all the same, with the reason.

A key is never in it: keys are not handed to anybody behind the guard, and what looks like one in a path or a body,
where somebody pasted it by mistake, is struck out.
"""

import json
import logging
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

KEY_LIKE = re.compile(r"ob-[A-Za-z0-9_-]{16,}")
MOST_TARGET_CHARACTERS = 256


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One request to the admin API.

    Attributes:
        action: what was asked for, such as load_model.
        method: of HTTP.
        route: the path's template.
        key_id: whose key it was; None if it was not a known one.
        source: address of the client, or of the proxy before the server; headers that name another are not believed.
        request_id: as in the answer and in the log.
        target: what it was about.
        result: id of what the answer is about, such as the job that was launched; None where it names none.
        status: of the answer.
        outcome: done, refused (the caller's fault) or failed (ours).
        error: code of the error; None if it was done.
        seconds: until the answer.
    """

    action: str
    method: str
    route: str
    key_id: str | None
    source: str | None
    request_id: str | None
    target: dict[str, str]
    result: str | None
    status: int
    outcome: str
    error: str | None
    seconds: float


class AuditLog:
    """Where entries go.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is not None:
            self._append(file, b"")

    def write(self, entry: AuditEntry) -> None:
        """Write one entry down."""
        values = {**asdict(entry), "target": {name: _clean(value) for name, value in entry.target.items()}}
        values["result"] = None if entry.result is None else _clean(entry.result)
        logger.info("audit", extra=values)
        if self._file is None:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        try:
            self._append(self._file, (json.dumps({"time": stamp, **values}) + "\n").encode())
        except OSError as error:
            logger.error("the audit file %s cannot be written: %s", self._file, error)  # noqa: TRY400

    @staticmethod
    def _append(file: Path, line: bytes) -> None:
        """Add a line with one call of the system, so that lines of several servers do not mix."""
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if line and os.write(descriptor, line) != len(line):
                raise OSError("the line was cut short; the disk may be full")
        finally:
            os.close(descriptor)


def _clean(value: Any) -> str:
    return KEY_LIKE.sub("ob-...", str(value))[:MOST_TARGET_CHARACTERS]

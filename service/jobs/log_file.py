"""Reads a part of what a job's command wrote to standard error.

The path is the job's folder and a fixed name, both ours; a link in its place is not followed, nor is anything but a
plain file opened.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from service.errors import BadRequest
from service.jobs.process import LOG_FILE

MAX_BYTES = 1 << 20
MAX_LINES = 10_000


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """A part of a log.

    Attributes:
        content: its bytes.
        next_offset: where the part after it begins.
        size: of the whole log.
    """

    content: bytes
    next_offset: int
    size: int


def read_log(folder: Path, *, tail: int | None, offset: int | None, limit: int) -> LogPart:
    """Read the last lines, or bytes from an offset on; a log that is not there yet is empty.

    Args:
        folder: the job's.
        tail: how many lines; None for all that `limit` allows.
        offset: first byte, if not the last lines are asked for.
        limit: bytes at most.

    Raises:
        BadRequest: both were asked for.
    """
    if tail is not None and offset is not None:
        raise BadRequest("tail and offset exclude each other: the last lines, or bytes from an offset on", param="tail")
    try:
        file = os.open(folder / LOG_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return LogPart(content=b"", next_offset=0, size=0)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            return LogPart(content=b"", next_offset=0, size=0)
        size = found.st_size
        start = min(offset, size) if offset is not None else max(0, size - limit)
        content = os.pread(file, limit, start)
    finally:
        os.close(file)
    end = start + len(content)
    if tail is not None:
        content = b"".join(content.splitlines(keepends=True)[-tail:])
    return LogPart(content=content, next_offset=end, size=size)

"""One writer at a time in a job's folder, whatever the database believes.

A worker that seems dead loses its job to another; if it was only asleep, both would write the same files. So whoever
writes in the folder holds a lock (flock) on FOLDER/lock, and the command itself holds it, not the worker:

    worker --opens and locks--> FOLDER/lock --inherited by--> command     the worker's own handle is closed

The kernel lets go of the lock when the last process that holds it ends, however it ends. Who comes later waits; a
command on the same machine that still runs for a worker who lost the job is killed. FOLDER/lock names its holder.
"""

import asyncio
import fcntl
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
POLL_SECONDS = 0.2


@asynccontextmanager
async def fenced(folder: Path) -> AsyncIterator[int]:
    """Be the only writer of a job's folder; whoever is, and runs on this machine, is killed, and waited for otherwise.

    Args:
        folder: the job's; made if need be. The job must be ours by the database.

    Yields:
        The lock's descriptor. A child that inherits it keeps the lock after the block.

    Raises:
        OSError: the folder cannot be made, or its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not in a thread, which could not be cancelled and would keep the lock: these calls do not block.
    is_told = False
    while (lock := _try_lock(folder)) is None:
        if not is_told:
            logger.warning("%s: another command still writes here; ending it, or waiting for its end", folder)
        is_told = True
        _end_holder(folder)
        await asyncio.sleep(POLL_SECONDS)
    try:
        yield lock
    finally:
        os.close(lock)


def is_busy(folder: Path) -> bool:
    """Whether somebody writes in a job's folder now."""
    if not (folder / LOCK_FILE).exists():
        return False
    lock = _try_lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is None


def name_holder(lock: int, process_id: int) -> None:
    """Write down which process group holds the lock from now on."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{socket.gethostname()} {process_id}\n".encode(), 0)


def _try_lock(folder: Path) -> int | None:
    """Take the lock if it is free."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return lock


def _end_holder(folder: Path) -> None:
    """Kill the holder if it is a command of this very job on this machine; a number alone may be anybody's by now."""
    with suppress(OSError):
        host, _, number = (folder / LOCK_FILE).read_text(errors="replace").strip().partition(" ")
        is_here = host == socket.gethostname() and number.isdigit()
        if is_here and os.fsencode(folder) in Path(f"/proc/{number}/cmdline").read_bytes():
            os.killpg(int(number), signal.SIGKILL)

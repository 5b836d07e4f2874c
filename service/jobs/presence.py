"""Who is there to run jobs: each worker holds a lock on its executor id for as long as it lives.

    SQLite       flock on a file beside the database        free when the process has ended
    PostgreSQL   advisory lock of a session                 free when the session has ended

A session ends with its process, with its machine (the database notices within 15 seconds), and when another worker
finds that it was silent for half a minute and ends it: a process that was stopped, or whose machine hangs. A lock that
is free says that the worker is dead; `service.jobs.recovery` gives its jobs to others. Two workers of one id would each
take the other's job for its own, so the second is refused at start.
"""

import fcntl
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import psycopg
from sqlalchemy.engine import make_url

from service.jobs.database import connection_url, is_sqlite

LOCK_CLASS = 0x0EB17
"""First half of our advisory locks' keys; the second is a hash of the executor id."""

SILENT_SECONDS = 30
SESSION_NAME = "onebit-worker "

WATCHFUL = (
    "SET tcp_keepalives_idle = 5",
    "SET tcp_keepalives_interval = 2",
    "SET tcp_keepalives_count = 3",
    "SET tcp_user_timeout = 10000",
    "SET statement_timeout = 10000",
)
"""Makes the database notice that we are gone. Over a Unix socket, where the kernel tells, they mean nothing."""


class PresenceLost(Exception):
    """The lock on the executor id is not ours any more, or the database does not answer."""


class Presence(Protocol):
    """The lock on one executor id, and a look at those of others."""

    def take(self) -> bool:
        """Try to get the lock; False if another worker has it."""
        ...

    def keep(self) -> None:
        """Say that we are still there.

        Raises:
            PresenceLost: the lock is gone.
        """
        ...

    def is_gone(self, executor_id: str) -> bool:
        """Whether no worker of that id lives.

        Raises:
            PresenceLost: the database does not answer.
        """
        ...

    def leave(self) -> None:
        """Let the lock go."""
        ...


def presence_of(database_url: str, executor_id: str) -> Presence:
    """Return the lock that fits the database."""
    if is_sqlite(database_url):
        return FilePresence(Path(database_url.removeprefix("sqlite:///")), executor_id)
    return SessionPresence(database_url, executor_id)


class FilePresence:
    """A lock on DATABASE.EXECUTOR.lock."""

    def __init__(self, database: Path, executor_id: str) -> None:
        self._database = database
        self._executor_id = executor_id
        self._lock: int | None = None

    def take(self) -> bool:
        """Try to get the lock."""
        self._lock = self._lock if self._lock is not None else self._try(self._executor_id)
        return self._lock is not None

    def keep(self) -> None:
        """Nothing to do: the kernel keeps it."""

    def is_gone(self, executor_id: str) -> bool:
        """Try the other's lock."""
        lock = self._try(executor_id)
        if lock is not None:
            os.close(lock)
        return lock is not None

    def leave(self) -> None:
        """Let the lock go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _try(self, executor_id: str) -> int | None:
        file = self._database.with_name(f"{self._database.name}.{executor_id}.lock")
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock


class SessionPresence:
    """A session's advisory lock, in a connection of its own."""

    def __init__(self, database_url: str, executor_id: str) -> None:
        url = make_url(connection_url(database_url))
        self._url = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._executor_id = executor_id
        self._connection: psycopg.Connection[Any] | None = None

    def take(self) -> bool:
        """Connect and try to get the lock.

        Raises:
            PresenceLost: the database does not answer.
        """
        self.leave()
        try:
            # Pings keep the session's `state_change` young; others read it and its name.
            name = f"{SESSION_NAME}{_key(self._executor_id)}"
            self._connection = psycopg.connect(self._url, autocommit=True, application_name=name)
            for statement in WATCHFUL:
                self._connection.execute(statement)
        except psycopg.Error as error:
            raise PresenceLost(str(error).partition("\n")[0]) from None
        if self._row("SELECT pg_try_advisory_lock(%s, %s)", LOCK_CLASS, _key(self._executor_id)) == (True,):
            return True
        self.leave()
        return False

    def keep(self) -> None:
        """Use the session, so that others see us; it fails when the session is gone, and the lock with it."""
        self._row("SELECT 1")

    def is_gone(self, executor_id: str) -> bool:
        """Try the other's lock, after ending a session of its that is silent."""
        key = _key(executor_id)
        self._row(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = %s "
            "AND usename = current_user AND datname = current_database() "
            "AND state_change < clock_timestamp() - make_interval(secs => %s)",
            f"{SESSION_NAME}{key}",
            SILENT_SECONDS,
        )
        if self._row("SELECT pg_try_advisory_lock(%s, %s)", LOCK_CLASS, key) != (True,):
            return False
        self._row("SELECT pg_advisory_unlock(%s, %s)", LOCK_CLASS, key)
        return True

    def leave(self) -> None:
        """End the session."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.close()
            self._connection = None

    def _row(self, statement: str, *parameters: object) -> tuple[Any, ...] | None:
        if self._connection is None:
            raise PresenceLost("there is no session with the jobs' database")
        try:
            return self._connection.execute(statement.encode(), parameters).fetchone()
        except psycopg.Error as error:
            raise PresenceLost(str(error).partition("\n")[0]) from None


def _key(executor_id: str) -> int:
    """Hash an executor id to what an advisory lock's key can hold."""
    return zlib.crc32(executor_id.encode()) & 0x7FFFFFFF

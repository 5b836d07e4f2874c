"""The worker process: one job at a time, from the queue.

    onebit-serve --starts--> python -m service.jobs.worker --supervised     one machine: SQLite or PostgreSQL
    onebit-worker --artifact-root DIR                                       other machines and pods: PostgreSQL

A supervised worker gets the database's URL on standard input and runs until that ends, which is how it learns that the
server is gone, however that died; every two seconds it writes its sign of life to standard output. `onebit-worker` runs
until SIGTERM. On the way out either kills its child; the job stays on record as running and goes on when a worker of
that id starts again, or another worker finds it abandoned (`service.jobs.recovery`).

Every worker has an id of its own that outlives restarts, so one GPU with its own id is one job at a time on that GPU.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable

from dbos import DBOS, DBOSClient
from sqlalchemy.exc import SQLAlchemyError

from service.jobs import workflow
from service.jobs.database import (
    APPLICATION,
    APPLICATION_VERSION,
    POLLING_SECONDS,
    QUEUE,
    SERIALIZER,
    adopt_dbos_logger,
    connection_url,
)
from service.jobs.presence import Presence, PresenceLost, presence_of
from service.jobs.process import Command
from service.jobs.recovery import Reaper, hand_over, is_taken, running_jobs
from service.jobs.supervisor import REFUSED
from service.jobs.worker_options import executor_id, wait_for_end, wait_for_signal, worker_options
from service.log import configure_logging

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
PATIENCE_SECONDS = 10.0
"""How long a predecessor of our id may take to end; a killed one's session may need a moment."""

Wait = Callable[[float], bool]
"""Waits for so many seconds; true once the worker is to end."""


def main(arguments: list[str] | None = None) -> None:
    """Run jobs until told to stop; the command `onebit-worker`."""
    options = worker_options(sys.argv[1:] if arguments is None else arguments)
    configure_logging(options.log_level)
    if options.gpu is not None:
        os.putenv("CUDA_VISIBLE_DEVICES", str(options.gpu))  # for our commands; we use no GPU ourselves
    Command.device = options.device
    wait = wait_for_end(sys.stdin.fileno()) if options.supervised else wait_for_signal()
    database_url = options.database_url()
    code = 0
    if database_url and not wait(0):
        code = _run(database_url, executor_id(options, database_url, socket.gethostname()), wait)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # DBOS' threads would wait for the job at hand


def _run(database_url: str, own_id: str, wait: Wait) -> int:
    """Become the worker of our id, and be it to the end; returns the exit code."""
    presence = presence_of(database_url, own_id)
    try:
        if not _arrive(presence, wait):
            logger.error(
                "a worker with the id %s runs already on this database; stop it, or choose another id "
                "(--job-worker-id)",
                own_id,
            )
            return REFUSED
        run_jobs(database_url, own_id, presence, wait)
    except (PresenceLost, SQLAlchemyError, OSError) as error:
        logger.error("the jobs' database cannot be used: %s", str(error).partition("\n")[0])  # noqa: TRY400
        return 1
    return 0


def run_jobs(database_url: str, own_id: str, presence: Presence, wait: Wait) -> None:
    """Take jobs from the queue until told to stop, or until another worker has our id."""
    DBOS(
        config={
            "name": APPLICATION,
            "system_database_url": connection_url(database_url),
            "executor_id": own_id,
            "application_version": APPLICATION_VERSION,
            "serializer": SERIALIZER,
            "run_migrations": True,
            "log_level": "WARNING",
        }
    )
    adopt_dbos_logger()
    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=POLLING_SECONDS, on_conflict="always_update")
    # DBOS itself waits, longer and longer, for a database that is away; who looks after the workers must not.
    client = DBOSClient(
        system_database_url=connection_url(database_url),
        serializer=SERIALIZER,
        application_name=APPLICATION,
        retry_connection_errors=False,
    )
    watch = Watch(own_id, presence, client)
    logger.info("job worker is ready", extra={"executor_id": own_id})
    while not wait(HEARTBEAT_SECONDS):
        _beat()
        if not watch.look():
            break
    Command.kill_for_good()
    presence.leave()


class Watch:
    """What a worker does every two seconds beside its job."""

    def __init__(self, own_id: str, presence: Presence, client: DBOSClient) -> None:
        self._own_id = own_id
        self._presence = presence
        self._client = client
        self._reaper = Reaper(own_id, presence, workflow.running_here)
        self._is_away = False
        self._lost_since: float | None = None

    def look(self) -> bool:
        """Keep the lock on our id, drop a job that was given away, find abandoned ones.

        Returns:
            False once another worker has had our id for a while, who was started while the database was away.
        """
        try:
            if not self._keep_lock():
                return self._lost_since is None or time.monotonic() - self._lost_since < PATIENCE_SECONDS
            self._drop_lost_job()
            abandoned = self._reaper.abandoned(running_jobs(self._client))
            if abandoned:
                logger.warning("jobs of %s were abandoned; back to the queue: %s", abandoned, hand_over(abandoned))
        except (PresenceLost, SQLAlchemyError, OSError) as error:
            if not self._is_away:
                logger.warning("the jobs' database is away: %s", str(error).partition("\n")[0])
            self._is_away = True
            self._reaper.suspects.clear()
        else:
            if self._is_away:
                logger.info("the jobs' database is back")
            self._is_away = False
        return True

    def _keep_lock(self) -> bool:
        """Keep the lock, or take it again after the session was lost."""
        try:
            if self._lost_since is None:
                self._presence.keep()
                return True
        except PresenceLost:
            self._reaper.suspects.clear()
        if self._presence.take():
            self._lost_since = None
            return True
        self._lost_since = self._lost_since or time.monotonic()
        return False

    def _drop_lost_job(self) -> None:
        command = Command.running
        if command is not None and is_taken(self._client, command.job_id, self._own_id):
            logger.warning("job %s was given to another worker; ending its command", command.job_id)
            command.kill()


def _arrive(presence: Presence, wait: Wait) -> bool:
    """Take the lock on our id; a predecessor may still be on its way out."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not presence.take():
        if time.monotonic() > deadline or wait(0.5):
            return False
    return True


def _beat() -> None:
    """Give a sign of life."""
    sys.stdout.write(f"{time.time():.3f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The worker process: `python -m service.jobs.worker --folder FOLDER`, with the database's URL on standard input.

It runs one job at a time until its standard input ends, which is how it learns that the server is gone, however that
died. On the way out it kills its child; the job stays on record as running and goes on when a worker starts again.
A lock on the folder keeps a second worker (a second server on the same folder) from running the same jobs. Every two
seconds it writes a line to standard output, its sign of life.
"""

import argparse
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import IO

from dbos import DBOS

from service.jobs import workflow  # noqa: F401  (importing it registers the workflow with DBOS)
from service.jobs.database import (
    APPLICATION,
    APPLICATION_VERSION,
    POLLING_SECONDS,
    QUEUE,
    SERIALIZER,
    adopt_dbos_logger,
)
from service.jobs.process import Command
from service.log import configure_logging

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
LOCK_FILE = "worker.lock"


def main(arguments: list[str]) -> None:
    """Run jobs until the server that started us is gone."""
    parser = argparse.ArgumentParser(prog="onebit-worker")
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args(arguments)
    configure_logging(options.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when we end
    database_url = sys.stdin.readline().strip()
    with (options.folder / LOCK_FILE).open("a") as lock:
        if database_url and _wait_for_lock(lock):
            run_jobs(database_url)
    logging.shutdown()
    os._exit(0)  # DBOS' threads would wait for the job at hand


def run_jobs(database_url: str) -> None:
    """Take jobs from the queue until standard input ends."""
    DBOS(
        config={
            "name": APPLICATION,
            "system_database_url": database_url,
            "executor_id": executor_id(database_url),
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
    logger.info("job worker is ready")
    while not _server_is_gone(HEARTBEAT_SECONDS):
        _beat()
    Command.kill_for_good()


def executor_id(database_url: str) -> str:
    """Whose jobs this worker takes up again after a crash.

    A SQLite file belongs to one server, whatever its host is called today (a container's name changes at every start);
    a PostgreSQL database may be shared, so there the host's name tells servers apart.
    """
    return "local" if database_url.startswith("sqlite") else socket.gethostname()


def _wait_for_lock(lock: IO[str]) -> bool:
    """Become the only worker of the folder; False if the server went away first."""
    waiting = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                logger.warning("another worker holds %s; waiting for it to end", lock.name)
            waiting = True
            if _server_is_gone(1.0):
                return False
        else:
            return True


def _server_is_gone(timeout_seconds: float) -> bool:
    """Wait for the end of standard input."""
    readable, _, _ = select.select([sys.stdin], [], [], timeout_seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def _beat() -> None:
    """Give a sign of life."""
    sys.stdout.write(f"{time.time():.3f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

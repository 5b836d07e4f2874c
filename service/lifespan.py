"""What runs as long as the server: engines, jobs, the watcher between them. Started in order, stopped in reverse.

The port is open before the models are loaded, so probes get an answer: alive, not ready. A model that cannot be loaded
at start ends the server through `on_start_failure`.

Stopping has a deadline. From SIGTERM on the server is not ready and takes nothing new; running requests may finish
until `drain_seconds` have passed, then the engines stop, which ends each open stream with an error event. Then
uvicorn closes connections and `_stop` does the rest.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from onebit_core.errors import OnebitError
from service.errors import JobsUnavailable, ServiceError
from service.jobs.client import JobClient
from service.jobs.database import is_sqlite
from service.jobs.loader import load_finished_jobs
from service.jobs.pruning import prune_jobs
from service.jobs.supervisor import WorkerSupervisor
from service.registry.registry import ModelRegistry
from service.settings import Settings

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 5.0


class Lifespan:
    """The long-lived parts of one server.

    Attributes:
        jobs: the jobs' client; None where there are no jobs.
        on_start_failure: called with one sentence when a model cannot be loaded at start, jobs cannot be kept, or what
            runs beside the server has died of a bug.
    """

    def __init__(self, settings: Settings, registry: ModelRegistry) -> None:
        self.jobs: JobClient | None = None
        self.on_start_failure: Callable[[str], None] = _only_log
        self._settings = settings
        self._registry = registry
        self._worker: WorkerSupervisor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        folder, database_url = settings.jobs_folder, settings.database_url
        if folder is not None and database_url is not None:
            self.jobs = JobClient(database_url, self._last_heartbeat)
            if settings.job_worker:
                self._worker = WorkerSupervisor(
                    database_url, settings.job_worker_id, settings.device, settings.log_level
                )
                self._worker.on_refused = self._refuse

    def _refuse(self, message: str) -> None:
        self.on_start_failure(message)

    def _last_heartbeat(self) -> float:
        return self._worker.last_heartbeat if self._worker is not None else 0.0

    @asynccontextmanager
    async def run(self, _app: object) -> AsyncIterator[None]:
        """Start everything, serve, stop everything; the application's lifespan."""
        await self._start()
        try:
            yield
        finally:
            await self._stop()

    async def _start(self) -> None:
        self._run_beside(self._load_models(), "load-models")
        if self.jobs is not None:
            await self._start_jobs(self.jobs)

    async def _start_jobs(self, jobs: JobClient) -> None:
        """Open the jobs' database, start the worker, and watch for what it makes."""
        assert self._settings.jobs_folder is not None
        is_connected = True
        try:
            self._settings.jobs_folder.mkdir(parents=True, exist_ok=True)
            await jobs.start()
        except OSError as error:
            self.on_start_failure(f"jobs cannot be kept in {self._settings.jobs_folder}: {error}")
            return
        except JobsUnavailable as error:
            if error.retry_after_seconds is None or is_sqlite(self._settings.database_url or ""):
                self.on_start_failure(f"jobs cannot be recorded: {error}; the log says why (--jobs-database-url)")
                return
            is_connected = False  # the database is not there yet; models are served meanwhile
        if self._worker is not None:
            self._worker.start()
        self._run_beside(self._watch_jobs(jobs, is_connected=is_connected), "watch-jobs")

    async def _watch_jobs(self, jobs: JobClient, *, is_connected: bool) -> None:
        """Serve what jobs make, and forget old jobs."""
        while not is_connected:
            await asyncio.sleep(RECONNECT_SECONDS)
            with suppress(JobsUnavailable):
                await jobs.start()
                is_connected = True
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load_finished_jobs(jobs, self._registry.load))
            if self._settings.job_keep_days:
                tasks.create_task(prune_jobs(jobs, self._settings.job_keep_days))

    async def _load_models(self) -> None:
        """Load the models named at start; a server without one of them is of no use."""
        try:
            await self._registry.load_initial(self._settings.artifacts)
        except (OnebitError, ServiceError) as error:
            self.on_start_failure(str(error))

    def drain(self) -> None:
        """Take nothing new from now on, and end what runs when its time is over."""
        self._registry.close()
        if self.jobs is not None:
            self.jobs.is_ending = True
        seconds = self._settings.shutdown_grace_seconds - self._settings.tail_seconds
        self._run_beside(self._end_requests(seconds), "drain")

    def _run_beside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run until the server stops; a bug in it ends the server, which would wait for it in vain."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._see_end)
        self._tasks.append(task)

    def _see_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        logger.error("%s failed", task.get_name(), exc_info=error)
        self.on_start_failure(f"{task.get_name()} failed: {type(error).__name__}: {error}")

    async def _end_requests(self, drain_seconds: float) -> None:
        await asyncio.sleep(drain_seconds)
        logger.warning("requests still run at the end of the grace period; ending them")
        await self._registry.stop()

    async def _stop(self) -> None:
        """Stop in the reverse order of starting."""
        self._registry.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._worker is not None:
            await self._worker.stop(self._settings.tail_seconds)
        if self.jobs is not None:
            await self.jobs.stop()
        await self._registry.stop()


def _only_log(message: str) -> None:
    logger.error("the server cannot do its work: %s", message)

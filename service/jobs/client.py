"""The API's side of the jobs: submit, look, cancel, resume, delete. It never runs one.

The database has threads of its own here and a deadline, so one that does not answer makes job routes answer 503 and
touches nothing else; there is nothing to do when it is back.
"""

import asyncio
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from dbos import DBOS, DBOSClient, WorkflowStatus
from dbos import error as dbos_error
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.errors import Conflict, JobNotFound, JobsUnavailable
from service.jobs.database import (
    APPLICATION,
    APPLICATION_VERSION,
    POLLING_SECONDS,
    QUEUE,
    SERIALIZER,
    WORKFLOW,
    adopt_dbos_logger,
    connection_url,
)
from service.jobs.fence import is_busy
from service.jobs.idempotency import HEADER, IdempotencyKey
from service.jobs.measuring import Census, JobObserver
from service.jobs.records import LOAD_ERROR, LOADED, REQUEST, attributes_of, awaits_load, job_of, spec_of, state_of
from service.jobs.types import (
    HIGHEST_PRIORITY,
    MAX_LISTED,
    SERVE_STAGE,
    Job,
    JobFilter,
    JobSpec,
    JobState,
)
from service.metrics import JobMetrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAGE = 200
DATABASE_SECONDS = 15.0
SCRAPE_SECONDS = 4.0
DATABASE_THREADS = 4
RETRY_SECONDS = 5.0
JOB_ID = re.compile(r"job-[0-9a-f]{32}")
ACTIVE = ("DELAYED", "ENQUEUED", "PENDING")


class JobClient:
    """Talks to the jobs' database.

    Attributes:
        heartbeat: tells when the worker last gave a sign of life, Unix seconds.
        is_ending: whether the server is about to stop, so that who follows a job must stop, too.
    """

    def __init__(self, database_url: str, heartbeat: Callable[[], float] = lambda: 0.0) -> None:
        self.is_ending = False
        self._database_url = database_url
        self._heartbeat = heartbeat
        self._observer = JobObserver()
        self._threads = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="jobs-database")
        self._client: DBOSClient | None = None

    async def start(self) -> None:
        """Make the database if there is none, and connect.

        Raises:
            JobsUnavailable: it does not answer.
        """
        adopt_dbos_logger()
        await self._in_thread(self._connect)

    def _connect(self) -> None:
        if self._database_url.startswith("sqlite:///"):
            Path(self._database_url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        DBOS.migrate(connection_url(self._database_url))
        client = DBOSClient(
            system_database_url=connection_url(self._database_url),
            serializer=SERIALIZER,
            application_name=APPLICATION,
            retry_connection_errors=False,  # a request must not wait for a database to come back
        )
        client.register_queue(
            QUEUE, worker_concurrency=1, polling_interval_sec=POLLING_SECONDS, on_conflict="always_update"
        )
        self._client = client

    async def stop(self) -> None:
        """Disconnect."""
        if self._client is not None:
            await asyncio.to_thread(self._client.destroy)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def submit(self, job_id: str, spec: JobSpec, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """Queue a job.

        Args:
            job_id: new, or that of `key`.
            spec: what to do.
            key: the caller's name for this submission, if there is one.

        Returns:
            The job, and whether it is new; with a key it may have been submitted before.

        Raises:
            Conflict: a job that makes an artifact of that name is under way; or the key came with another body before.
            JobsUnavailable: the database does not answer.
        """
        try:
            await self._in_thread(lambda: self._enqueue(job_id, spec, key))
        except dbos_error.DBOSWorkflowIDInUseError:
            pass
        except dbos_error.DBOSQueueDeduplicatedError:  # by the first post with this key, perhaps
            if key is None or await self.find(key) is None:
                raise Conflict(f"a job that makes {spec.name!r} is under way already", param="name") from None
        else:
            return await self.get(job_id), True
        assert key is not None, "ids without a key are new"
        job = await self.find(key)
        assert job is not None, "it was there a moment ago"
        return job, False

    def _enqueue(self, job_id: str, spec: JobSpec, key: IdempotencyKey | None) -> None:
        self._connected.enqueue(
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": job_id,
                "workflow_id_reuse_policy": "reject",
                "application_name": APPLICATION,
                "app_version": APPLICATION_VERSION,
                "deduplication_id": spec.name,
                "priority": HIGHEST_PRIORITY + 1 - spec.priority,  # DBOS runs the smallest first
                "attributes": {REQUEST: key.request_sha256} if key is not None else {},
            },
            spec.to_dict(),
        )

    async def find(self, key: IdempotencyKey) -> Job | None:
        """Look for the job of an idempotency key.

        Raises:
            Conflict: it came with another body.
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: self._find(key))

    def _find(self, key: IdempotencyKey) -> Job | None:
        found = self._connected.list_workflows(workflow_ids=[key.job_id])
        if not found:
            return None
        if attributes_of(found[0]).get(REQUEST) != key.request_sha256:
            raise Conflict(
                f"the {HEADER} {key.key!r} was used for another body, which became {key.job_id}; "
                "take a new key for a new job",
                param=HEADER,
            )
        return job_of(found[0], self._connected)

    async def get(self, job_id: str) -> Job:
        """Look at one job.

        Raises:
            JobNotFound: there is none of that id.
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: self._read(job_id))

    def _read(self, job_id: str) -> Job:
        return job_of(self._status(job_id), self._connected)

    def _status(self, job_id: str) -> WorkflowStatus:
        found = self._connected.list_workflows(workflow_ids=[job_id]) if JOB_ID.fullmatch(job_id) else []
        if not found:
            raise JobNotFound(f"there is no job {job_id[:64]!r}")
        return found[0]

    async def list_jobs(self) -> list[Job]:
        """Look at all jobs, newest first.

        Raises:
            JobsUnavailable: the database does not answer.
        """
        return (await self.select_jobs(JobFilter()))[0]

    async def select_jobs(self, wanted: JobFilter) -> tuple[list[Job], bool]:
        """Look at some jobs, newest first.

        Returns:
            The jobs, and whether there are more.

        Raises:
            JobNotFound: there is none to begin after.
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: self._select(wanted))

    def _select(self, wanted: JobFilter) -> tuple[list[Job], bool]:
        statuses = self._statuses()
        if wanted.after is not None:
            self._status(wanted.after)
            next((status for status in statuses if status.workflow_id == wanted.after), None)
        jobs: list[Job] = []
        for status in statuses:
            if wanted.state not in (None, state_of(status)):
                continue
            config = spec_of(status).config
            if wanted.method not in (None, config["method"]):
                continue
            if wanted.model not in (None, config["model"], config["model"].rpartition("/")[2]):
                continue
            if len(jobs) == wanted.limit:
                return jobs, True
            jobs.append(job_of(status, self._connected))
        return jobs, False

    def _statuses(self, state: str | list[str] | None = None) -> Iterator[WorkflowStatus]:
        """Every job on record, newest first, a page at a time."""
        offset = 0
        while True:
            page = self._connected.list_workflows(
                name=WORKFLOW, status=state, sort_desc=True, limit=PAGE, offset=offset
            )
            yield from page
            offset += len(page)
            if len(page) < PAGE:
                return

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job; a running one is stopped within seconds. Cancelling twice is harmless.

        Raises:
            JobNotFound: there is none of that id.
            Conflict: it has ended already.
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: self._cancel(job_id))

    def _cancel(self, job_id: str) -> Job:
        job = self._read(job_id)
        if job.progress.stage == SERVE_STAGE or (job.state.is_final and job.state is not JobState.CANCELLED):
            raise Conflict(f"job {job_id} has ended and cannot be cancelled")
        if job.state is not JobState.CANCELLED:
            self._connected.cancel_workflow(job_id)
        return self._read(job_id)

    async def resume(self, job_id: str) -> Job:
        """Queue a cancelled or failed job again; it goes on after its last finished block.

        Raises:
            JobNotFound: there is none of that id.
            Conflict: it neither failed nor was cancelled, or another job took its name.
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: self._resume(job_id))

    def _resume(self, job_id: str) -> Job:
        status = self._status(job_id)
        state, spec = state_of(status), spec_of(status)
        if state not in (JobState.FAILED, JobState.CANCELLED):
            raise Conflict(f"job {job_id} is {state}; only a failed or cancelled job can be resumed")
        rivals = (other for other in self._statuses(list(ACTIVE)) if other.workflow_id != job_id)
        if any(spec_of(other).name == spec.name for other in rivals):
            raise Conflict(f"another job that makes {spec.name!r} is under way; wait for its end or cancel it")
        if status.status == "SUCCESS":  # it could not be served
            self._connected.update_workflow_attributes(job_id, {LOAD_ERROR: None}, merge=True)
            return self._read(job_id)
        if Path(spec.artifact).exists() and not (Path(spec.folder) / "published").exists():
            raise Conflict(f"an artifact named {spec.name!r} exists by now; delete it, or submit under another name")
        try:
            self._connected.rewind_workflow(job_id, start_step=1, queue_name=QUEUE)
        except dbos_error.DBOSException as error:
            raise Conflict(f"job {job_id} cannot be resumed now ({error}); look at it again") from None
        return self._read(job_id)

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended: its record, and its folder with log and finished blocks.

        An artifact under its name stays; a rejected one is in the folder and goes.

        Raises:
            JobNotFound: there is none of that id.
            Conflict: it has not ended, or its command has not yet.
            JobsUnavailable: the database does not answer.
        """
        await self._in_thread(lambda: self._delete(self._read(job_id)))

    def _delete(self, job: Job) -> None:
        if not job.state.is_final:
            raise Conflict(f"job {job.id} is {job.state}; cancel it first")
        if is_busy(Path(job.folder)):
            raise Conflict(f"the command of job {job.id} is still ending; try again in some seconds")
        self._connected.delete_workflow(job.id)
        shutil.rmtree(job.folder, ignore_errors=True)

    async def prune(self, ended_before: float) -> list[str]:
        """Delete the jobs that ended before a time, Unix seconds; returns their ids.

        Raises:
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: list(self._prune(ended_before)))

    def _prune(self, ended_before: float) -> Iterator[str]:
        old = [status for status in self._statuses() if (status.updated_at or 0) / 1000 < ended_before]
        for status in old:
            job = job_of(status, self._connected)
            if job.state.is_final and job.updated < ended_before and not is_busy(Path(job.folder)):
                self._delete(job)
                yield job.id

    async def awaiting_load(self) -> dict[str, JobSpec]:
        """Jobs whose artifact is written and is to be served now: id to specification."""
        return await self._in_thread(self._awaiting_load)

    def _awaiting_load(self) -> dict[str, JobSpec]:
        finished = self._connected.list_workflows(name=WORKFLOW, status="SUCCESS", limit=MAX_LISTED, sort_desc=True)
        return {status.workflow_id: spec_of(status) for status in finished if awaits_load(status)}

    async def note_loaded(self, job_id: str, error: str | None) -> None:
        """Record that a job's artifact is served, or why it is not."""
        attributes = {LOADED: True} if error is None else {LOAD_ERROR: error}
        await self._in_thread(lambda: self._connected.update_workflow_attributes(job_id, attributes, merge=True))

    async def refresh_metrics(self, metrics: JobMetrics) -> None:
        """Bring the job metrics up to date; a database that does not answer leaves them as they are."""
        metrics.heartbeat.set(self._heartbeat())
        try:
            census = await self._in_thread(self._count, SCRAPE_SECONDS)
        except JobsUnavailable:
            return
        self._observer.publish(census, metrics)

    def _count(self) -> Census:
        """Read all records, and look closer at those that run; a scrape must not ask once for every old job."""
        statuses = list(self._statuses())
        running = [job_of(status, self._connected) for status in statuses if state_of(status) is JobState.RUNNING]
        return Census(statuses=statuses, running=running)

    @property
    def _connected(self) -> DBOSClient:
        if self._client is None:
            raise JobsUnavailable("the jobs' database does not answer yet", retry_after_seconds=RETRY_SECONDS)
        return self._client

    async def _in_thread(self, work: Callable[[], T], seconds: float = DATABASE_SECONDS) -> T:
        """Run database work off the event loop; a database behind a cut cable says neither yes nor no."""
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except (SQLAlchemyError, OSError) as error:  # a timeout is an OSError
            logger.warning("the jobs' database does not answer: %s", str(error).partition("\n")[0] or "timeout")
            may_come_back = isinstance(error, (DBAPIError, PoolTimeout, OSError))
            after = RETRY_SECONDS if may_come_back else None
            raise JobsUnavailable("the jobs' database does not answer", retry_after_seconds=after) from None

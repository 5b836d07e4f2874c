"""The API's side of the jobs: submit, look, cancel. It never runs one."""

import asyncio
import logging
import re
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dbos import DBOS, DBOSClient, WorkflowStatus
from dbos import error as dbos_error
from sqlalchemy.exc import SQLAlchemyError

from service.errors import Conflict, JobNotFound, JobsUnavailable
from service.jobs.database import (
    APPLICATION,
    APPLICATION_VERSION,
    POLLING_SECONDS,
    PROGRESS_EVENT,
    QUEUE,
    SERIALIZER,
    WORKFLOW,
    adopt_dbos_logger,
)
from service.jobs.types import SERVE_STAGE, STATE_OF_DBOS, Job, JobSpec, JobState, Progress
from service.metrics import JOB_STATES, JobMetrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_LISTED = 1000
JOB_ID = re.compile(r"job-[0-9a-f]{32}")

# Attributes we keep on a workflow.
LOADED = "loaded"
LOAD_ERROR = "load_error"


class JobClient:
    """Talks to the jobs' database.

    Attributes:
        heartbeat: tells when the worker last gave a sign of life, Unix seconds.
    """

    def __init__(self, database_url: str, heartbeat: Callable[[], float] = lambda: 0.0) -> None:
        self._database_url = database_url
        self._heartbeat = heartbeat
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
        DBOS.migrate(self._database_url)
        self._client = DBOSClient(
            system_database_url=self._database_url, serializer=SERIALIZER, application_name=APPLICATION
        )
        self._client.register_queue(
            QUEUE, worker_concurrency=1, polling_interval_sec=POLLING_SECONDS, on_conflict="always_update"
        )

    async def stop(self) -> None:
        """Disconnect."""
        if self._client is not None:
            await asyncio.to_thread(self._client.destroy)

    async def submit(self, spec: JobSpec) -> Job:
        """Queue a job.

        Raises:
            Conflict: a job that makes an artifact of that name is queued or running.
            JobsUnavailable: the database does not answer.
        """
        job_id = f"job-{uuid.uuid4().hex}"
        try:
            await self._in_thread(lambda: self._enqueue(job_id, spec))
        except dbos_error.DBOSQueueDeduplicatedError:
            raise Conflict(f"a job that makes {spec.name!r} is under way already", param="name") from None
        return await self.get(job_id)

    def _enqueue(self, job_id: str, spec: JobSpec) -> None:
        self._connected.enqueue(
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": job_id,
                "application_name": APPLICATION,
                "app_version": APPLICATION_VERSION,
                "deduplication_id": spec.name,
            },
            spec.to_dict(),
        )

    async def get(self, job_id: str) -> Job:
        """Look at one job.

        Raises:
            JobNotFound: there is none of that id.
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: self._read(job_id))

    def _read(self, job_id: str) -> Job:
        try:
            if JOB_ID.fullmatch(job_id):
                return self._job(self._connected.retrieve_workflow(job_id).get_status())
        except dbos_error.DBOSNonExistentWorkflowError:
            pass
        raise JobNotFound(f"there is no job {job_id[:64]!r}")

    async def list_jobs(self) -> list[Job]:
        """Look at all jobs, newest first.

        Raises:
            JobsUnavailable: the database does not answer.
        """
        return await self._in_thread(lambda: [self._job(status) for status in self._statuses()])

    def _statuses(self) -> list[WorkflowStatus]:
        return self._connected.list_workflows(name=WORKFLOW, sort_desc=True, limit=MAX_LISTED)

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
        if job.progress.stage == SERVE_STAGE or job.state in (JobState.SUCCEEDED, JobState.FAILED):
            raise Conflict(f"job {job_id} has ended and cannot be cancelled")
        if job.state is not JobState.CANCELLED:
            self._connected.cancel_workflow(job_id)
        return self._read(job_id)

    async def awaiting_load(self) -> dict[str, JobSpec]:
        """Jobs whose artifact is written and is to be served now: id to specification."""
        return await self._in_thread(self._awaiting_load)

    def _awaiting_load(self) -> dict[str, JobSpec]:
        finished = self._connected.list_workflows(name=WORKFLOW, status="SUCCESS", limit=MAX_LISTED, sort_desc=True)
        return {status.workflow_id: _spec(status) for status in finished if _awaits_load(status)}

    async def note_loaded(self, job_id: str, error: str | None) -> None:
        """Record that a job's artifact is served, or why it is not."""
        attributes: dict[str, Any] = {LOADED: True} if error is None else {LOAD_ERROR: error}
        await self._in_thread(lambda: self._connected.update_workflow_attributes(job_id, attributes, merge=True))

    async def refresh_metrics(self, metrics: JobMetrics) -> None:
        """Bring the job gauges up to date; a database that does not answer leaves them as they are."""
        metrics.heartbeat.set(self._heartbeat())
        try:
            counts, running = await self._in_thread(self._count)
        except JobsUnavailable:
            return
        for state in JOB_STATES:
            metrics.jobs.labels(state).set(counts[state])
        for gauge in (metrics.blocks, metrics.blocks_completed, metrics.last_progress):
            gauge.clear()
        for job in running:
            metrics.blocks.labels(job.id).set(job.progress.blocks)
            metrics.blocks_completed.labels(job.id).set(job.progress.blocks_completed)
            metrics.last_progress.labels(job.id).set(job.updated)

    def _count(self) -> tuple[Counter[str], list[Job]]:
        """Count jobs by state, and look closer at those that run; a scrape must not ask once for every old job."""
        statuses = self._statuses()
        states = [_state(status) for status in statuses]
        pairs = zip(statuses, states, strict=True)
        return Counter(states), [self._job(status) for status, state in pairs if state is JobState.RUNNING]

    @property
    def _connected(self) -> DBOSClient:
        assert self._client is not None, "start() comes first"
        return self._client

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run database work off the event loop."""
        try:
            return await asyncio.to_thread(work)
        except (SQLAlchemyError, OSError) as error:
            logger.warning("the jobs' database does not answer: %s", error)
            raise JobsUnavailable("the jobs' database does not answer", retry_after_seconds=5.0) from None

    def _job(self, status: WorkflowStatus) -> Job:
        """Read DBOS' view of a workflow as a job."""
        spec = _spec(status)
        event = (
            None if status.status == "ENQUEUED" else self._connected.get_event(status.workflow_id, PROGRESS_EVENT, 0)
        )
        progress = Progress(**(event or {}))
        if _awaits_load(status):
            progress = replace(progress, stage=SERVE_STAGE)
        return Job(
            id=status.workflow_id,
            state=_state(status),
            method=spec.config["method"],
            model=spec.config["model"],
            name=spec.name,
            progress=progress,
            created=(status.created_at or 0) / 1000,
            updated=max((status.updated_at or 0) / 1000, progress.updated),
            artifact=spec.artifact if progress.is_written else None,
            error=_error(status),
        )


def _spec(status: WorkflowStatus) -> JobSpec:
    assert status.input is not None
    return JobSpec.from_dict(status.input["args"][0])


def _state(status: WorkflowStatus) -> JobState:
    """Where the job stands: DBOS' word for it, except that a job is only done when its artifact is served."""
    if _awaits_load(status):
        return JobState.RUNNING
    return STATE_OF_DBOS[status.status] if _error(status) is None else JobState.FAILED


def _awaits_load(status: WorkflowStatus) -> bool:
    """Whether the artifact is written, is to be served, and is not yet."""
    attributes = status.attributes or {}
    return status.status == "SUCCESS" and _spec(status).load and not {LOADED, LOAD_ERROR} & attributes.keys()


def _error(status: WorkflowStatus) -> str | None:
    """Why the job failed, in one sentence."""
    if status.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
        return "the job worker died every time it ran this job"
    if status.error is not None:
        return str(status.error)
    load_error = (status.attributes or {}).get(LOAD_ERROR)
    return None if load_error is None else f"the artifact is written, but cannot be served: {load_error}"

"""Job metrics, taken from the database at each scrape.

Gauges show what is on record. The histogram of durations and the counter of recoveries are fed by comparing with the
scrape before; what had ended before this server's first look is not counted again after each of its restarts.
"""

from collections import Counter
from dataclasses import dataclass, field

from dbos import WorkflowStatus

from service.jobs.records import state_of
from service.jobs.types import Job, JobState
from service.metrics import JOB_STATES, TIMED_ENDS, JobMetrics


@dataclass(frozen=True, kw_only=True)
class Census:
    """The jobs on record.

    Attributes:
        statuses: every record.
        running: those that run, with their progress.
    """

    statuses: list[WorkflowStatus]
    running: list[Job]


@dataclass
class JobObserver:
    """Turns one census after another into metrics.

    Attributes:
        starts: of each job, as far as they were counted.
        ended: jobs whose end was seen.
        has_looked: whether there was a census before.
    """

    starts: dict[str, int] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    has_looked: bool = False

    def publish(self, census: Census, metrics: JobMetrics) -> None:
        """Bring the metrics up to date."""
        states = {status.workflow_id: state_of(status) for status in census.statuses}
        counts = Counter(states.values())
        for state in JOB_STATES:
            metrics.jobs.labels(state).set(counts[JobState(state)])
        for gauge in (metrics.blocks, metrics.blocks_completed, metrics.last_progress):
            gauge.clear()
        for job in census.running:
            metrics.blocks.labels(job.id).set(job.progress.blocks)
            metrics.blocks_completed.labels(job.id).set(job.progress.blocks_completed)
            metrics.last_progress.labels(job.id).set(job.updated)
        for status in census.statuses:
            self._compare(status, states[status.workflow_id], metrics)
        self.starts = {job_id: count for job_id, count in self.starts.items() if job_id in states}
        self.ended = {job_id for job_id in self.ended if states.get(job_id, JobState.RUNNING).is_final}
        self.has_looked = True

    def _compare(self, status: WorkflowStatus, state: JobState, metrics: JobMetrics) -> None:
        """Count what happened to one job since the last census."""
        starts, before = status.recovery_attempts or 0, self.starts.get(status.workflow_id)
        self.starts[status.workflow_id] = starts
        if before is None:
            before = starts if not self.has_looked else 0
        metrics.recoveries.inc(max(0, starts - max(1, before)))  # the first start of a job recovers nothing
        if not state.is_final or status.workflow_id in self.ended:
            return
        self.ended.add(status.workflow_id)
        began, end = status.dequeued_at, status.completed_at
        if self.has_looked and state in TIMED_ENDS and began and end:
            metrics.duration.labels(state.value).observe(max(0, end - began) / 1000)

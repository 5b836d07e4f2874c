"""Gives the jobs of dead workers to living ones, over and over.

Every worker looks every few seconds at all running jobs. One whose worker's lock is free at two looks in a row (a
worker that lost its session takes it again between them) goes back to its queue, where the next free worker finds it,
and begins after its last finished block. A running job of our own id that this process does not run is such a one, too:
the record of a run before ours, or of one that DBOS dropped while the database was away.

DBOS leaves this to a service of its makers, and offers `resume_workflow`, which forgets how often a job was started. So
the function that DBOS itself recovers with at start is called here; it is not public, a test holds it to its contract,
and dbos is pinned below 4.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from dbos import DBOS, DBOSClient

from service.jobs.database import WORKFLOW
from service.jobs.presence import Presence


@dataclass(frozen=True, kw_only=True)
class RunningJob:
    """A job that is on record as running."""

    id: str
    executor_id: str


def running_jobs(client: DBOSClient) -> list[RunningJob]:
    """Every job that is on record as running."""
    return [
        RunningJob(id=status.workflow_id, executor_id=status.executor_id or "")
        for status in client.list_workflows(name=WORKFLOW, status="PENDING", load_input=False, load_output=False)
    ]


def is_taken(client: DBOSClient, job_id: str, executor_id: str) -> bool:
    """Whether a job that a worker runs was given to another; one that was cancelled was not."""
    found = client.list_workflows(workflow_ids=[job_id], load_input=False, load_output=False)
    if not found:
        return True
    is_ours = found[0].status == "PENDING" and found[0].executor_id == executor_id
    return not is_ours and found[0].status != "CANCELLED"


def hand_over(executor_ids: Collection[str]) -> list[str]:
    """Put the running jobs of dead workers back into the queue; returns their ids."""
    return [handle.get_workflow_id() for handle in DBOS._recover_pending_workflows(list(executor_ids))]


@dataclass
class Reaper:
    """Finds abandoned jobs.

    Attributes:
        executor_id: ours.
        presence: knows who is there.
        running_here: ids of the jobs that this process runs.
        suspects: jobs that looked abandoned at the last look.
    """

    executor_id: str
    presence: Presence
    running_here: Collection[str]
    suspects: set[str] = field(default_factory=set)

    def abandoned(self, running: list[RunningJob]) -> set[str]:
        """Look once more; returns the executors whose jobs are to be handed over.

        Raises:
            PresenceLost: the database does not answer.
        """
        others = {job.executor_id for job in running} - {self.executor_id}
        gone = {executor_id for executor_id in others if self.presence.is_gone(executor_id)}
        suspects = {job.id: job.executor_id for job in running if self._is_suspect(job, gone)}
        found = {executor_id for job_id, executor_id in suspects.items() if job_id in self.suspects}
        self.suspects = set(suspects)
        return found

    def _is_suspect(self, job: RunningJob, gone: Collection[str]) -> bool:
        if job.executor_id == self.executor_id:
            return not self.running_here  # all jobs of an executor go back together
        return job.executor_id in gone

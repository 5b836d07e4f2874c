"""Reads DBOS' record of a workflow as a job."""

from dataclasses import replace
from typing import Any

from dbos import DBOSClient, WorkflowStatus

from service.jobs.database import PROGRESS_EVENT
from service.jobs.types import SERVE_STAGE, STATE_OF_DBOS, Job, JobSpec, JobState, Outcome, Progress

# Attributes we keep on a workflow.
LOADED = "loaded"
LOAD_ERROR = "load_error"
REQUEST = "request_sha256"

NEVER_RUN = ("DELAYED", "ENQUEUED")


def job_of(status: WorkflowStatus, client: DBOSClient) -> Job:
    """Describe a workflow, asking the database for its progress if the record does not tell it."""
    spec = spec_of(status)
    outcome = outcome_of(status)
    progress = Progress(**((outcome and outcome.progress) or _published(status, client)))
    if awaits_load(status):
        progress = replace(progress, stage=SERVE_STAGE)
    artifact = outcome.artifact if outcome is not None else spec.made_in if spec.has_limits else spec.artifact
    return Job(
        id=status.workflow_id,
        state=state_of(status),
        method=spec.config["method"],
        model=spec.config["model"],
        name=spec.name,
        progress=progress,
        created=(status.created_at or 0) / 1000,
        updated=max((status.updated_at or 0) / 1000, progress.updated),
        artifact=artifact if progress.is_written else None,
        error=_error(status),
        priority=spec.priority,
        folder=spec.folder,
        outcome=outcome,
    )


def spec_of(status: WorkflowStatus) -> JobSpec:
    """What was asked for."""
    assert status.input is not None
    return JobSpec.from_dict(status.input["args"][0])


def outcome_of(status: WorkflowStatus) -> Outcome | None:
    """What a job that ran to its end made."""
    return Outcome(**status.output) if status.status == "SUCCESS" and status.output else None


def state_of(status: WorkflowStatus) -> JobState:
    """Where the job stands: DBOS' word for it, except that a job is only done when its artifact is served."""
    if _rejection(status) is not None:
        return JobState.REJECTED
    if awaits_load(status):
        return JobState.RUNNING
    return STATE_OF_DBOS[status.status] if _error(status) is None else JobState.FAILED


def awaits_load(status: WorkflowStatus) -> bool:
    """Whether the artifact is written, is to be served, and is not yet."""
    if status.status != "SUCCESS" or _rejection(status) is not None:
        return False
    return spec_of(status).load and not any(attributes_of(status).get(name) for name in (LOADED, LOAD_ERROR))


def attributes_of(status: WorkflowStatus) -> dict[str, Any]:
    """What we noted on the workflow."""
    return status.attributes or {}


def _published(status: WorkflowStatus, client: DBOSClient) -> dict[str, Any]:
    """The progress a running or broken-off job has published."""
    if status.status in NEVER_RUN and not status.recovery_attempts:
        return {}
    return client.get_event(status.workflow_id, PROGRESS_EVENT, 0) or {}


def _rejection(status: WorkflowStatus) -> str | None:
    outcome = outcome_of(status)
    return None if outcome is None else outcome.rejected


def _error(status: WorkflowStatus) -> str | None:
    """Why the job failed or was rejected, in one sentence."""
    if status.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
        return "the job worker died every time it ran this job"
    if status.error is not None:
        return str(status.error)
    load_error = attributes_of(status).get(LOAD_ERROR)
    if load_error:
        return f"the artifact is written, but cannot be served: {load_error}"
    return _rejection(status)

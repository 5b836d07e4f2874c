"""A job: what was asked for, and where it stands.

    queued --> running --> succeeded | failed
       '----------'------> cancelled

DBOS owns the states; this is how its words read to a caller. A job with `load` stays running, at stage `serve`, until
the API process has loaded its artifact, so that `succeeded` means the model answers.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the job."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


STATE_OF_DBOS: dict[str, JobState] = {
    "DELAYED": JobState.QUEUED,
    "ENQUEUED": JobState.QUEUED,
    "PENDING": JobState.RUNNING,
    "SUCCESS": JobState.SUCCEEDED,
    "ERROR": JobState.FAILED,
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": JobState.FAILED,
    "CANCELLED": JobState.CANCELLED,
}

SERVE_STAGE = "serve"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to measure about the artifact once it is written.

    Attributes:
        texts: name of a text to its file.
        windows: per text, at most.
        window_tokens: tokens per window.
    """

    texts: dict[str, str]
    windows: int
    window_tokens: int


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a job does; goes to the worker as JSON.

    Attributes:
        name: of the model and of its folder.
        artifact: the folder to make.
        folder: the job's own, for its configuration, finished blocks and log.
        config: onebit_core's QuantizeConfig, complete, as plain values.
        evaluation: what to measure afterwards; None for nothing.
        load: whether the server serves the artifact at the end.
    """

    name: str
    artifact: str
    folder: str
    config: dict[str, Any]
    evaluation: Evaluation | None
    load: bool

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "JobSpec":
        """Read what `to_dict` wrote."""
        evaluation = values["evaluation"]
        return cls(**{**values, "evaluation": Evaluation(**evaluation) if evaluation else None})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is; published as a DBOS event.

    Attributes:
        stage: load, write text, calibrate, quantize, distill, write or evaluate.
        blocks_completed: decoder blocks done.
        blocks: decoder blocks in all; 0 before they are counted.
        relative_error: of the block just done, where the method reports one.
        is_written: whether the artifact is on disk.
        updated: Unix seconds.
    """

    stage: str | None = None
    blocks_completed: int = 0
    blocks: int = 0
    relative_error: float | None = None
    is_written: bool = False
    updated: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as callers see it."""

    id: str
    state: JobState
    method: str
    model: str
    name: str
    progress: Progress = field(default_factory=Progress)
    created: float
    updated: float
    artifact: str | None = None
    error: str | None = None

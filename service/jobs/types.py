"""A job: what was asked for, and where it stands.

    queued --> running --> succeeded | rejected | failed
       ^----------'------> cancelled          |
       '---------------------- resume --------'

DBOS owns the states; this is how its words read to a caller. A job with `load` stays running, at stage `serve`, until
the API process has loaded its artifact, so that `succeeded` means the model answers. `rejected` is the end of a job
that did all it was asked for, and made something outside the limits that came with it.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to the job."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


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

MAX_CRASHES = 3
HIGHEST_PRIORITY = 1000
MAX_LISTED = 1000


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
class Limits:
    """What the artifact must keep to; None where nothing is asked.

    Attributes:
        max_kl: mean KL(original || compressed) in nats per token, on each evaluated text.
        min_top1: share of tokens where both rank the same first, on each evaluated text.
        max_bits: bits per weight of the whole model, embedding and head included, from the bytes written.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    max_bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a job does; goes to the worker as JSON. A field with a default may be absent in an old record.

    Attributes:
        name: of the model and of its folder.
        artifact: the folder to make.
        folder: the job's own, for its configuration, finished blocks and log.
        config: onebit_core's QuantizeConfig, complete, as plain values.
        evaluation: what to measure afterwards; None for nothing.
        load: whether the server serves the artifact at the end.
        limits: what it must keep to, else it is rejected.
        priority: -1000 to 1000; the larger runs first.
        max_crashes: how often in a row a worker or command may die of this job without finishing another block.
    """

    name: str
    artifact: str
    folder: str
    config: dict[str, Any]
    evaluation: Evaluation | None
    load: bool
    limits: Limits = Limits()
    priority: int = 0
    max_crashes: int = MAX_CRASHES

    @property
    def has_limits(self) -> bool:
        """Whether the artifact may be rejected."""
        return self.limits != Limits()

    @property
    def made_in(self) -> str:
        """Where the artifact is until it is put under its name, and stays if it is rejected."""
        return f"{self.folder}/artifact"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "JobSpec":
        """Read what `to_dict` wrote."""
        evaluation = values["evaluation"]
        parts = {
            "evaluation": Evaluation(**evaluation) if evaluation else None,
            "limits": Limits(**values.get("limits", {})),
        }
        return cls(**{**values, **parts})


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is; published as a DBOS event, and part of a finished job's result.

    Attributes:
        stage: load, write text, calibrate, quantize, distill, train, write or evaluate.
        blocks_completed: decoder blocks done.
        blocks: decoder blocks in all; 0 before they are counted.
        relative_error: of the block just done, where the method reports one.
        steps_completed: steps of the training done.
        steps: of the training in all; 0 before it begins, and without one.
        held_out_kl: of the last look at the windows held out, in nats per token.
        is_written: whether the artifact is on disk.
        updated: Unix seconds.
    """

    stage: str | None = None
    blocks_completed: int = 0
    blocks: int = 0
    relative_error: float | None = None
    steps_completed: int = 0
    steps: int = 0
    held_out_kl: float | None = None
    is_written: bool = False
    updated: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job that ran to its end made; DBOS keeps it as the workflow's result.

    Attributes:
        artifact: its folder: in artifact_root, or in the job's own folder if it was rejected.
        rejected: which limit it broke, in one sentence; None if none.
        bits: bits per weight from the bytes written: linear_true, linear_nominal, whole_model.
        evaluation: onebit_core's EvaluationResult of each text, as plain values.
        progress: the last Progress, as plain values.
    """

    artifact: str
    rejected: str | None = None
    bits: dict[str, float] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs to list; None where all.

    Attributes:
        model: its path, or the last part of it.
        limit: at most so many.
        after: only jobs older than the one of this id.
    """

    state: JobState | None = None
    method: str | None = None
    model: str | None = None
    limit: int = MAX_LISTED
    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as callers see it.

    Attributes:
        artifact: the folder, once it is on disk.
        error: why it failed or was rejected, in one sentence.
        folder: the job's own.
        outcome: what it made, once it ran to its end.
    """

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
    priority: int = 0
    folder: str
    outcome: Outcome | None = None

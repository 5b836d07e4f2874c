"""Bodies and answers of the admin endpoints."""

from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import Field

from service.api.openai.fields import StrictBody, Text
from service.jobs.submission import Submission
from service.jobs.types import Evaluation, Job, JobState

MAX_PATH_CHARACTERS = 4096


class CalibrationBody(StrictBody):
    """Which text to calibrate on, and how much of it; what is left out takes the core's default."""

    text: list[Text] | None = Field(
        default=None,
        max_length=64,
        description="Files or folders inside job_sources, each with #COLUMN if need be; builtin:python; self:.",
    )
    weights: list[float] | None = Field(
        default=None, max_length=64, description="Shares of the texts, in their order; by default equal."
    )
    samples: int | None = Field(default=None, ge=1, le=65536, description="Windows of text.")
    statistics_samples: int | None = Field(
        default=None, ge=1, le=65536, description="Windows of them that statistics are recorded on."
    )
    tokens: int | None = Field(default=None, ge=2, le=65536, description="Tokens in a window.")
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    first_token_weight: float | None = Field(
        default=None, gt=0, description="Weight of the first token of a window, the attention sink."
    )

    def values(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump(exclude_none=True)


class ReconstructionBody(StrictBody):
    """Training of each block after its layers were quantized; what is left out is the preset's."""

    preset: Literal["off", "light", "full"] = "off"
    epochs: int | None = Field(default=None, ge=0, le=1024, description="Passes over the calibration samples.")
    latent_rate: float | None = Field(default=None, ge=0, le=10, description="Step for signs and codes.")
    scale_rate: float | None = Field(default=None, ge=0, le=10, description="Step for scales and levels.")
    distill_epochs: int | None = Field(default=None, ge=0, le=1024, description="Passes of the final distillation.")
    distill_rate: float | None = Field(default=None, ge=0, le=10, description="Step for scales in it.")
    target: Literal["prefix", "original"] | None = None
    batch: int | None = Field(default=None, ge=1, le=65536, description="Samples per step.")
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)

    def values(self) -> dict[str, Any]:
        """The fields that were given."""
        return self.model_dump(exclude_none=True)


class EvaluateBody(StrictBody):
    """What to measure once the artifact is written."""

    texts: dict[str, Text] = Field(
        min_length=1,
        max_length=16,
        description="Name to file or folder inside job_sources, with #COLUMN if need be.",
    )
    windows: int = Field(default=60, ge=1, le=1 << 20)
    window_tokens: int = Field(default=2048, ge=2, le=1 << 20)


class QuantizeBody(StrictBody):
    """POST /admin/quantize."""

    model: Text = Field(min_length=1, max_length=MAX_PATH_CHARACTERS, description="Path inside job_sources, or hub id.")
    method: str = Field(max_length=64, description="Name of a method, see `onebit quantize --help`.")
    settings: dict[str, Any] = Field(default={}, description="The method's settings; see docs/methods.")
    calibration: CalibrationBody = CalibrationBody()
    reconstruction: ReconstructionBody = ReconstructionBody()
    bits: float | None = Field(
        default=None, gt=0, le=16, description="Average true bits a weight, spread over layers by sensitivity."
    )
    rotation: Literal["off", "auto", "all"] = Field(
        default="off", description="Quantize linears behind a rotation of their inputs: none, where it helps, all."
    )
    embedding_bits: Literal[4, 8, 16] = 16
    name: str | None = Field(
        default=None, description="Name of the model and its folder; by default made from model and method."
    )
    evaluate: EvaluateBody | None = None
    load: bool = Field(default=False, description="Whether to serve the artifact at the end.")

    def submission(self) -> Submission:
        """Hand over to the jobs."""
        evaluation = None
        if self.evaluate is not None:
            evaluation = Evaluation(
                texts=self.evaluate.texts,
                windows=self.evaluate.windows,
                window_tokens=self.evaluate.window_tokens,
            )
        return Submission(
            model=self.model,
            method=self.method,
            settings=self.settings,
            calibration=self.calibration.values(),
            reconstruction=self.reconstruction.values(),
            bits=self.bits,
            rotation=self.rotation,
            embedding_bits=self.embedding_bits,
            name=self.name,
            evaluation=evaluation,
            load=self.load,
        )


class LoadBody(StrictBody):
    """POST /admin/models/load."""

    path: Text = Field(min_length=1, max_length=MAX_PATH_CHARACTERS, description="Folder inside artifact_root.")
    name: str | None = Field(default=None, max_length=128, description="To serve it under; default its manifest's.")


class JobAnswer(StrictBody):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    state: JobState
    method: str
    model: str
    name: str
    stage: str | None = Field(description="load, write text, calibrate, quantize, distill, write, evaluate or serve.")
    blocks_completed: int
    blocks: int
    relative_error: float | None = Field(description="Of the block just done.")
    created: str
    updated: str
    artifact: str | None = Field(description="The artifact's folder, once it is written.")
    error: str | None = Field(description="Why the job failed.")

    @classmethod
    def of(cls, job: Job) -> Self:
        """Describe a job."""
        return cls(
            id=job.id,
            state=job.state,
            method=job.method,
            model=job.model,
            name=job.name,
            stage=job.progress.stage,
            blocks_completed=job.progress.blocks_completed,
            blocks=job.progress.blocks,
            relative_error=job.progress.relative_error,
            created=_iso(job.created),
            updated=_iso(job.updated),
            artifact=job.artifact,
            error=job.error,
        )


class JobList(StrictBody):
    """All jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]


class ModelAnswer(StrictBody):
    """A model and how it is served."""

    id: str
    object: Literal["model"] = "model"
    state: Literal["loading", "ready", "draining"]
    path: str
    leases: int = Field(description="Requests that use it now.")
    method: str | None
    bits_per_weight: float | None = Field(description="Of the whole model, embedding and head included.")
    device: str | None
    dtype: str | None
    backend: str | None
    max_model_len: int | None
    memory_bytes: int | None
    alive: bool
    restarts: int


class ModelAnswers(StrictBody):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class Deleted(StrictBody):
    """A model that is served no more."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""What the job endpoints answer."""

import math
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import Field

from service.api.openai.fields import StrictBody
from service.jobs.types import Job, JobState, Outcome


class TextReport(StrictBody):
    """The artifact against its original on one text; null where a figure is not finite."""

    dataset: str
    tokens: int
    kl_mean: float | None = Field(description="KL(original || compressed) per token, nats.")
    kl_standard_error: float | None
    top1_agreement: float | None
    original_perplexity: float | None
    compressed_perplexity: float | None
    warning: str | None = Field(description="Why the figures are not what they seem.")

    @classmethod
    def of(cls, result: dict[str, Any]) -> Self:
        """Take what callers decide by from an evaluation; report.json of the artifact has the rest."""
        return cls(
            dataset=result["dataset"],
            tokens=result["tokens"],
            kl_mean=_finite(result["kl_mean"]),
            kl_standard_error=_finite(result["kl_standard_error"]),
            top1_agreement=_finite(result["top1_agreement"]),
            original_perplexity=_finite(result["original"]["value"]),
            compressed_perplexity=_finite(result["compressed"]["value"]),
            warning=result.get("warning"),
        )


class JobReport(StrictBody):
    """What a job that ran to its end made."""

    bits_per_weight: float | None = Field(description="Of the whole model, embedding and head included.")
    linear_bits_per_weight: float | None = Field(description="Of the quantized layers.")
    evaluation: list[TextReport]

    @classmethod
    def of(cls, outcome: Outcome) -> Self:
        """Describe an outcome."""
        return cls(
            bits_per_weight=outcome.bits.get("whole_model"),
            linear_bits_per_weight=outcome.bits.get("linear_true"),
            evaluation=[TextReport.of(result) for result in outcome.evaluation],
        )


class JobAnswer(StrictBody):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    state: JobState
    method: str
    model: str
    name: str
    priority: int
    stage: str | None = Field(
        description="load, write text, calibrate, quantize, distill, train, write, evaluate or serve."
    )
    blocks_completed: int
    blocks: int
    relative_error: float | None = Field(description="Of the block just done.")
    steps_completed: int = Field(description="Of the training.")
    steps: int = Field(description="Of the training; 0 before it begins, and without one.")
    held_out_kl: float | None = Field(description="Of the training so far, in nats per token.")
    created: str
    updated: str
    artifact: str | None = Field(description="The artifact's folder, once it is written.")
    error: str | None = Field(description="Why the job failed or was rejected.")
    report: JobReport | None = Field(description="What it made, once it ran to its end.")

    @classmethod
    def of(cls, job: Job) -> Self:
        """Describe a job."""
        return cls(
            id=job.id,
            state=job.state,
            method=job.method,
            model=job.model,
            name=job.name,
            priority=job.priority,
            stage=job.progress.stage,
            blocks_completed=job.progress.blocks_completed,
            blocks=job.progress.blocks,
            relative_error=_finite(job.progress.relative_error),
            steps_completed=job.progress.steps_completed,
            steps=job.progress.steps,
            held_out_kl=_finite(job.progress.held_out_kl),
            created=_iso(job.created),
            updated=_iso(job.updated),
            artifact=job.artifact,
            error=job.error,
            report=JobReport.of(job.outcome) if job.outcome is not None else None,
        )


class JobList(StrictBody):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobAnswer]
    has_more: bool = Field(description="Whether there are older ones; `after` the last id here lists them.")


class JobDeleted(StrictBody):
    """A job that is on record no more."""

    id: str
    object: Literal["job"] = "job"
    deleted: Literal[True] = True


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

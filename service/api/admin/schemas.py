"""Bodies of the job endpoints."""

from typing import Any, Literal

from pydantic import Field

from service.api.openai.fields import StrictBody, Text
from service.jobs.submission import Submission
from service.jobs.types import HIGHEST_PRIORITY, Evaluation, Limits

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


class TrainingBody(StrictBody):
    """Training of all layers together, after all blocks; what is left out takes the core's default."""

    steps: int = Field(default=0, ge=0, le=1 << 20, description="Steps of the optimizer; 0 trains nothing.")
    text: list[Text] | None = Field(
        default=None, max_length=64, description="As of calibration, whose texts are the default."
    )
    weights: list[float] | None = Field(
        default=None, max_length=64, description="Shares of the texts, in their order; by default equal."
    )
    samples: int | None = Field(default=None, ge=2, le=1 << 22, description="Windows of text, those held out included.")
    tokens: int | None = Field(default=None, ge=2, le=65536, description="Tokens in a window.")
    held_out: int | None = Field(default=None, ge=1, le=65536, description="Windows not trained on, to measure with.")
    batch: int | None = Field(default=None, ge=1, le=65536, description="Windows per step.")
    windows_at_once: int | None = Field(default=None, ge=1, le=65536, description="Windows in memory together.")
    recompute: bool | None = Field(default=None, description="Run blocks twice, to need less memory.")
    teacher: Literal["original", "int8"] | None = Field(
        default=None, description="The original as it is, or its linears in a byte a weight, where memory is short."
    )
    alpha: float | None = Field(default=None, ge=0, le=1e6, description="Weight of the hidden states' loss.")
    sign_optimizer: Literal["bop", "adam"] | None = None
    sign_rate: float | None = Field(default=None, ge=0, le=1, description="Share of signs that bop turns in a step.")
    surrogate: Literal["identity", "clipped", "smooth"] | None = None
    scales: Literal["trained", "closed_form"] | None = None
    latent_rate: float | None = Field(default=None, ge=0, le=10, description="Step for signs and codes.")
    scale_rate: float | None = Field(default=None, ge=0, le=10, description="Step for scales and levels.")
    warmup: float | None = Field(default=None, ge=0, lt=1, description="Share of the steps in which rates rise.")
    largest_gradient: float | None = Field(default=None, gt=0, le=1e9, description="Norm gradients are scaled down to.")
    evaluate_every: int | None = Field(default=None, ge=1, le=1 << 20, description="Steps between two measurements.")
    patience: int | None = Field(default=None, ge=0, le=65536, description="Measurements without gain that end it.")
    checkpoint_every: int | None = Field(default=None, ge=1, le=1 << 20, description="Steps between two checkpoints.")
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
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


class LimitsBody(StrictBody):
    """What the artifact must keep to; a job that makes another ends as rejected."""

    max_kl: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Mean KL divergence in nats, on each text of evaluate."
    )
    min_top1: float | None = Field(
        default=None, gt=0, le=1, description="Share of tokens ranked first alike, on each text of evaluate."
    )
    max_bits: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Bits per weight of the whole model, embedding and head included, from the bytes written.",
    )


class QuantizeBody(StrictBody):
    """POST /admin/quantize."""

    model: Text = Field(min_length=1, max_length=MAX_PATH_CHARACTERS, description="Path inside job_sources, or hub id.")
    method: str = Field(max_length=64, description="Name of a method, see `onebit quantize --help`.")
    settings: dict[str, Any] = Field(default={}, description="The method's settings; see docs/methods.")
    calibration: CalibrationBody = CalibrationBody()
    reconstruction: ReconstructionBody = ReconstructionBody()
    training: TrainingBody = TrainingBody()
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
    limits: LimitsBody = LimitsBody()
    load: bool = Field(default=False, description="Whether to serve the artifact at the end.")
    priority: int = Field(
        default=0,
        ge=-HIGHEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description="The larger runs first; jobs of one priority run in the order they came.",
    )

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
            training=self.training.values(),
            bits=self.bits,
            rotation=self.rotation,
            embedding_bits=self.embedding_bits,
            name=self.name,
            evaluation=evaluation,
            load=self.load,
            limits=Limits(**self.limits.model_dump()),
            priority=self.priority,
        )

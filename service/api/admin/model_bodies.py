"""Bodies and answers of the admin endpoints for models, aliases and artifacts."""

from typing import Literal

from pydantic import Field

from service.api.openai.fields import StrictBody, Text

MAX_PATH_CHARACTERS = 4096


class PlanBody(StrictBody):
    """POST /admin/models/plan."""

    path: Text = Field(min_length=1, max_length=MAX_PATH_CHARACTERS, description="Folder inside artifact_root.")
    name: str | None = Field(default=None, max_length=128, description="To serve it under; default its manifest's.")


class LoadBody(PlanBody):
    """POST /admin/models/load."""


class SwapBody(StrictBody):
    """POST /admin/models/swap."""

    name: str = Field(max_length=128, description="Of the served model that is to be replaced.")
    path: Text = Field(min_length=1, max_length=MAX_PATH_CHARACTERS, description="Folder inside artifact_root.")
    unload_first: bool = Field(
        default=False,
        description="Unload the served model before the other is loaded, where memory does not hold both; requests "
        "get 503 meanwhile.",
    )


class AliasBody(StrictBody):
    """PUT /admin/aliases/{name}."""

    model: str = Field(max_length=128, description="The served model it leads to.")


class GoldenAnswer(StrictBody):
    """How a model's engine did on its golden prompts."""

    error_nats: float = Field(description="Mean absolute error of log probabilities against the reference.")
    tokens: int = Field(description="How many were compared.")
    timestamp: float = Field(description="When, Unix time.")


class ModelAnswer(StrictBody):
    """A model and how it is served; a name is listed twice while one model takes it from another."""

    id: str
    object: Literal["model"] = "model"
    state: Literal["loading", "ready", "draining"]
    path: str
    aliases: list[str]
    leases: int = Field(description="Requests that use it now.")
    method: str | None
    bits_per_weight: float | None = Field(description="Of the whole model, embedding and head included.")
    artifact_sha256: str | None = Field(description="Of its weights; of the original's files where it is one.")
    golden: GoldenAnswer | None = Field(description="Null while it loads, and where it was not asked.")
    device: str | None
    dtype: str | None
    backend: str | None
    max_model_len: int | None
    memory_bytes: int | None = Field(description="Model and KV cache together.")
    planned_bytes: int | None = Field(description="What it was admitted with: the most it needs, while it loads.")
    resident_bytes: int | None = Field(description="Main memory of its engine's process.")
    alive: bool
    restarts: int


class ModelAnswers(StrictBody):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class PlanAnswer(StrictBody):
    """What a model would need, and whether it would be loaded."""

    id: str = Field(description="The name it would be served under.")
    object: Literal["plan"] = "plan"
    device: str
    needed_bytes: int = Field(description="The sum of the four below: while it loads.")
    weights_bytes: int
    loading_bytes: int = Field(description="Given back when it is loaded.")
    kv_cache_bytes: int
    process_bytes: int
    free_bytes: int | None = Field(description="Less what loaded models may still take; null where nobody can tell.")
    freed_bytes: int = Field(description="What unloading the model of that name would free.")
    fits: bool
    fits_after_unload: bool = Field(description="Whether it fits with unload_first.")
    remedy: str | None


class Deleted(StrictBody):
    """Something that is no more."""

    id: str
    object: Literal["model", "alias", "artifact"] = "model"
    deleted: Literal[True] = True


class AliasAnswer(StrictBody):
    """A further name of a model."""

    id: str
    object: Literal["alias"] = "alias"
    model: str


class AliasAnswers(StrictBody):
    """All aliases."""

    object: Literal["list"] = "list"
    data: list[AliasAnswer]


class ArtifactAnswer(StrictBody):
    """An artifact, or an original, in artifact_root."""

    id: str = Field(description="Name of its folder or file; the path to load it by.")
    object: Literal["artifact"] = "artifact"
    kind: Literal["artifact", "folder", "gguf"] = Field(description="The last two are originals.")
    state: Literal["available", "served", "damaged"]
    served_as: list[str] = Field(description="Names of the models that were loaded from it.")
    model: str | None = Field(description="Name that its manifest gives it.")
    method: str | None
    bits_per_weight: float | None
    bytes: int = Field(description="Of all its files.")
    sha256: str | None = Field(description="Of its weights, as its manifest has it.")
    created: str | None
    damage: str | None = Field(description="Why it cannot be loaded.")


class ArtifactAnswers(StrictBody):
    """All artifacts."""

    object: Literal["list"] = "list"
    data: list[ArtifactAnswer]

"""From what an admin asked for to a JobSpec, or a refusal before anything is queued.

Paths are resolved, symbolic links included, and must then lie in a folder the operator opened to jobs; whether a path
elsewhere exists is not told. The configuration is built with the core's own class, so a job that is accepted has a
known method, known settings and values of the right type.
"""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebit_core.calibration.sources import BUILTIN, BUILTIN_HELDOUT
from onebit_core.errors import ConfigError
from service.errors import BadRequest, Conflict
from service.jobs.types import Evaluation, JobSpec
from service.settings import Settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TEXT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BUILTIN_TEXTS = (BUILTIN, BUILTIN_HELDOUT)

INSIDE = "an existing path inside job_sources or artifact_root, where relative paths are looked up"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What an admin asked for, as sent; types are checked, meanings are not.

    Attributes:
        calibration: fields of the core's CalibrationConfig; left out ones take its defaults.
        reconstruction: fields of the core's ReconstructionConfig, likewise.
        name: of the model and its folder; None makes one from model and method.
    """

    model: str
    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    reconstruction: Mapping[str, Any]
    embedding_bits: int
    name: str | None
    evaluation: Evaluation | None
    load: bool


def plan_job(submission: Submission, settings: Settings) -> JobSpec:
    """Check a submission and turn it into a job; reads the disk and imports torch, so not for the event loop.

    Raises:
        BadRequest: it cannot be meant; the message names the option.
        Conflict: an artifact of that name exists.
    """
    assert settings.artifact_root is not None
    assert settings.jobs_folder is not None
    model = resolve_model(submission.model, settings)
    name = submission.name or _name_for(submission)
    if not NAME.fullmatch(name):
        raise BadRequest("name may only have letters, digits and . _ -, at most 64", param="name")
    artifact = settings.artifact_root.resolve() / name
    if artifact.exists() or artifact.is_symlink():
        raise Conflict(f"an artifact named {name!r} exists already; choose another name", param="name")
    return JobSpec(
        name=name,
        artifact=str(artifact),
        folder=str(settings.jobs_folder / uuid.uuid4().hex),
        config=_configuration(submission, model, name, settings),
        evaluation=_resolve_evaluation(submission.evaluation, settings),
        load=submission.load,
    )


def resolve_model(model: str, settings: Settings) -> str:
    """Return the model's real path, or its hub id.

    Raises:
        BadRequest: it is neither in an open folder nor a hub id that is allowed.
    """
    path = _open_path(model, settings)
    if path is not None:
        return str(path)
    if settings.allow_hub and HUB_ID.fullmatch(model):
        return model
    hub = "or a hub id" if settings.allow_hub else "hub ids are off (--allow-hub)"
    raise BadRequest(f"model must be {INSIDE}; {hub}", param="model")


def resolve_text(text: str, settings: Settings, param: str) -> str:
    """Return a text's real path, or the name of a built-in text.

    Raises:
        BadRequest: it is neither.
    """
    if text in BUILTIN_TEXTS:
        return text
    path = _open_path(text, settings)
    if path is None:
        raise BadRequest(f"{param} must be {INSIDE}", param=param)
    return str(path)


def _open_path(text: str, settings: Settings) -> Path | None:
    """Find a path, absolute or relative to an open folder; None if it does not exist there."""
    if "\x00" in text or not text:
        return None
    roots = [folder.resolve() for folder in (*settings.job_sources, settings.artifact_root) if folder is not None]
    for root in roots:
        try:
            path = (root / text).resolve()
            if any(path.is_relative_to(allowed) for allowed in roots) and path.exists():
                return path
        except (OSError, RuntimeError):  # a name too long, or links in a circle
            return None
    return None


def _configuration(submission: Submission, model: str, name: str, settings: Settings) -> dict[str, Any]:
    """Build the core's configuration, which checks it, and return its plain values."""
    from onebit_core.methods import METHODS  # imports torch: only when a job is submitted
    from onebit_core.pipeline.config import QuantizeConfig

    if submission.method not in METHODS:
        raise BadRequest(f"unknown method; known: {', '.join(METHODS)}", param="method")
    calibration = dict(submission.calibration)
    if calibration.get("text"):
        calibration["text"] = [resolve_text(text, settings, "calibration.text") for text in calibration["text"]]
    values = {
        "model": model,
        "method": submission.method,
        "settings": dict(submission.settings),
        "calibration": calibration,
        "reconstruction": dict(submission.reconstruction),
        "embedding_bits": submission.embedding_bits,
        "name": name,
        "device": settings.device,
    }
    try:
        return QuantizeConfig.from_dict(values).to_dict()
    except ConfigError as error:
        named = [part for part in ("calibration", "reconstruction") if part in str(error).lower()]
        param = named[0] if named else "settings"
        raise BadRequest(str(error), param=param) from None


def _resolve_evaluation(evaluation: Evaluation | None, settings: Settings) -> Evaluation | None:
    """Check names and resolve paths of the evaluation texts."""
    if evaluation is None:
        return None
    for name in evaluation.texts:
        if not TEXT_NAME.fullmatch(name):
            raise BadRequest("names of texts may only have letters, digits and . _ -", param="evaluate.texts")
    texts = {name: resolve_text(file, settings, "evaluate.texts") for name, file in evaluation.texts.items()}
    return Evaluation(texts=texts, windows=evaluation.windows, window_tokens=evaluation.window_tokens)


def _name_for(submission: Submission) -> str:
    """Make a name from model and method: `models/SmolLM2-135M.gguf` and `svid` give `SmolLM2-135M-svid`."""
    stem = submission.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{stem}-{submission.method}").strip("-._")
    return readable[:64]

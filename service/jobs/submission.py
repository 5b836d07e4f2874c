"""From what an admin asked for to a JobSpec, or a refusal before anything is queued.

Paths are resolved, symbolic links included, and must then lie in a folder the operator opened to jobs; whether a path
elsewhere exists is not told. The configuration is built with the core's own class, so a job that is accepted has a
known method, known settings and values of the right type.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebit_core.calibration.overlap import overlapping_sources
from onebit_core.calibration.sources import BUILTIN_TEXTS, SELF, join_source, source_files, split_source
from onebit_core.errors import CalibrationError, ConfigError
from service.errors import BadRequest, Conflict
from service.jobs.types import Evaluation, JobSpec, Limits
from service.settings import Settings

if TYPE_CHECKING:
    from onebit_core.pipeline.config import QuantizeConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TEXT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

INSIDE = "an existing path inside job_sources or artifact_root, where relative paths are looked up"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What an admin asked for, as sent; types are checked, meanings are not.

    Attributes:
        calibration: fields of the core's CalibrationConfig; left out ones take its defaults.
        reconstruction: fields of the core's ReconstructionConfig, likewise.
        training: fields of the core's TrainingConfig, likewise.
        bits: average true bits a weight to spread over layers; None gives all the same settings.
        rotation: off, auto or all.
        name: of the model and its folder; None makes one from model and method.
        priority: the larger runs first.
    """

    model: str
    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    reconstruction: Mapping[str, Any]
    bits: float | None
    rotation: str
    embedding_bits: int
    name: str | None
    evaluation: Evaluation | None
    load: bool
    training: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    priority: int = 0


def plan_job(job_id: str, submission: Submission, settings: Settings) -> JobSpec:
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
    _refuse_contradictions(submission)
    artifact = settings.artifact_root.resolve() / name
    if artifact.exists() or artifact.is_symlink():
        raise Conflict(f"an artifact named {name!r} exists already; choose another name", param="name")
    config = _configuration(submission, model, name, settings)
    evaluation = _resolve_evaluation(submission.evaluation, settings)
    if evaluation is not None:
        _refuse_overlap(config, evaluation.texts)
    return JobSpec(
        name=name,
        artifact=str(artifact),
        folder=str(settings.jobs_folder / job_id),
        config=config.to_dict(),
        evaluation=evaluation,
        load=submission.load,
        limits=submission.limits,
        priority=submission.priority,
        max_crashes=settings.job_max_crashes,
    )


def _refuse_contradictions(submission: Submission) -> None:
    """Refuse limits that nothing could keep, or that nothing would measure."""
    limits = submission.limits
    for name, value in (("max_kl", limits.max_kl), ("min_top1", limits.min_top1)):
        if value is not None and submission.evaluation is None:
            raise BadRequest(
                f"limits.{name} needs evaluate: without a text to measure it on it is not known",
                param=f"limits.{name}",
            )
    # The model is its layers, with `bits` on average, and embedding and head; it cannot be smaller than both.
    least = min(submission.bits, submission.embedding_bits) if submission.bits is not None else 0.0
    if limits.max_bits is not None and limits.max_bits < least:
        raise BadRequest(
            f"limits.max_bits is {limits.max_bits:g}, but bits asks for {submission.bits:g} "
            f"and embedding_bits for {submission.embedding_bits}; nothing can be both",
            param="limits.max_bits",
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
    """Return a text's real path, with its column if it has one, or the name of a built-in text.

    What stands behind the last # is taken off before the path is looked up and put back as the core reads it, so the
    path that is checked here is the path that is opened there; so is every file that a folder is read from.

    Raises:
        BadRequest: it is neither, a link in the folder leads out of the open folders, or there is no text in it.
    """
    if text in BUILTIN_TEXTS:
        return text
    name, column = split_source(text)
    path = _open_path(name, settings)
    if path is None or not (column or "").isprintable():
        raise BadRequest(f"{param} must be {INSIDE}", param=param)
    source = join_source(str(path), column)
    try:
        files = source_files(source)
    except CalibrationError as error:
        raise BadRequest(f"{param}: {error}", param=param) from None
    if any(_open_path(str(file), settings) is None for file in files):
        raise BadRequest(f"{param} must be {INSIDE}, and so must what links in it lead to", param=param)
    return source


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
        except (OSError, RuntimeError, ValueError):  # too long, links in a circle, half characters
            return None
    return None


def _configuration(submission: Submission, model: str, name: str, settings: Settings) -> "QuantizeConfig":
    """Build the core's configuration, which checks it."""
    from onebit_core.methods import METHODS  # imports torch: only when a job is submitted
    from onebit_core.pipeline.config import QuantizeConfig

    if submission.method not in METHODS:
        raise BadRequest(f"unknown method; known: {', '.join(METHODS)}", param="method")
    calibration, training = dict(submission.calibration), dict(submission.training)
    for part, param in ((calibration, "calibration.text"), (training, "training.text")):
        if part.get("text"):
            part["text"] = [text if text == SELF else resolve_text(text, settings, param) for text in part["text"]]
    values = {
        "model": model,
        "method": submission.method,
        "settings": dict(submission.settings),
        "calibration": calibration,
        "reconstruction": dict(submission.reconstruction),
        "training": training,
        "bits": submission.bits,
        "rotation": submission.rotation,
        "embedding_bits": submission.embedding_bits,
        "name": name,
        "device": settings.device,
    }
    try:
        return QuantizeConfig.from_dict(values)
    except ConfigError as error:
        named = [part for part in ("calibration", "reconstruction", "training") if part in str(error).lower()]
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


def _refuse_overlap(config: "QuantizeConfig", texts: Mapping[str, str]) -> None:
    """Refuse to measure a model on what it is calibrated or trained on."""
    for name, text in texts.items():
        calibrated = config.calibration.text if config.is_calibrated else ()
        if overlapping_sources(config.texts_read, [text]):
            how = "calibrated" if overlapping_sources(calibrated, [text]) else "trained"
            raise BadRequest(
                f"evaluate.texts: {name} is also {how} on, so it would measure nothing; name another text",
                param="evaluate.texts",
            )


def _name_for(submission: Submission) -> str:
    """Make a name from model and method: `models/SmolLM2-135M.gguf` and `svid` give `SmolLM2-135M-svid`."""
    stem = submission.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{stem}-{submission.method}").strip("-._")
    return readable[:64]

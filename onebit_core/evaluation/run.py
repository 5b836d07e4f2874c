"""Evaluate an artifact against its original and write the results into it.

    artifact (unpacked once) + original + named texts and tasks  ->  report.json of the artifact

Every text and task is written as soon as it is finished, so an interrupted run keeps what it has. A result replaces an
earlier one of the same text (same name, same token ids, same window length) or task (same name, same questions).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from onebit_core.artifact.manifest import EvaluationResult, Report, SourceInfo, TaskResult
from onebit_core.artifact.reader import DTYPES, load_model, read_manifest, read_report
from onebit_core.artifact.writer import update_report
from onebit_core.config import StrictConfig
from onebit_core.errors import EvaluationError, first_line
from onebit_core.evaluation.compare import evaluate_models
from onebit_core.evaluation.overlap import known_text
from onebit_core.evaluation.windows import read_windows
from onebit_core.kernels import resolve_device
from onebit_core.model.loading import find_folder, load_original
from onebit_core.model.published_onebit import is_published
from onebit_core.model.weights import WeightStore
from onebit_core.progress import Watch


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StrictConfig):
    """What to evaluate on.

    Attributes:
        texts: name of a text to its source, see onebit_core.calibration.sources.
        tasks: name of a zero-shot task to its file of questions, see onebit_core.evaluation.questions; None for
            lm-eval's own task of that name.
        task_limit: how many questions of each task, from an order shuffled with a fixed seed; None for all.
        original: the uncompressed model; None for the one the artifact was made from.
        windows: how many windows of each text; None for all it has.
        window_tokens: length of a window.
        device: auto, cpu, cuda or cuda:N.
        dtype: of both models; auto is bfloat16 where the hardware multiplies it fast, else float32.
    """

    texts: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, str | None] = field(default_factory=dict)
    task_limit: int | None = None
    original: str | None = None
    windows: int | None = 60
    window_tokens: int = 2048
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run found: a result a text and a result a task, in the order given."""

    texts: tuple[EvaluationResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()


def evaluate_artifact(artifact: Path, config: EvaluateConfig, watch: Watch | None = None) -> Measured:
    """Measure what an artifact lost on every text and task, and write it into the artifact.

    Raises:
        EvaluationError: a text or task cannot be used, or the original is not where the artifact says.
        ArtifactError, ModelError: a model cannot be loaded.
        Cancelled: between two windows, or a few questions.
    """
    watch = watch or Watch()
    manifest = read_manifest(artifact)
    source = find_original(config.original, manifest.source)
    if not config.texts and not config.tasks:
        raise EvaluationError("nothing to evaluate on; name a text as NAME=FILE, or a zero-shot task")
    tasks = _load_tasks(config.tasks)
    device = resolve_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    watch.report("load", 0, 2)
    loaded = load_model(artifact, device=device, dtype=str(dtype).removeprefix("torch."), backend="dense")
    texts = [
        read_windows(name, text, loaded.tokenizer, windows=config.windows, window_tokens=config.window_tokens)
        for name, text in config.texts.items()
    ]
    warnings = {name: known_text(manifest.calibration, manifest.training, text) for name, text in config.texts.items()}
    watch.report("load", 1, 2)
    original, _ = load_original(source, device=device, dtype=dtype)
    watch.report("load", 2, 2)
    measured = Measured()
    for windows in texts:
        result = evaluate_models(original, {manifest.name: loaded.model}, windows, watch)[manifest.name]
        result = replace(result, warning=warnings[windows.name])
        update_report(artifact, with_result(read_report(artifact), result))
        measured = replace(measured, texts=(*measured.texts, result))
    for name, task in tasks.items():
        models = (original, loaded.model)
        answered = _zero_shot().evaluate_task(name, task, models, loaded.tokenizer, config.task_limit, watch)
        update_report(artifact, with_task(read_report(artifact), answered))
        measured = replace(measured, tasks=(*measured.tasks, answered))
    return measured


def _load_tasks(wanted: Mapping[str, str | None]) -> dict[str, Any]:
    """Read the tasks before any model, so that a mistake in them costs no time."""
    tasks: dict[str, Any] = _zero_shot().load_tasks(wanted) if wanted else {}
    return tasks


def _zero_shot() -> ModuleType:
    """Import what needs lm-eval; it is an extra and slow to import."""
    try:
        from onebit_core.evaluation import zero_shot
    except ImportError as error:
        raise EvaluationError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({first_line(error)}); install onebit with its "
            "extra: pip install 'onebit[zeroshot]'"
        ) from error
    return zero_shot


def with_result(report: Report, result: EvaluationResult) -> Report:
    """Return the report with a result added, in place of an earlier one of the same text."""

    def key(one: EvaluationResult) -> tuple[str, str, int]:
        return one.dataset, one.fingerprint, one.window_tokens

    kept = tuple(one for one in report.evaluation if key(one) != key(result))
    return replace(report, evaluation=(*kept, result))


def with_task(report: Report, result: TaskResult) -> Report:
    """Return the report with a task's result added, in place of an earlier one of the same questions."""
    kept = tuple(one for one in report.tasks if (one.task, one.fingerprint) != (result.task, result.fingerprint))
    return replace(report, tasks=(*kept, result))


def find_original(asked_for: str | None, recorded: SourceInfo) -> str:
    """Return the original to compare with: the one asked for, or the recorded one if it is still there, unchanged.

    Raises:
        EvaluationError: none was asked for, and the recorded one is gone, has other weights now, or was imported.
    """
    if asked_for is not None:
        return asked_for
    remedy = "say with --original what to compare with"
    if not Path(recorded.model).expanduser().exists():
        raise EvaluationError(f"{recorded.model}, which the artifact was made from, is not on this machine; {remedy}")
    if is_published(find_folder(recorded.model)):
        raise EvaluationError(f"{recorded.model}, which was imported, is the compressed model itself; {remedy}")
    if WeightStore(find_folder(recorded.model)).sha256() != recorded.sha256:
        raise EvaluationError(f"{recorded.model} has other weights now than the artifact was made from; {remedy}")
    return recorded.model


def choose_dtype(asked_for: str, device: str) -> torch.dtype:
    """Turn `auto` into bfloat16 on a GPU or a CPU that multiplies it fast (AMX, AVX512_BF16), else into float32."""
    if asked_for != "auto":
        return DTYPES[asked_for]
    has = torch.cpu.get_capabilities()
    fast = device != "cpu" or any(has.get(feature, False) for feature in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32

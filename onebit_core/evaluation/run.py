"""Evaluate an artifact against its original and write the results into it.

    artifact (unpacked once) + original + named texts  ->  report.json of the artifact

Every text is written as soon as it is finished, so an interrupted run keeps what it has. A result replaces an
earlier one of the same text: same name, same token ids, same window length.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from onebit_core.artifact.manifest import EvaluationResult, Report, SourceInfo
from onebit_core.artifact.reader import DTYPES, load_model, read_manifest, read_report
from onebit_core.artifact.writer import update_report
from onebit_core.config import StrictConfig
from onebit_core.errors import EvaluationError
from onebit_core.evaluation.compare import evaluate_models
from onebit_core.evaluation.windows import read_windows
from onebit_core.kernels import resolve_device
from onebit_core.model.loading import find_folder, load_original
from onebit_core.model.weights import WeightStore
from onebit_core.progress import Watch


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StrictConfig):
    """What to evaluate on.

    Attributes:
        texts: name of a text to its source, see onebit_core.calibration.sources.
        original: the uncompressed model; None for the one the artifact was made from.
        windows: how many windows of each text; None for all it has.
        window_tokens: length of a window.
        device: auto, cpu, cuda or cuda:N.
        dtype: of both models; auto is bfloat16 where the hardware multiplies it fast, else float32.
    """

    texts: dict[str, str]
    original: str | None = None
    windows: int | None = 60
    window_tokens: int = 2048
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def evaluate_artifact(
    artifact: Path, config: EvaluateConfig, watch: Watch | None = None
) -> tuple[EvaluationResult, ...]:
    """Measure what an artifact lost on every text, and write it into the artifact.

    Returns:
        One result a text, in the order given.

    Raises:
        EvaluationError: a text cannot be used, or the original is not where the artifact says.
        ArtifactError, ModelError: a model cannot be loaded.
        Cancelled: between two windows.
    """
    watch = watch or Watch()
    manifest = read_manifest(artifact)
    source = find_original(config.original, manifest.source)
    if not config.texts:
        raise EvaluationError("no text to evaluate on; name at least one as NAME=FILE")
    device = resolve_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    watch.report("load", 0, 2)
    loaded = load_model(artifact, device=device, dtype=str(dtype).removeprefix("torch."), backend="dense")
    texts = [
        read_windows(name, text, loaded.tokenizer, windows=config.windows, window_tokens=config.window_tokens)
        for name, text in config.texts.items()
    ]
    watch.report("load", 1, 2)
    original, _ = load_original(source, device=device, dtype=dtype)
    watch.report("load", 2, 2)
    results = []
    for windows in texts:
        scored = evaluate_models(original, {manifest.name: loaded.model}, windows, watch)
        results.append(scored[manifest.name])
        update_report(artifact, with_result(read_report(artifact), results[-1]))
    return tuple(results)


def with_result(report: Report, result: EvaluationResult) -> Report:
    """Return the report with a result added, in place of an earlier one of the same text."""

    def key(one: EvaluationResult) -> tuple[str, str, int]:
        return one.dataset, one.fingerprint, one.window_tokens

    kept = tuple(one for one in report.evaluation if key(one) != key(result))
    return replace(report, evaluation=(*kept, result))


def find_original(asked_for: str | None, recorded: SourceInfo) -> str:
    """Return the original to compare with: the one asked for, or the recorded one if it is still there, unchanged.

    Raises:
        EvaluationError: none was asked for, and the recorded one is gone or has other weights now.
    """
    if asked_for is not None:
        return asked_for
    remedy = "say with --original what to compare with"
    if not Path(recorded.model).expanduser().exists():
        raise EvaluationError(f"{recorded.model}, which the artifact was made from, is not on this machine; {remedy}")
    if WeightStore(find_folder(recorded.model)).sha256() != recorded.sha256:
        raise EvaluationError(f"{recorded.model} has other weights now than the artifact was made from; {remedy}")
    return recorded.model


def choose_dtype(asked_for: str, device: str) -> torch.dtype:
    """Turn `auto` into bfloat16 on a GPU or a CPU with matrix units (AMX), else float32, which is faster there."""
    if asked_for != "auto":
        return DTYPES[asked_for]
    fast = device != "cpu" or bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.bfloat16 if fast else torch.float32

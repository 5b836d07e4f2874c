"""What each method costs in accuracy: quantize one model in many ways, evaluate all in one pass, write one CSV.

    python -m benchmarks.quality --work DIR --text wikitext2=FILE --windows wikitext2=60 --calibration FILE

Artifacts are kept under --work and not made twice, so an interrupted run continues, and a run with other texts only
evaluates. The original's logits are computed once a window for all artifacts that fit into memory together.
"""

import argparse
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.kernel_bench.results import write_table
from benchmarks.quality_picture import draw, picture_of
from benchmarks.quality_rows import ROWS, Row
from benchmarks.quality_table import markdown
from onebit_core.artifact.manifest import EvaluationResult, Manifest, Report
from onebit_core.artifact.reader import load_model, read_manifest, read_report
from onebit_core.artifact.writer import update_report
from onebit_core.calibration.sources import BUILTIN, SELF
from onebit_core.cli.evaluate import parse_texts
from onebit_core.cli.output import progress_watch
from onebit_core.errors import ConfigError, OnebitError
from onebit_core.evaluation.compare import evaluate_models
from onebit_core.evaluation.run import choose_dtype, with_result
from onebit_core.evaluation.windows import TokenWindows, read_windows
from onebit_core.kernels import resolve_device
from onebit_core.model.loading import load_original
from onebit_core.model.sample import sample_model_path
from onebit_core.pipeline.config import CalibrationConfig, QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
from onebit_core.progress import Watch
from onebit_core.reconstruction import ReconstructionConfig

RESULTS = Path(__file__).parent / "results"
SHARE_OF_MEMORY = 0.6
"""Of the free memory, for the candidates of one evaluation pass."""


def main() -> int:
    """Run what the arguments ask for."""
    options = _arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with progress_watch(options.progress) as watch:
            lines = _run(options, watch)
    except OnebitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(lines))
    file = _file_of(options)
    draw([file], picture_of(file))
    return 0


def _run(options: argparse.Namespace, watch: Watch) -> list[dict[str, Any]]:
    """Quantize, evaluate, write; return the lines of the CSV."""
    rows = choose_rows(options.rows)
    texts = parse_texts(options.text)
    counts = _counts(options.windows, texts)
    device = resolve_device(options.device)
    folders = {row.name: _quantized(row, options, device, watch) for row in rows}
    dtype = choose_dtype(options.dtype, device)
    original, tokenizer = load_original(options.model, device=device, dtype=dtype)
    windows = [
        read_windows(name, source, tokenizer, window_tokens=options.window_tokens, windows=counts.get(name))
        for name, source in texts.items()
    ]
    lines: list[dict[str, Any]] = []
    for group in _groups(folders, original):
        for result, name in _evaluated(group, original, windows, watch):
            lines.append(line_of(read_manifest(folders[name]), read_report(folders[name]), result))
            write_table(_file_of(options), lines)
    order = [*texts, *(row.name for row in rows)]
    lines.sort(key=lambda line: (order.index(line["dataset"]), order.index(line["row"])))
    write_table(_file_of(options), lines)
    return lines


def _counts(arguments: list[str], texts: Mapping[str, str]) -> dict[str, int]:
    """Read NAME=COUNT arguments."""
    counts = parse_texts(arguments)
    for name, count in counts.items():
        if name not in texts or not count.isdecimal():
            raise ConfigError(f"--windows {name}={count}: expected the name of a --text and a number of windows")
    return {name: int(count) for name, count in counts.items()}


def choose_rows(names: Sequence[str]) -> list[Row]:
    """Return the rows of some names, in table order; all, if none is named.

    Raises:
        ConfigError: an unknown name.
    """
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise ConfigError(f"--rows {name}: unknown; known: {', '.join(known)}")
    return [row for row in ROWS if not names or row.name in names]


def _quantized(row: Row, options: argparse.Namespace, device: str, watch: Watch) -> Path:
    """Return the artifact of a row, made now unless an earlier run has left it.

    Raises:
        ConfigError: the earlier run made it with other settings.
    """
    out: Path = options.work / row.name
    if row.start is not None:
        return _trained(row, row.start, options, device, watch)
    config = _config_of(row, options, device)
    if out.exists():
        manifest = read_manifest(out)
        asked = config.calibration.to_dict() if manifest.calibration else {}
        wanted = {key: value for key, value in asked.items() if value is not None}
        found = {key: manifest.calibration.get(key) for key in wanted}
        trained = config.reconstruction.to_dict() if config.reconstruction.enabled else {}
        made = (manifest.settings, found, manifest.reconstruction, manifest.allocation.get("bits"))
        if made != (config.settings, wanted, trained, config.bits):
            raise ConfigError(f"{out}: made by an earlier run with other settings; remove it or choose another --work")
        return out
    print(f"{row.name}: quantizing", file=sys.stderr)
    with _unfinished(options.work, row) as work:
        quantize_model(config, out, watch=watch, work=work)
    return out


@contextmanager
def _unfinished(folder: Path, row: Row) -> Iterator[Path]:
    """Give a folder for what a row has finished so far; it is removed when the row is done."""
    work = folder / ".unfinished" / row.name
    yield work
    shutil.rmtree(work, ignore_errors=True)


def _trained(row: Row, start: str, options: argparse.Namespace, device: str, watch: Watch) -> Path:
    """Return the artifact of a row that is another row's, trained.

    Raises:
        ConfigError: an earlier run made it with other settings.
    """
    out: Path = options.work / row.name
    (before,) = choose_rows([start])
    artifact = _quantized(before, options, device, watch)
    training = {"tokens": options.tokens, **_training_text(row, options.calibration or [BUILTIN]), **row.training}
    config = TrainArtifactConfig.from_dict(
        {"artifact": str(artifact), "original": options.model, "training": training, "name": row.name, "device": device}
    )
    if out.exists():
        made = read_manifest(out).training
        asked = {**config.training.to_dict(), "start": read_manifest(artifact).sha256}
        if any(made.get(key) != value for key, value in asked.items() if value is not None):
            raise ConfigError(f"{out}: made by an earlier run with other settings; remove it or choose another --work")
        return out
    print(f"{row.name}: training {start}", file=sys.stderr)
    with _unfinished(options.work, row) as work:
        train_artifact(config, out, watch=watch, work=work)
    return out


def _training_text(row: Row, texts: Sequence[str]) -> dict[str, Any]:
    """Return the texts of a training with their weights: what the original writes beside the calibration's."""
    if not row.written:
        return {"text": texts}
    return {"text": [*texts, SELF], "weights": [(1 - row.written) / len(texts)] * len(texts) + [row.written]}


def _config_of(row: Row, options: argparse.Namespace, device: str) -> QuantizeConfig:
    """Return what a row means under the given options."""
    calibration: dict[str, Any] = {"tokens": options.tokens, "seed": options.seed}
    if options.samples:
        calibration["samples"] = options.samples
    if options.calibration:
        calibration["text"] = options.calibration
    return QuantizeConfig(
        model=options.model,
        method=row.method,
        settings=dict(row.settings),
        calibration=CalibrationConfig.from_dict(calibration),
        reconstruction=ReconstructionConfig.from_dict({"preset": row.preset}),
        bits=row.bits,
        embedding_bits=options.embedding_bits,
        name=row.name,
        device=device,
    )


def _groups(folders: Mapping[str, Path], original: PreTrainedModel) -> Iterator[dict[str, Path]]:
    """Cut the artifacts into groups that fit into memory beside the original, unpacked."""
    one = sum(parameter.numel() * parameter.element_size() for parameter in original.parameters())
    if original.device.type == "cuda":
        free = torch.cuda.mem_get_info(original.device)[0]
    else:
        free = psutil.virtual_memory().available
    # An unpacked artifact keeps its packed tensors, at most about half of the original's size, beside the dense ones.
    size = max(1, int(SHARE_OF_MEMORY * free / (1.5 * one)))
    names = list(folders)
    for start in range(0, len(names), size):
        yield {name: folders[name] for name in names[start : start + size]}


def _evaluated(
    group: Mapping[str, Path], original: PreTrainedModel, windows: Sequence[TokenWindows], watch: Watch
) -> Iterator[tuple[EvaluationResult, str]]:
    """Evaluate a group of artifacts on every text, writing each result into its artifact."""
    dtype = str(original.dtype).removeprefix("torch.")
    device = str(original.device)
    models = {
        name: load_model(folder, device=device, dtype=dtype, backend="dense").model for name, folder in group.items()
    }
    for text in windows:
        for name, result in evaluate_models(original, models, text, watch).items():
            update_report(group[name], with_result(read_report(group[name]), result))
            yield result, name


def line_of(manifest: Manifest, report: Report, result: EvaluationResult) -> dict[str, Any]:
    """Return one line of the CSV, with everything needed to judge or repeat it."""
    return {
        "row": manifest.name,
        "method": manifest.method,
        "settings": json.dumps(manifest.settings, sort_keys=True),
        "reconstruction": json.dumps(manifest.reconstruction, sort_keys=True) if manifest.reconstruction else "",
        "allocation": manifest.allocation.get("bits", ""),
        "training": json.dumps(without_folders(manifest.training), sort_keys=True) if manifest.training else "",
        "true_bits_linear": round(manifest.bits.linear_true, 4),
        "nominal_bits_linear": round(manifest.bits.linear_nominal, 4),
        "whole_model_bits": round(manifest.bits.whole_model, 4),
        "artifact_bytes": sum(manifest.bytes_by_part.values()),
        "dataset": result.dataset,
        "fingerprint": result.fingerprint,
        "windows": result.windows,
        "window_tokens": result.window_tokens,
        "ppl_original": _digits(result.original.value),
        "ppl_original_se": _digits(result.original.standard_error),
        "ppl": _digits(result.compressed.value),
        "ppl_se": _digits(result.compressed.standard_error),
        "ratio": _digits(result.compressed.value / result.original.value),
        "kl_mean": _digits(result.kl_mean),
        "kl_se": _digits(result.kl_standard_error),
        "kl_median": _digits(result.kl_median),
        "kl_p99": _digits(result.kl_p99),
        "kl_max": _digits(result.kl_max),
        "top1": _digits(result.top1_agreement),
        "top1_se": _digits(result.top1_standard_error),
        "quantize_seconds": report.seconds.get("quantize", ""),
        "train_seconds": report.seconds.get("train", ""),
        "calibration": json.dumps(without_folders(manifest.calibration), sort_keys=True),
        "device": f"{result.device}, {psutil.cpu_count(logical=False)} cores, {result.dtype}",
        "date": result.date,
        "command": _command(sys.argv),
        "versions": json.dumps({**result.versions, "platform": platform.system()}, sort_keys=True),
    }


def _command(arguments: Sequence[str]) -> str:
    """Return the command without the folders of its files: `--text news=/data/news.txt` becomes `news=news.txt`."""
    shown = []
    for argument in arguments[1:]:
        name, separator, file = argument.rpartition("=")
        shown.append(name + separator + Path(file).name)
    return shlex.join(["python", "-m", "benchmarks.quality", *shown])


def _digits(value: float) -> float:
    """Keep six digits; more would be noise."""
    return float(f"{value:.6g}")


def without_folders(record: Mapping[str, Any]) -> dict[str, Any]:
    """Name texts by file name: the folders they lie in mean nothing elsewhere."""
    changed: dict[str, Any] = {"text": [Path(text).name for text in record.get("text", [])]}
    for key, value in record.items():
        if isinstance(value, Mapping):  # by text
            changed[key] = {Path(text).name: one for text, one in value.items()}
    return {key: changed.get(key, value) for key, value in record.items()}


def _file_of(options: argparse.Namespace) -> Path:
    """Return the CSV to write; a run that ends on another day than it began keeps its name."""
    stem = Path(options.model).name.removesuffix(".gguf")
    options.out = options.out or RESULTS / f"quality_{stem}_{datetime.now(UTC):%Y-%m-%d}.csv"
    out: Path = options.out
    return out


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None, help="folder, hub id or GGUF file; default: the sample model")
    parser.add_argument("--work", type=Path, required=True, help="where artifacts are kept")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="evaluation text")
    parser.add_argument("--windows", action="append", default=[], metavar="NAME=COUNT", help="default: all of a text")
    parser.add_argument("--window-tokens", type=int, default=2048)
    parser.add_argument("--calibration", action="append", default=[], metavar="FILE", help="default: builtin text")
    parser.add_argument("--samples", type=int, help="Calibration windows; default: what is usual for a row's preset.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--embedding-bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument(
        "--rows", nargs="*", default=[], help=f"a choice of: {', '.join(r.name for r in ROWS)}".replace("%", "%%")
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--out", type=Path, default=None, help="CSV file; default: benchmarks/results/quality_...")
    parser.add_argument("--progress", choices=("auto", "bar", "json", "none"), default="auto")
    options = parser.parse_args()
    options.model = options.model or str(sample_model_path())
    return options


if __name__ == "__main__":
    sys.exit(main())

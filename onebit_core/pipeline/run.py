"""quantize_model(): the main path of the core, read top to bottom.

Blocks are done one after the other, and inside a block the groups of linears that share an input, each calibrated on
what the already quantized prefix really delivers. In memory are at any time: one block, one Hessian, the activations of
the calibration samples, and the packed layers.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from onebit_core.artifact.manifest import LayerReport, Report
from onebit_core.artifact.writer import ArtifactDraft, refuse_existing, write_artifact
from onebit_core.calibration.sampling import CalibrationTokens, sample_tokens
from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import BadWeight, CalibrationError
from onebit_core.kernels import resolve_device
from onebit_core.layers import QuantizedLinear
from onebit_core.methods.second_order import output_error, weight_error
from onebit_core.model.blocks import linear_of
from onebit_core.model.loading import OriginalModel, open_original
from onebit_core.model.replace import replace_module
from onebit_core.pipeline.capture import CapturedInputs
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.plan import Plan, make_plan
from onebit_core.pipeline.resume import BlockResult, WorkFolder
from onebit_core.progress import Watch
from onebit_core.reconstruction import distill_scales, reconstruct_block

QUIET = Watch()


def quantize_model(config: QuantizeConfig, out: Path, *, watch: Watch = QUIET, work: Path | None = None) -> Path:
    """Quantize a model and write the artifact.

    Args:
        config: everything that decides the result.
        out: the artifact's folder; must not exist.
        watch: where progress goes, and who may stop the run (looked at after every block).
        work: folder for finished blocks, so that a stopped run can continue; None keeps nothing.

    Returns:
        `out`.

    Raises:
        OnebitError: see onebit_core.errors; nothing half-written remains.
    """
    started = time.monotonic()
    refuse_existing(out)
    watch.report("load", 0, 1, model=config.model)
    original = open_original(config.model)
    plan = make_plan(original, config)
    device = resolve_device(config.device)
    tokens = _calibration_tokens(original, config) if plan.calibrated else None
    folder = WorkFolder(work, _fingerprint(original, config, tokens)) if work else None
    original.load_outer(device)
    watch.report("load", 1, 1, model=config.model, blocks=plan.num_blocks)

    watch.report("calibrate", 0, 1)
    captured = CapturedInputs(original, tokens.ids_ST, device) if tokens else None
    if captured is not None and config.reconstruction.needs_teacher:
        captured.follow_original()
    watch.report("calibrate", 1, 1)

    layers: dict[str, QuantizedLinear] = {}
    reports: list[LayerReport] = []
    watch.report("quantize", 0, plan.num_blocks)
    for index in range(plan.num_blocks):
        result = _finish_block(original, (plan, config), (index, captured, folder), device, watch)
        for name, (layer, report) in result.items():
            path = f"{original.layout.blocks}.{index}.{name}"
            layers[path] = layer
            reports.append(dataclasses.replace(report, name=path))
        error = _mean_error([report for _, report in result.values()])
        watch.report("quantize", index + 1, plan.num_blocks, block=index, relative_error=error)
    if captured is not None and config.reconstruction.distill_epochs:
        _distill(original, captured, config, device, watch)

    watch.report("write", 0, 1)
    draft = ArtifactDraft(
        name=config.name or default_name(config),
        method=config.method,
        settings=config.settings,
        nominal_bits=plan.method.nominal_bits(config.method_settings()),
        calibration=_calibration_record(config, tokens),
        reconstruction=config.reconstruction.to_dict() if config.reconstruction.enabled else {},
        embedding_bits=config.embedding_bits,
        layers=layers,
        report=Report(layers=tuple(reports), seconds={"quantize": round(time.monotonic() - started, 1)}),
    )
    write_artifact(original, draft, out)
    watch.tell("write", 1, 1, artifact=str(out))  # the artifact is there: too late to cancel
    return out


def _distill(
    original: OriginalModel, captured: CapturedInputs, config: QuantizeConfig, device: str, watch: Watch
) -> None:
    """Train the scales of all layers together; the layers in the model's blocks are those that will be written."""
    assert captured.original_STD is not None
    blocks = original.blocks.to(device)
    watch.report("distill", 0, 1)
    distill_scales(
        original.model,
        blocks,
        (captured.ids_ST, captured.original_STD),
        config.reconstruction,
        lambda done, total, kl: watch.report("distill", done, total, kl=round(kl, 4)),
    )
    blocks.cpu()


def default_name(config: QuantizeConfig) -> str:
    """Make a model name from the original's and the method's."""
    stem = Path(config.model).name.removesuffix(".gguf")
    return f"{stem}-{config.method}"


def _finish_block(
    original: OriginalModel,
    task: tuple[Plan, QuantizeConfig],
    place: tuple[int, CapturedInputs | None, WorkFolder | None],
    device: str,
    watch: Watch,
) -> BlockResult:
    """Quantize one block, or take it from the work folder; carry the activations on."""
    plan, config = task
    index, captured, folder = place
    block = original.load_block(index, device)
    result = folder.load(index) if folder else None
    if captured is not None:
        captured.advance_original(block)
    if result is None:
        result = _quantize_block(block, index, (plan, config), captured, watch.cancel.raise_if_cancelled)
        if folder:
            folder.save(index, result)
    for name, (layer, _) in result.items():
        replace_module(block, name, layer.to(device))
    if captured is not None:
        captured.advance(block)
    for layer, _ in result.values():
        layer.cpu()
    original.release_block(index)
    return result


def _quantize_block(
    block: nn.Module,
    index: int,
    task: tuple[Plan, QuantizeConfig],
    captured: CapturedInputs | None,
    check: Callable[[], None],
) -> BlockResult:
    """Quantize the groups of one block in order, each on inputs from the groups already in place; then train them."""
    plan, config = task
    result: BlockResult = {}
    weights = {name: linear_of(block, name).weight.detach().float() for group in plan.groups for name in group}
    targets_STD = None
    if captured is not None and config.reconstruction.epochs:
        from_original = config.reconstruction.target == "original"
        targets_STD = captured.original_STD if from_original else captured.outputs(block)
    for position, group in enumerate(plan.groups):
        statistics = None
        if captured is not None:
            # The first group reads attention's input, where the first token is the sink of all others.
            weight = config.calibration.first_token_weight if position == 0 else 1.0
            statistics = captured.statistics(block, group[0], weight)
            if not torch.isfinite(statistics.hessian_II).all():
                raise CalibrationError(
                    f"block {index}, {group[0]}: its inputs are not finite on the calibration text; "
                    "the original overflows in float32, or its weights are damaged"
                )
        for name in group:
            result[name] = _quantize_linear(block, index, name, statistics, (plan, config))
            replace_module(block, name, result[name][0])
    if captured is not None and targets_STD is not None:
        samples = (captured.hidden_STD, targets_STD)
        reconstruct_block(block, weights, samples, captured.run, config.reconstruction, check)
        _measure_again(block, plan, config, captured, (weights, result))
    for layer, _ in result.values():
        layer.start = {}
    return result


def _measure_again(
    block: nn.Module,
    plan: Plan,
    config: QuantizeConfig,
    captured: CapturedInputs,
    trained: tuple[dict[str, Tensor], BlockResult],
) -> None:
    """Bring the reports of a reconstructed block up to date, on the inputs that its layers have now."""
    weights, result = trained
    for position, group in enumerate(plan.groups):
        weight = config.calibration.first_token_weight if position == 0 else 1.0
        statistics = captured.statistics(block, group[0], weight)
        for name in group:
            layer, report = result[name]
            decided_OI = layer.dequantize()
            report = dataclasses.replace(
                report,
                weight_error=weight_error(weights[name], decided_OI),
                output_error=output_error(weights[name], decided_OI, statistics.hessian_II),
            )
            result[name] = (layer, report)


def _quantize_linear(
    block: nn.Module,
    index: int,
    name: str,
    statistics: InputStatistics | None,
    task: tuple[Plan, QuantizeConfig],
) -> tuple[QuantizedLinear, LayerReport]:
    """Quantize one linear and measure what it lost."""
    plan, config = task
    started = time.monotonic()
    linear = linear_of(block, name)
    weight_OI: Tensor = linear.weight.detach().float()
    if not torch.isfinite(weight_OI).all():
        raise BadWeight(f"block {index}, {name}: the weight holds NaN or infinite values")
    layer = plan.method.quantize(weight_OI, statistics, config.method_settings())
    if linear.bias is not None:
        layer.set_bias(linear.bias)
    decided_OI = layer.dequantize()
    report = LayerReport(
        name=name,
        block=index,
        projection=name.rpartition(".")[2],
        method=config.method,
        bits=round(layer.bits_per_weight(), 4),
        weight_error=weight_error(weight_OI, decided_OI),
        output_error=None if statistics is None else output_error(weight_OI, decided_OI, statistics.hessian_II),
        seconds=round(time.monotonic() - started, 3),
    )
    return layer, report


def _calibration_tokens(original: OriginalModel, config: QuantizeConfig) -> CalibrationTokens:
    """Draw the calibration windows; all ids are rows of the embedding."""
    calibration = config.calibration
    tokens = sample_tokens(
        original.tokenizer,
        calibration.text,
        samples=calibration.samples,
        tokens=calibration.tokens,
        seed=calibration.seed,
    )
    rows, largest = original.config.get_text_config().vocab_size, int(tokens.ids_ST.max())
    if largest >= rows:
        raise CalibrationError(
            f"{original.folder}: the tokenizer gives id {largest}, and the embedding has {rows} rows; "
            "tokenizer and weights are not of the same model"
        )
    return tokens


def _calibration_record(config: QuantizeConfig, tokens: CalibrationTokens | None) -> dict[str, object]:
    """Return what the manifest says about calibration; empty if there was none."""
    if tokens is None:
        return {}
    return {**config.calibration.to_dict(), "fingerprints": tokens.fingerprints}


def _fingerprint(original: OriginalModel, config: QuantizeConfig, tokens: CalibrationTokens | None) -> dict[str, str]:
    """Return what must be equal for a run to continue another; tokens, since text behind the same name may change."""
    ids = b"" if tokens is None else tokens.ids_ST.numpy().astype("<i4").tobytes()
    return {
        "config": config.fingerprint(),
        "source": original.store.sha256(),
        "calibration": hashlib.sha256(ids).hexdigest(),
    }


def _mean_error(reports: list[LayerReport]) -> float:
    """Return a block's mean output error, or weight error where nothing was calibrated."""
    errors = [report.weight_error if report.output_error is None else report.output_error for report in reports]
    return round(sum(errors) / len(errors), 6)

"""quantize_model(): the main path of the core, read top to bottom.

Blocks are done one after the other, and inside a block the groups of linears that share an input, each calibrated on
what the already quantized prefix really delivers. In memory are at any time: one block, one Hessian, the activations of
the calibration samples, and the packed layers.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.artifact.manifest import LayerReport, Report
from onebit_core.artifact.writer import ArtifactDraft, current_versions, refuse_existing, write_artifact
from onebit_core.calibration.sampling import CalibrationTokens, fingerprint_of
from onebit_core.errors import BadWeight, CalibrationError
from onebit_core.kernels import resolve_device
from onebit_core.layers import QuantizedLinear
from onebit_core.methods.second_order import output_error, weight_error
from onebit_core.model.blocks import linear_names, linear_of, steps_of
from onebit_core.model.loading import OriginalModel, open_original
from onebit_core.model.replace import replace_module
from onebit_core.pipeline.allocation import Allocation, choose_settings
from onebit_core.pipeline.calibrate import calibration_record, calibration_tokens
from onebit_core.pipeline.capture import CapturedInputs
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.group_statistics import GroupStatistics, step_statistics
from onebit_core.pipeline.plan import Plan, make_plan
from onebit_core.pipeline.resume import BlockResult, WorkFolder
from onebit_core.pipeline.rotation import quantize_weight
from onebit_core.pipeline.training import TrainingPlace, train_layers, training_tokens
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
    tokens = calibration_tokens(original, config, device=device, work=work, watch=watch) if plan.calibrated else None
    finished = WorkFolder(work, _fingerprint(original, config, tokens)) if work else None
    learned = training_tokens(original, config.training, config.calibration, device=device, work=work, watch=watch)
    watch.report("load", 1, 1, model=config.model, blocks=plan.num_blocks)

    allocation = _spread_bits(original, config, tokens, device, watch, work)
    if allocation is not None:
        plan = dataclasses.replace(plan, allocation=allocation)

    samples_folder = (work or out.parent) if plan.memory.disk else None
    layers, reports = _quantize_blocks(original, (plan, config), tokens, (samples_folder, finished), device, watch)
    quantized = time.monotonic()
    training, curve = _train(original, config, (tokens, learned), device, watch, work)

    watch.report("write", 0, 1)
    draft = ArtifactDraft(
        name=config.name or default_name(config),
        method=config.method,
        settings=config.settings,
        nominal_bits=_nominal_bits(plan, config, layers),
        calibration=calibration_record(config, tokens),
        reconstruction=config.reconstruction.to_dict() if config.reconstruction.enabled else {},
        training=training,
        rotation=config.rotation,
        allocation={} if allocation is None else allocation.record(config.settings),
        embedding_bits=config.embedding_bits,
        layers=layers,
        report=Report(layers=reports, seconds=_seconds(started, quantized, trained=bool(training)), training=curve),
    )
    write_artifact(original, draft, out)
    watch.tell("write", 1, 1, artifact=str(out))  # the artifact is there: too late to cancel
    return out


def _spread_bits(
    original: OriginalModel,
    config: QuantizeConfig,
    tokens: CalibrationTokens | None,
    device: str,
    watch: Watch,
    work: Path | None,
) -> Allocation | None:
    """Choose the settings of every linear, where an average of bits was asked for."""
    if config.bits is None:
        return None
    assert tokens is not None
    original.load_outer(device)
    allocation = choose_settings(original, config, tokens.ids_ST, device, watch, work)
    original.release_outer()
    return allocation


def _train(
    original: OriginalModel,
    config: QuantizeConfig,
    texts: tuple[CalibrationTokens | None, CalibrationTokens | None],
    device: str,
    watch: Watch,
    work: Path | None,
) -> tuple[dict[str, Any], tuple[dict[str, float], ...]]:
    """Train all layers together, if asked to; return what manifest and report say of it."""
    tokens, learned = texts
    if learned is None:
        return {}, ()
    run = {**_fingerprint(original, config, tokens), "embedding_bits": config.embedding_bits}
    place = TrainingPlace(device=device, watch=watch, work=work, run=run)
    record, result = train_layers(original, config.training, learned, config.embedding_bits, place)
    return record, tuple(result.curve)


def _seconds(started: float, quantized: float, *, trained: bool) -> dict[str, float]:
    """Return what the stages took."""
    seconds = {"quantize": round(quantized - started, 1)}
    return {**seconds, "train": round(time.monotonic() - quantized, 1)} if trained else seconds


def _nominal_bits(plan: Plan, config: QuantizeConfig, layers: dict[str, QuantizedLinear]) -> float:
    """Return what the method's paper would advertise, averaged over weights where settings differ."""
    weights = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    total = sum(plan.method.nominal_bits(plan.settings_of(path, config)) * size for path, size in weights.items())
    return total / sum(weights.values())


def _quantize_blocks(
    original: OriginalModel,
    task: tuple[Plan, QuantizeConfig],
    tokens: CalibrationTokens | None,
    folders: tuple[Path | None, WorkFolder | None],
    device: str,
    watch: Watch,
) -> tuple[dict[str, QuantizedLinear], tuple[LayerReport, ...]]:
    """Quantize all blocks, by module path; nothing of the calibration samples is left afterwards.

    Args:
        original: the model.
        task: what will be done.
        tokens: the calibration windows.
        folders: where activations are kept on disk, and where finished blocks are; None for nowhere.
        device: where blocks are run.
        watch: told of every block.
    """
    plan, config = task
    samples_folder, finished = folders
    watch.report("calibrate", 0, 1)
    captured = _capture(original, config, tokens, device, samples_folder)
    watch.report("calibrate", 1, 1)

    layers: dict[str, QuantizedLinear] = {}
    reports: list[LayerReport] = []
    watch.report("quantize", 0, plan.num_blocks)
    for index in range(plan.num_blocks):
        result = _finish_block(original, task, (index, captured, finished), device, watch)
        for name, (layer, report) in result.items():
            path = f"{original.layout.blocks}.{index}.{name}"
            layers[path] = layer
            reports.append(dataclasses.replace(report, name=path))
        error = _mean_error([report for _, report in result.values()])
        watch.report("quantize", index + 1, plan.num_blocks, block=index, relative_error=error)
    if captured is not None and config.reconstruction.distill_epochs:
        _distill(original, captured, config, device, watch)
    return layers, tuple(reports)


def _capture(
    original: OriginalModel, config: QuantizeConfig, tokens: CalibrationTokens | None, device: str, folder: Path | None
) -> CapturedInputs | None:
    """Run what is before the blocks; what is outside of them stays in memory only if distillation will need it."""
    if tokens is None:
        return None
    distills = bool(config.reconstruction.distill_epochs)
    original.load_outer(device, head=distills)
    captured = CapturedInputs(original, tokens.ids_ST, device, folder, recorded=config.statistics_samples)
    if config.reconstruction.needs_teacher:
        captured.follow_original()
    if not distills:
        original.release_outer()
    return captured


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
    names = linear_names(block, plan.layout)
    weights = {name: linear_of(block, name).weight.detach().float() for name in names}
    targets_STD = None
    if captured is not None and config.reconstruction.epochs:
        from_original = config.reconstruction.target == "original"
        targets_STD = captured.original_STD if from_original else captured.outputs(block)
    for recorded in _record(block, index, (plan, config), captured):
        for name in recorded.linears:
            result[name] = _quantize_linear(block, index, name, recorded, (plan, config))
            replace_module(block, name, result[name][0])
    if captured is not None and targets_STD is not None:
        samples = (captured.hidden_STD, targets_STD)
        reconstruct_block(block, weights, samples, captured.run, config.reconstruction, check)
        _measure_again(block, index, (plan, config), captured, (weights, result))
    for layer, _ in result.values():
        layer.forget_start()
    return {name: result[name] for name in names}


def _record(
    block: nn.Module, index: int, task: tuple[Plan, QuantizeConfig], captured: CapturedInputs | None
) -> Iterator[GroupStatistics]:
    """Yield the groups of a block in order of computation, each recorded when it is asked for.

    Raises:
        CalibrationError: inputs that are not finite.
    """
    plan, config = task
    for position, step in enumerate(steps_of(block, plan.layout)):
        if captured is None:
            yield from (GroupStatistics(linears=group) for group in step)
            continue
        # The first group reads attention's input, where the first token is the sink of all others.
        weight = config.calibration.first_token_weight if position == 0 else 1.0
        for recorded in step_statistics(captured, block, step, weight):
            if recorded.statistics is not None and not torch.isfinite(recorded.statistics.hessian_II).all():
                raise CalibrationError(
                    f"block {index}, {recorded.linears[0]}: its inputs are not finite on the calibration text; "
                    "the original overflows in float32, or its weights are damaged"
                )
            yield recorded


def _measure_again(
    block: nn.Module,
    index: int,
    task: tuple[Plan, QuantizeConfig],
    captured: CapturedInputs,
    trained: tuple[dict[str, Tensor], BlockResult],
) -> None:
    """Bring the reports of a reconstructed block up to date, on the inputs that its layers have now."""
    weights, result = trained
    for recorded in _record(block, index, task, captured):
        assert recorded.statistics is not None
        for name in recorded.linears:
            layer, report = result[name]
            decided_OI = layer.dequantize()
            report = dataclasses.replace(
                report,
                weight_error=weight_error(weights[name], decided_OI),
                output_error=output_error(weights[name], decided_OI, recorded.statistics.hessian_II),
            )
            result[name] = (layer, report)


def _quantize_linear(
    block: nn.Module,
    index: int,
    name: str,
    recorded: GroupStatistics,
    task: tuple[Plan, QuantizeConfig],
) -> tuple[QuantizedLinear, LayerReport]:
    """Quantize one linear and measure what it lost."""
    plan, config = task
    statistics = recorded.statistics
    started = time.monotonic()
    linear = linear_of(block, name)
    weight_OI: Tensor = linear.weight.detach().float()
    if not torch.isfinite(weight_OI).all():
        raise BadWeight(f"block {index}, {name}: the weight holds NaN or infinite values")
    settings = plan.settings_of(f"{plan.layout.blocks}.{index}.{name}", config)
    layer = quantize_weight(plan.method, weight_OI, statistics, settings, config.rotation)
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
        notes=recorded.notes,
    )
    return layer, report


def _fingerprint(original: OriginalModel, config: QuantizeConfig, tokens: CalibrationTokens | None) -> dict[str, str]:
    """Return what must be equal for a run to continue another; tokens, since text behind the same name may change."""
    return {
        "version": current_versions()["onebit"],
        "config": config.fingerprint(),
        "source": original.store.sha256(),
        "calibration": "" if tokens is None else fingerprint_of(tokens.ids_ST),
    }


def _mean_error(reports: list[LayerReport]) -> float:
    """Return a block's mean output error, or weight error where nothing was calibrated."""
    errors = [report.weight_error if report.output_error is None else report.output_error for report in reports]
    return round(sum(errors) / len(errors), 6)

"""Spreads bits over layers: given an average of true bits, every linear gets the settings that cost the model least.

    minimize   sum_l cost_l(r_l)      over rungs r_l of the method's ladder
    such that  sum_l size_l(r_l)  <=  bits * sum_l weights_l

cost_l is the loss that quantizing layer l that far costs (pipeline.sensitivity), size_l what it stores, scales and
indices included. Of every layer only the rungs on the lower convex hull of (size, cost) can be in a solution of the
relaxed problem, so the greedy walk from the cheapest rungs upwards, always taking the step that saves most loss a bit,
is its exact solution; what the last step leaves over is filled with the best steps that still fit.

Source: the idea of measured mixed precision under an average: SliM-LLM, arXiv:2405.14917, section 3.2. Where we differ:
layers in place of groups of columns, the loss of the whole model in place of a layer's divergence, true bits.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebit_core.calibration.sampling import evenly
from onebit_core.config import StrictConfig
from onebit_core.errors import ArtifactError, BadWeight, CalibrationError, ConfigError, CorruptArtifact, first_line
from onebit_core.methods import METHODS, Method, method_named
from onebit_core.methods.base import Rung
from onebit_core.model.blocks import groups_of, linear_names, linear_of
from onebit_core.model.loading import OriginalModel
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.rotation import quantize_weight
from onebit_core.pipeline.sensitivity import BlockSensitivity, measure_sensitivity
from onebit_core.progress import Watch

ALLOCATION_FILE = "allocation.json"
MOST_SAMPLES = 8
MOST_TOKENS = 512
"""Of the calibration windows, what sensitivity is measured on: costs are compared with each other, not reported."""


class Point(NamedTuple):
    """What one layer would store, in bits, and cost, on one rung of the ladder."""

    size: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The settings of every linear.

    Attributes:
        bits: the average asked for.
        settings: module path to the method's complete settings.
        expected_loss: sum of the costs that were measured, nats a token.
        uniform_loss: the same for the best single rung that keeps the average.
    """

    bits: float
    settings: dict[str, dict[str, Any]]
    expected_loss: float
    uniform_loss: float

    def record(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the manifest says: of every linear the settings in which it differs from the base."""
        layers = {
            path: {key: value for key, value in settings.items() if base.get(key) != value}
            for path, settings in self.settings.items()
        }
        return {
            "bits": self.bits,
            "expected_loss": round(self.expected_loss, 6),
            "uniform_loss": round(self.uniform_loss, 6),
            "layers": layers,
        }


def ladder_of(config: QuantizeConfig, shapes: Collection[tuple[int, int]]) -> tuple[Rung, ...]:
    """Return the rungs that every layer can have.

    Args:
        config: names the method and the settings that stay as they are.
        shapes: (out_features, in_features) of the linears.

    Raises:
        ConfigError: the method has nothing to spread, or its settings do not fit the shapes.
    """
    method = method_named(config.method)
    ladder = method.ladder(config.method_settings())
    if not ladder:
        able = [name for name, other in METHODS.items() if other.ladder(other.config())]
        raise ConfigError(
            f"bits {config.bits}: {config.method} has no setting that spreads bits over layers; "
            f"methods that have: {', '.join(able)}"
        )
    fitting, why = [], None
    for rung in ladder:
        try:
            for shape in set(shapes):
                method.check(rung.settings, *shape)
        except ConfigError as error:
            why = error
        else:
            fitting.append(rung)
    if not fitting:
        raise ConfigError(f"{config.method}: {why}")
    return tuple(fitting)


def check_bits(config: QuantizeConfig, shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse an average outside of what the ladder can give, before anything is measured.

    Raises:
        ConfigError: with the nearest average that can be had.
    """
    assert config.bits is not None
    method = method_named(config.method)
    averages = [average_bits(method, rung.settings, shapes) for rung in ladder_of(config, shapes)]
    lowest, highest = min(averages), max(averages)
    if not lowest <= config.bits <= highest:
        lowest, highest = math.ceil(lowest * 1000) / 1000, math.floor(highest * 1000) / 1000  # both can be had
        nearest = lowest if config.bits < lowest else highest
        raise ConfigError(
            f"bits {config.bits}: {config.method} can spread {lowest:.3f} to {highest:.3f} true bits a weight over the "
            f"layers of this model; the nearest is {nearest:.3f}"
        )


def average_bits(method: Method, settings: StrictConfig, shapes: Sequence[tuple[int, int]]) -> float:
    """Return the true bits a weight of linears of (out_features, in_features) that all have the same settings."""
    bits = {shape: method.true_bits(settings, *shape) for shape in set(shapes)}
    sizes = [rows * columns for rows, columns in shapes]
    return sum(bits[shape] * size for shape, size in zip(shapes, sizes, strict=True)) / sum(sizes)


def allocate(rungs: Mapping[str, Sequence[Point]], budget: float) -> dict[str, int]:
    """Choose a rung for every layer.

    Args:
        rungs: layer to its rungs, in any order.
        budget: the most that the sizes may add up to; at least the sum of the smallest.

    Returns:
        Layer to the place of its rung in its list.
    """
    hulls = {name: _lower_hull(choices) for name, choices in rungs.items()}
    chosen = dict.fromkeys(hulls, 0)
    size = sum(rungs[name][hull[0]].size for name, hull in hulls.items())
    steps = []
    for name, hull in hulls.items():
        for place in range(1, len(hull)):
            before, after = rungs[name][hull[place - 1]], rungs[name][hull[place]]
            gain = (before.cost - after.cost) / (after.size - before.size)
            steps.append((-gain, name, place, after.size - before.size))
    for _, name, place, more in sorted(steps):
        if chosen[name] == place - 1 and size + more <= budget:
            chosen[name] = place
            size += more
    return {name: hulls[name][place] for name, place in chosen.items()}


def _lower_hull(rungs: Sequence[Point]) -> list[int]:
    """Return the places of the rungs on the lower convex hull of (size, cost), by ascending size."""
    hull: list[int] = []
    for place in sorted(range(len(rungs)), key=lambda place: rungs[place]):
        rung = rungs[place]
        if hull and (rung.size == rungs[hull[-1]].size or rung.cost >= rungs[hull[-1]].cost):
            continue
        while len(hull) > 1 and _slope(rungs[hull[-1]], rung) <= _slope(rungs[hull[-2]], rungs[hull[-1]]):
            hull.pop()
        hull.append(place)
    return hull


def _slope(low: Point, high: Point) -> float:
    return (high.cost - low.cost) / (high.size - low.size)


def choose_settings(
    original: OriginalModel,
    config: QuantizeConfig,
    ids_ST: Tensor,
    device: str,
    watch: Watch,
    folder: Path | None,
) -> Allocation:
    """Measure every layer on every rung and spread the bits; a run that continues takes what was chosen before.

    Args:
        original: with its outer weights loaded.
        config: its `bits` is the average.
        ids_ST: tokens to measure on, int64.
        device: where blocks are run.
        watch: told after every block, in stage `spread`.
        folder: where the choice is kept for a run that continues, or None.
    """
    kept = None if folder is None else folder / ALLOCATION_FILE
    if kept is not None and kept.is_file():
        return _read(kept)
    allocation = _choose(original, config, ids_ST, device, watch)
    if kept is not None:
        _write(kept, allocation)
    return allocation


def _choose(original: OriginalModel, config: QuantizeConfig, ids_ST: Tensor, device: str, watch: Watch) -> Allocation:
    """Measure and choose."""
    assert config.bits is not None
    named = ((block, name) for block in original.blocks for name in linear_names(block, original.layout))
    linears = [linear_of(block, name) for block, name in named]
    ladder = ladder_of(config, {(linear.out_features, linear.in_features) for linear in linears})
    points: dict[str, list[Point]] = {}
    total = len(original.blocks)
    watch.report("spread", 0, total)
    measured = measure_sensitivity(
        original,
        lambda block: groups_of(block, original.layout),
        _few(ids_ST),
        device,
        config.calibration.first_token_weight,
        watch.cancel.raise_if_cancelled,
    )
    for done, found in enumerate(measured, start=1):
        for name in linear_names(found.block, original.layout):
            path = f"{original.layout.blocks}.{found.index}.{name}"
            points[path] = [_measure(found, name, config, rung) for rung in ladder]
        found.statistics.clear()  # the next block's are made before this one is let go
        watch.report("spread", done, total, block=found.index)
    # Half a bit more than asked for, in all, so that an average that a rung gives exactly is not lost to rounding.
    budget = config.bits * sum(linear.weight.numel() for linear in linears) + 0.5
    chosen = allocate(points, budget)
    uniform = [sum(choices[place].cost for choices in points.values()) for place in range(len(ladder))]
    sizes = [sum(choices[place].size for choices in points.values()) for place in range(len(ladder))]
    return Allocation(
        bits=config.bits,
        settings={path: ladder[place].settings.to_dict() for path, place in sorted(chosen.items())},
        expected_loss=sum(points[path][place].cost for path, place in chosen.items()),
        uniform_loss=min(cost for cost, size in zip(uniform, sizes, strict=True) if size <= budget),
    )


def _read(file: Path) -> Allocation:
    """Read a choice that an earlier run made.

    Raises:
        CorruptArtifact: the file is damaged.
    """
    try:
        return Allocation(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptArtifact(f"{file}: damaged ({first_line(error)}); remove it to measure again") from error


def _write(file: Path, allocation: Allocation) -> None:
    """Keep a choice for a run that continues.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    temporary = file.with_suffix(".writing")
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(allocation)), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be written ({error.strerror})") from error


def _few(ids_ST: Tensor) -> Tensor:
    """Return the first tokens of a few samples, evenly over all."""
    return ids_ST[evenly(len(ids_ST), MOST_SAMPLES), :MOST_TOKENS]


def _measure(found: BlockSensitivity, name: str, config: QuantizeConfig, rung: Rung) -> Point:
    """Quantize one linear on trial.

    Raises:
        BadWeight: its weight is not finite.
        CalibrationError: what was measured of it is not.
    """
    method = method_named(config.method)
    weight_OI = linear_of(found.block, name).weight.detach().float()
    statistics = found.statistics[name]
    if not torch.isfinite(weight_OI).all():
        raise BadWeight(f"block {found.index}, {name}: the weight holds NaN or infinite values")
    if not (torch.isfinite(statistics.hessian_II).all() and torch.isfinite(found.importance[name]).all()):
        raise CalibrationError(
            f"block {found.index}, {name}: inputs or gradients are not finite on the calibration text"
        )
    layer = quantize_weight(method, weight_OI, statistics, rung.trial, config.rotation)
    size = method.true_bits(rung.settings, *weight_OI.shape) * weight_OI.numel()
    return Point(size=size, cost=found.cost(name, weight_OI - layer.dequantize().to(weight_OI.device)))

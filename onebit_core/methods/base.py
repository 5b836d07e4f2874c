"""Method: how a weight is found. A method is mathematics only: tensors in, a packed layer out."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, QuantizedLinear, build_layer


class Rung(NamedTuple):
    """One step of a method's ladder, for layers to be given more or fewer bits.

    Attributes:
        settings: what a layer on this rung is quantized with.
        trial: cheaper settings of the same bits that show well enough what it would cost.
    """

    settings: Any
    trial: Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table in onebit_core.methods.

    Attributes:
        summary: one sentence for people who choose.
        config: the class of its settings.
        quantize: (weight_OI float32, statistics or None, settings) to the packed layer, without bias.
        needs_statistics: whether these settings need calibration.
        nominal_bits: what the method's paper advertises for these settings.
        check: raises ConfigError if the settings cannot be meant for a weight of (out_features, in_features).
        spec: what is stored for a weight of (out_features, in_features), known before any work; of a number that the
            method finds itself, a usual one.
        ladder: from given settings those that differ in bits alone, for bits to be spread over layers; empty if the
            method has nothing to spread.
    """

    summary: str
    config: type[StrictConfig]
    quantize: Callable[[Tensor, InputStatistics | None, Any], QuantizedLinear]
    needs_statistics: Callable[[Any], bool]
    nominal_bits: Callable[[Any], float]
    check: Callable[[Any, int, int], None]
    spec: Callable[[Any, int, int], LayerSpec]
    ladder: Callable[[Any], tuple[Rung, ...]] = lambda _config: ()

    def true_bits(self, config: Any, rows: int, columns: int) -> float:
        """Return the bits a weight that will be stored for a matrix of that shape, scales and indices included."""
        with torch.device("meta"):
            return build_layer(self.spec(config, rows, columns)).bits_per_weight()


def grouped_int_spec(bits: int, group_size: int, rows: int, columns: int) -> LayerSpec:
    """Return what integer codes in groups store; a group size of 0 is one group a row."""
    groups = columns // (group_size or columns)
    return LayerSpec(format="grouped_int", in_features=columns, out_features=rows, planes=bits, groups=groups)


def ladder_over(setting: str, values: tuple[Any, ...]) -> Callable[[Any], tuple[Rung, ...]]:
    """Return the ladder of a method whose bits are one setting."""

    def ladder(config: Any) -> tuple[Rung, ...]:
        steps = [dataclasses.replace(config, **{setting: value}) for value in values]
        return tuple(Rung(step, step) for step in steps)

    return ladder


def check_group_size(group_size: int, in_features: int) -> None:
    """Refuse a group that does not divide a row.

    Raises:
        ConfigError: with the nearest group sizes that do.
    """
    if group_size < 0 or group_size == 1:
        raise ConfigError(f"group_size {group_size}: use 0 for one group per row, or at least 2 columns")
    if group_size and in_features % group_size:
        valid = [size for size in range(2, in_features + 1) if in_features % size == 0]
        nearest = sorted(sorted(valid, key=lambda size: abs(size - group_size))[:2])
        raise ConfigError(
            f"group_size {group_size} does not divide {in_features} input features; "
            f"nearest that do: {', '.join(map(str, nearest))}, or 0 for one group per row"
        )


def even_group_size(group_size: int, in_features: int) -> int:
    """Return the largest size of equal groups of a row that is at most `group_size`; 0 means the whole row.

    Raises:
        ConfigError: no size above half of the wanted one divides the row.
    """
    if group_size < 0 or group_size == 1:
        raise ConfigError(f"group_size {group_size}: use 0 for one group per row, or at least 2 columns")
    wanted = min(group_size or in_features, in_features)
    for size in range(wanted, wanted // 2, -1):
        if in_features % size == 0:
            return size
    raise ConfigError(
        f"group_size {group_size}: {in_features} input features cannot be cut in equal groups of {wanted // 2 + 1} to "
        f"{wanted} columns; use 0 for one group per row"
    )


def check_bits(bits: int) -> None:
    """Refuse a width we cannot store.

    Raises:
        ConfigError: bits outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits {bits}: a code has 1 to 8 bits")

"""Method: how a weight is found. A method is mathematics only: tensors in, a packed layer out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import QuantizedLinear


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
    """

    summary: str
    config: type[StrictConfig]
    quantize: Callable[[Tensor, InputStatistics | None, Any], QuantizedLinear]
    needs_statistics: Callable[[Any], bool]
    nominal_bits: Callable[[Any], float]
    check: Callable[[Any, int, int], None]


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

"""Round to nearest: the floor every other method must beat.

Each group of columns of each row gets a min-max grid (onebit_core.layers.grid) and each weight its nearest point. No
calibration. With `search` the range of each group shrinks to its least squared error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.layers import GroupedIntLinear
from onebit_core.layers.grid import best_grid, min_max_grid
from onebit_core.methods.base import Method, check_bits, check_group_size, grouped_int_spec, ladder_over


@dataclass(frozen=True, kw_only=True)
class RtnConfig(StrictConfig):
    """Settings of rtn.

    Attributes:
        bits: per weight, 1 to 8.
        group_size: columns that share a scale; 0 for one group per row.
        search: shrink each range to its least squared error.
    """

    bits: int = 4
    group_size: int = 64
    search: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)


def quantize_rtn(weight_OI: Tensor, statistics: InputStatistics | None, config: RtnConfig) -> GroupedIntLinear:
    """Round a weight to its grid; float32 [O, I]. Statistics are not used."""
    del statistics
    rows, columns = weight_OI.shape
    group_size = config.group_size or columns
    groups_RK = weight_OI.reshape(-1, group_size)
    grid = best_grid(groups_RK, config.bits, None) if config.search else min_max_grid(groups_RK, config.bits)
    return GroupedIntLinear.from_codes(
        grid.quantize(groups_RK).view(rows, columns).to(torch.int32),
        grid.scale_O.view(rows, -1),
        grid.zero_O.view(rows, -1).to(torch.int32),
        config.bits,
    )


RTN = Method(
    summary="round to nearest on a min-max grid per group; no calibration",
    config=RtnConfig,
    quantize=quantize_rtn,
    needs_statistics=lambda _config: False,
    nominal_bits=lambda config: float(config.bits),
    check=lambda config, _rows, columns: check_group_size(config.group_size, columns),
    spec=lambda config, rows, columns: grouped_int_spec(config.bits, config.group_size, rows, columns),
    ladder=ladder_over("bits", (2, 3, 4, 5, 6, 8)),
)

"""GPTQ: integer rounding with second-order error feedback.

The columns of W are rounded one after the other; the error of each is moved into the columns not yet rounded, weighted
by the inverse Hessian of the layer's inputs (onebit_core.methods.second_order).

Source: arXiv:2210.17323, section 3. A group's grid is made from its columns as they are when the sweep reaches them.
Where we differ: with `act_order` (columns of large inputs first) groups stay those of the original order and their
grids are made beforehand, so no index is stored; ranges are searched; the calibration weights the first token up,
without which GPTQ loses to rounding on small models (onebit_core.calibration.statistics).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import GroupedIntLinear
from onebit_core.layers.grid import Grid, best_grid, min_max_grid
from onebit_core.methods.base import Method, check_bits, check_group_size, grouped_int_spec, ladder_over
from onebit_core.methods.second_order import SWEEP_BLOCK, inverse_factor, sweep


@dataclass(frozen=True, kw_only=True)
class GptqConfig(StrictConfig):
    """Settings of gptq.

    Attributes:
        bits: per weight, 1 to 8.
        group_size: columns that share a scale; 0 for one group per row.
        act_order: round columns with large inputs first.
        search: shrink each range to its least squared error, weighted by the inputs.
        damping: added to the Hessian's diagonal, relative to its mean.
    """

    bits: int = 4
    group_size: int = 64
    act_order: bool = True
    search: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")


class _GroupedColumns:
    """Rounds single columns, keeping the grid of each group and all codes."""

    def __init__(self, weight_OI: Tensor, column_weight_I: Tensor, config: GptqConfig) -> None:
        self.rows, self.columns = weight_OI.shape
        self.config = config
        self.group_size = config.group_size or self.columns
        self.column_weight_I = column_weight_I
        self.grids: dict[int, Grid] = {}
        self.codes_IO = torch.empty(self.columns, self.rows, dtype=torch.int32, device=weight_OI.device)

    def fit(self, group: int, weight_OK: Tensor) -> None:
        """Make the grid of a group from its columns."""
        span = slice(group * self.group_size, (group + 1) * self.group_size)
        bits = self.config.bits
        searched = self.config.search
        self.grids[group] = (
            best_grid(weight_OK, bits, self.column_weight_I[span]) if searched else min_max_grid(weight_OK, bits)
        )

    def round(self, column: int, values_O: Tensor) -> Tensor:
        """Round one column (in original numbering) on its group's grid."""
        grid = self.grids[column // self.group_size]
        codes_O = (torch.round(values_O / grid.scale_O) + grid.zero_O).clamp_(0, 2**grid.bits - 1)
        self.codes_IO[column] = codes_O.to(torch.int32)
        return (codes_O - grid.zero_O) * grid.scale_O

    def layer(self) -> GroupedIntLinear:
        """Pack everything rounded."""
        grids = [self.grids[group] for group in range(self.columns // self.group_size)]
        scale_OG = torch.stack([grid.scale_O for grid in grids], dim=1)
        zero_OG = torch.stack([grid.zero_O for grid in grids], dim=1).to(torch.int32)
        return GroupedIntLinear.from_codes(self.codes_IO.T, scale_OG, zero_OG, self.config.bits)


def quantize_gptq(weight_OI: Tensor, statistics: InputStatistics | None, config: GptqConfig) -> GroupedIntLinear:
    """Round a weight with error feedback; float32 [O, I]."""
    assert statistics is not None
    hessian_II = statistics.hessian_II
    state = _GroupedColumns(weight_OI, hessian_II.diagonal(), config)
    size = state.group_size
    block = size if size >= SWEEP_BLOCK else SWEEP_BLOCK // size * size  # a block holds whole groups

    if config.act_order:
        order_I = hessian_II.diagonal().argsort(descending=True)
        for group in range(weight_OI.shape[1] // size):
            state.fit(group, weight_OI[:, group * size : (group + 1) * size])
        columns = order_I.tolist()
        factor_II = inverse_factor(hessian_II[order_I][:, order_I], config.damping)
        sweep(weight_OI[:, order_I], factor_II, lambda column, values_O, _: state.round(columns[column], values_O))
        return state.layer()

    def quantize_column(column: int, values_O: Tensor, work_IO: Tensor) -> Tensor:
        if column % size == 0:
            state.fit(column // size, work_IO[column : column + size].T)
        return state.round(column, values_O)

    sweep(weight_OI, inverse_factor(hessian_II, config.damping), quantize_column, block)
    return state.layer()


GPTQ = Method(
    summary="integer rounding with second-order error feedback (arXiv:2210.17323)",
    config=GptqConfig,
    quantize=quantize_gptq,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: float(config.bits),
    check=lambda config, _rows, columns: check_group_size(config.group_size, columns),
    spec=lambda config, rows, columns: grouped_int_spec(config.bits, config.group_size, rows, columns),
    ladder=ladder_over("bits", (2, 3, 4, 5, 6, 8)),
)

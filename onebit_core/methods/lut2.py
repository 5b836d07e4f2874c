"""Four free levels per row and group of columns, with second-order error feedback.

    minimize   sum_j  d_j (w_j - l[q_j])^2      over levels l[0..3] and indices q_j        (per row and group)

by Lloyd's alternation: every weight takes its nearest level, every level becomes the weighted mean of its weights. It
starts once from the four levels that are best for a Gaussian (Max 1960, table I: 0.4528 and 1.510 standard deviations)
and once from the middles of the quartiles; the better end counts.
d_j is the curvature of the output error along column j, 1 / U_jj^2, so a level goes where the inputs are large.

Sources: Lloyd, IEEE Trans. Inf. Theory 28 (1982) 129; the column sweep is GPTQ's (arXiv:2210.17323, section 3). This is
the storage that binary methods with group bitmaps need (BiLLM, arXiv:2402.04291: a sign and a group bit per weight),
with the table filled optimally.

Shape suffixes: O = output features, I = input features, K = columns of one group, G = groups; 4 = levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, LutLinear
from onebit_core.layers.grid import round_to_float16
from onebit_core.methods.base import Method, even_group_size, ladder_over
from onebit_core.methods.binary_groups import nearest, nearest_level
from onebit_core.methods.second_order import SWEEP_BLOCK, inverse_factor, sweep

QUARTILE_MIDDLES = (0.125, 0.375, 0.625, 0.875)
GAUSSIAN_LEVELS = (-1.510, -0.4528, 0.4528, 1.510)


@dataclass(frozen=True, kw_only=True)
class Lut2Config(StrictConfig):
    """Settings of lut2.

    Attributes:
        group_size: at most so many columns share four levels; a row is cut into equal groups. 0 for one per row.
        act_order: decide columns with large inputs first.
        iterations: of Lloyd's alternation.
        damping: added to the Hessian's diagonal, relative to its mean.
    """

    group_size: int = 128
    act_order: bool = False
    iterations: int = 12
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")


def fit_levels(weight_OK: Tensor, column_weight_K: Tensor, iterations: int) -> Tensor:
    """Return the four levels of each row, ascending, float32 [O, 4] holding float16 values.

    Args:
        weight_OK: float32.
        column_weight_K: float32, >= 0: how much an error in each column counts.
        iterations: alternations; the error never rises, and 12 are enough.
    """
    weight_K = column_weight_K / column_weight_K.sum().clamp(min=1e-30)
    mean_O = weight_OK @ weight_K
    spread_O = ((weight_OK - mean_O[:, None]).square() @ weight_K).sqrt()
    gaussian_O4 = mean_O[:, None] + spread_O[:, None] * weight_OK.new_tensor(GAUSSIAN_LEVELS)
    quartile_O4 = torch.quantile(weight_OK, weight_OK.new_tensor(QUARTILE_MIDDLES), dim=1).T
    candidates = [_alternate(weight_OK, weight_K, start, iterations) for start in (gaussian_O4, quartile_O4)]
    errors = [(weight_OK - nearest(weight_OK, levels_O4)).square() @ weight_K for levels_O4 in candidates]
    return torch.where((errors[0] <= errors[1])[:, None], candidates[0], candidates[1])


def _alternate(weight_OK: Tensor, weight_K: Tensor, levels_O4: Tensor, iterations: int) -> Tensor:
    """Return the levels after some turns of Lloyd's alternation, rounded to float16; a level nobody takes stays."""
    for _ in range(iterations):
        index_OK = nearest_level(weight_OK, levels_O4)
        chosen = [(index_OK == level).to(weight_OK.dtype) for level in range(4)]  # sums in one order on every device
        mass_O4 = torch.stack([chosen_OK @ weight_K for chosen_OK in chosen], 1)
        total_O4 = torch.stack([(chosen_OK * weight_OK) @ weight_K for chosen_OK in chosen], 1)
        levels_O4 = torch.where(mass_O4 > 0, total_O4 / mass_O4.clamp(min=1e-30), levels_O4).sort(1).values
    return round_to_float16(levels_O4)


class _LevelColumns:
    """Decides single columns by nearest level, keeping the levels of each group and all indices."""

    def __init__(self, weight_OI: Tensor, curvature_I: Tensor, config: Lut2Config) -> None:
        rows, columns = weight_OI.shape
        self.size = even_group_size(config.group_size, columns)
        self.iterations = config.iterations
        self.curvature_I = curvature_I
        self.levels_GO4 = weight_OI.new_zeros(columns // self.size, rows, 4)
        self.index_IO = torch.zeros(columns, rows, dtype=torch.int32, device=weight_OI.device)

    def fit(self, group: int, weight_OK: Tensor) -> None:
        """Fit the levels of a group to its columns as they are now."""
        span = slice(group * self.size, (group + 1) * self.size)
        self.levels_GO4[group] = fit_levels(weight_OK, self.curvature_I[span], self.iterations)

    def decide(self, column: int, values_O: Tensor) -> Tensor:
        """Return the values decided for a column (in original numbering), float32 [O]."""
        levels_O4 = self.levels_GO4[column // self.size]
        index_O = nearest_level(values_O, levels_O4)
        self.index_IO[column] = index_O.to(torch.int32)
        return levels_O4.gather(1, index_O[:, None])[:, 0]

    def layer(self) -> LutLinear:
        """Pack everything decided."""
        return LutLinear.from_levels(self.index_IO.T, self.levels_GO4.transpose(0, 1))


def quantize_lut2(weight_OI: Tensor, statistics: InputStatistics | None, config: Lut2Config) -> LutLinear:
    """Quantize a weight; float32 [O, I]."""
    assert statistics is not None
    hessian_II, columns = statistics.hessian_II, weight_OI.shape[1]
    factor_II = inverse_factor(hessian_II, config.damping)
    state = _LevelColumns(weight_OI, factor_II.diagonal().square().reciprocal(), config)
    size = state.size
    if config.act_order:
        for group in range(columns // size):
            state.fit(group, weight_OI[:, group * size : (group + 1) * size])
        order_I = hessian_II.diagonal().argsort(descending=True)
        numbers = order_I.tolist()
        factor_II = inverse_factor(hessian_II[order_I][:, order_I], config.damping)
        sweep(weight_OI[:, order_I], factor_II, lambda column, values_O, _: state.decide(numbers[column], values_O))
        return state.layer()

    def decide_column(column: int, values_O: Tensor, work_IO: Tensor) -> Tensor:
        if column % size == 0:
            state.fit(column // size, work_IO[column : column + size].T)
        return state.decide(column, values_O)

    block = size if size >= SWEEP_BLOCK else SWEEP_BLOCK // size * size  # a block holds whole groups
    sweep(weight_OI, factor_II, decide_column, block)
    return state.layer()


def _check(config: Lut2Config, rows: int, columns: int) -> None:
    """Refuse a row that cannot be cut into groups."""
    del rows
    even_group_size(config.group_size, columns)


def _spec(config: Lut2Config, rows: int, columns: int) -> LayerSpec:
    """Return what is stored."""
    groups = columns // even_group_size(config.group_size, columns)
    return LayerSpec(format="lut", in_features=columns, out_features=rows, planes=2, groups=groups)


LUT2 = Method(
    summary="four free levels per group, two-bit indices, with error feedback (Lloyd-Max; the storage of BiLLM)",
    config=Lut2Config,
    quantize=quantize_lut2,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda _config: 2.0,
    check=_check,
    spec=_spec,
    ladder=ladder_over("group_size", (0, 192, 96, 64, 32)),
)

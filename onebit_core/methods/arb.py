"""ARB-LLM_RC: row and column scales refined in turn, with salient columns and two magnitude groups in each block.

In a block of columns, in the columns that are not salient and in those that are:

    w_ij ~= s_ij * c_j * (b_i or r_i)                       a sign, and one of two row scales, b_i <= r_i
    w_ij ~= s_ij * r_i * c_j + t_ij * b_i * d_j             two signs: the second order

Each is fitted by turns of closed forms, every one the least squares solution for the others as they are, so the error
never rises:

    signs, groups   each weight takes the nearest value that it can have
    row scales      r_i = sum_j y_ij c_j / sum_j c_j^2       y: the weight, times its sign, less what other terms give
    column scales   c_j = sum_i y_ij r_i / sum_i r_i^2

Source: arXiv:2410.03129, section 3 (alternating refinement; RC, row and column scales; CGB, column and group bitmap).
It runs inside of BiLLM's blocks (onebit_core.methods.binary_groups). Where we differ: both groups share their column
scales, because what is stored are two sign planes a weight, S (b + r) / 2 and S M (r - b) / 2 with M = +-1 for the
group, which hold one column scale; groups are refined with the signs, not fixed at the start; salient columns are of
the second order and not grouped as well, which would be a third bit there; their number is one a layer, chosen as for
billm.

The true cost is two bits a weight, 4 numbers of 16 bits per row and block and 2 per column: 2.5 bits with blocks of
128.

Shape suffixes: O = output features, I = input features, K = columns of a block, S = salient columns, R = the others,
G = blocks, 2 = small and large, or first and second.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, SignLinear, SplitLinear
from onebit_core.layers.grid import round_to_float16
from onebit_core.methods.base import Method, even_group_size
from onebit_core.methods.binary_groups import (
    Feedback,
    blocks_of,
    check_blocks,
    choose_count,
    paper_bits,
    salient_columns,
    sweep_blocks,
)
from onebit_core.methods.second_order import inverse_factor

GROUP_STARTS = (0.4528, 1.510)
"""Levels of the best four-level quantizer of a Gaussian, in standard deviations (Max 1960, table I)."""

TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class ArbConfig(StrictConfig):
    """Settings of arb.

    Attributes:
        group_size: at most so many columns make a block; a row is cut into equal blocks. 0 for one block a row.
        salient: salient columns of a block; 0 chooses the number of least error for each layer.
        iterations: turns of the refinement.
        feedback: move errors into later blocks only (block, as published), or into all later columns (column).
        damping: added to the Hessian's diagonal, relative to its mean.
    """

    group_size: int = 128
    salient: int = 0
    iterations: int = 15
    feedback: Feedback = "block"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.salient < 0:
            raise ConfigError(f"salient {self.salient}: a number of columns, or 0 to choose it for each layer")
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")


class Scales(NamedTuple):
    """Row and column scales of one part of a block; >= 0.

    Attributes:
        row_2O: small and large of the groups, or those of the first and the second sign.
        column_2K: of the first and the second sign; the groups have one, twice.
    """

    row_2O: Tensor
    column_2K: Tensor


def fit_groups(weight_OK: Tensor, cost_K: Tensor, iterations: int) -> Scales:
    """Fit c_j * (b_i or r_i) to magnitudes.

    Args:
        weight_OK: float32.
        cost_K: how much an error in each column counts, for the row scales.
        iterations: turns.
    """
    magnitude_OK = weight_OK.abs()
    column_K = torch.ones_like(weight_OK[0])
    spread_O = weight_OK.square().mean(1).sqrt()
    row_2O = torch.stack([start * spread_O for start in GROUP_STARTS])
    for _ in range(iterations):
        large_OK = _is_large(magnitude_OK, row_2O, column_K)
        groups = ((~large_OK).float(), large_OK.float())
        weighted_K = cost_K * column_K
        row_2O = torch.stack(
            [
                _where_any((magnitude_OK * group_OK) @ weighted_K, group_OK @ (weighted_K * column_K), row_2O[place])
                for place, group_OK in enumerate(groups)
            ]
        )
        row_OK = torch.where(large_OK, row_2O[1, :, None], row_2O[0, :, None])
        column_K = _where_any((magnitude_OK * row_OK).sum(0), row_OK.square().sum(0), column_K)
    row_2O = row_2O.sort(0).values
    return _rounded(row_2O, column_K.expand(2, -1))


def fit_second_order(weight_OK: Tensor, cost_K: Tensor, iterations: int) -> Scales:
    """Fit s_ij r_i c_j + t_ij b_i d_j; arguments as of `fit_groups`."""
    column_2K = torch.ones(2, weight_OK.shape[1], device=weight_OK.device)
    first_O = weight_OK.abs().mean(1)
    row_2O = torch.stack((first_O, (weight_OK.abs() - first_O[:, None]).abs().mean(1)))
    for _ in range(iterations):
        for term in range(2):
            signs_2OK = nearest_signs(weight_OK, row_2O, column_2K)
            other = 1 - term
            model_OK = signs_2OK[other] * torch.outer(row_2O[other], column_2K[other])
            wanted_OK = (weight_OK - model_OK) * signs_2OK[term]
            weighted_K = cost_K * column_2K[term]
            row_O = _where_any(wanted_OK @ weighted_K, (weighted_K * column_2K[term]).sum(), row_2O[term])
            column_K = _where_any(row_O @ wanted_OK, row_O.square().sum(), column_2K[term])
            row_2O, column_2K = row_2O.clone(), column_2K.clone()
            row_2O[term], column_2K[term] = row_O, column_K
    return _rounded(row_2O, column_2K)


def nearest_signs(weight_OK: Tensor, row_2O: Tensor, column_2K: Tensor) -> Tensor:
    """Return the two signs of the value s r c + t b d that is nearest to each weight, [2, O, K]."""
    first_OK, second_OK = (row_O[:, None] * column_K for row_O, column_K in zip(row_2O, column_2K, strict=True))
    large_OK = torch.maximum(first_OK, second_OK)
    outer_OK = torch.where(weight_OK < 0, -1.0, 1.0)
    inner_OK = torch.where(weight_OK - outer_OK * large_OK < 0, -1.0, 1.0)
    is_first_OK = first_OK >= second_OK
    return torch.stack((torch.where(is_first_OK, outer_OK, inner_OK), torch.where(is_first_OK, inner_OK, outer_OK)))


def _is_large(magnitude_OK: Tensor, row_2O: Tensor, column_K: Tensor) -> Tensor:
    """Return which magnitudes are nearer to the larger of their two values."""
    return magnitude_OK > row_2O.mean(0)[:, None] * column_K


def _where_any(total: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """Return total / weight, >= 0, and what was before where nothing has weight."""
    return torch.where(weight > TINY, total / weight.clamp(min=TINY), before).clamp(min=0)


def _rounded(row_2O: Tensor, column_2K: Tensor) -> Scales:
    """Return float16 values with columns of mean one, or zeros where a part is empty."""
    mean_21 = column_2K.mean(1, keepdim=True)
    safe_21 = torch.where(mean_21 > TINY, mean_21, 1.0)
    return Scales(round_to_float16(row_2O * safe_21), round_to_float16(column_2K / safe_21))


class _Refined:
    """Decides columns by their nearest value, keeping signs, scales and which columns are salient."""

    def __init__(self, weight_OI: Tensor, curvature_I: Tensor, size: int, count: int, iterations: int) -> None:
        rows, columns = weight_OI.shape
        self.size, self.count, self.iterations, self.curvature_I = size, count, iterations, curvature_I
        self.salient_I = torch.zeros(columns, dtype=torch.bool, device=weight_OI.device)
        self.is_salient: list[bool] = []
        self.signs_I2O = weight_OI.new_empty(columns, 2, rows)
        self.column_2I = weight_OI.new_ones(2, columns)
        self.salient_GO2, self.rest_GO2 = (weight_OI.new_zeros(columns // size, rows, 2) for _ in range(2))

    def fit(self, start: int, weight_OK: Tensor) -> None:
        """Choose a block's salient columns and fit both parts."""
        group, span = start // self.size, slice(start, start + self.size)
        cost_K = self.curvature_I[span] / self.curvature_I[span].mean()
        salient_K = salient_columns(weight_OK, cost_K, self.count)
        self.salient_I[span], self.is_salient = salient_K, salient_K.tolist()
        second = fit_second_order(weight_OK[:, salient_K], cost_K[salient_K], self.iterations)
        groups = fit_groups(weight_OK[:, ~salient_K], cost_K[~salient_K], self.iterations)
        self.salient_GO2[group] = second.row_2O.T
        small_O, large_O = groups.row_2O
        self.rest_GO2[group] = round_to_float16(torch.stack(((large_O + small_O) / 2, (large_O - small_O) / 2), 1))
        self.column_2I[:, span][:, salient_K] = second.column_2K
        self.column_2I[:, span][:, ~salient_K] = groups.column_2K

    def decide(self, column: int, values_O: Tensor) -> Tensor:
        """Return the values decided for a column, float32 [O]."""
        group, place = divmod(column, self.size)
        if self.is_salient[place]:
            row_O2 = self.salient_GO2[group]
            signs_2O = nearest_signs(values_O[:, None], row_O2.T, self.column_2I[:, column : column + 1])[..., 0]
        else:
            row_O2 = self.rest_GO2[group]
            sign_O = torch.where(values_O < 0, -1.0, 1.0)
            is_large_O = values_O.abs() > row_O2[:, 0] * self.column_2I[0, column]
            signs_2O = torch.stack((sign_O, torch.where(is_large_O, sign_O, -sign_O)))
        self.signs_I2O[column] = signs_2O
        return (signs_2O * row_O2.T * self.column_2I[:, column, None]).sum(0)

    def layer(self) -> SplitLinear:
        """Pack everything decided."""
        parts = [
            SignLinear.from_parts(
                self.signs_I2O[mask_I].permute(1, 2, 0),
                scale_in_PI=self.column_2I[:, mask_I],
                group_scale_POG=row_GO2.permute(2, 1, 0),
            )
            for mask_I, row_GO2 in ((self.salient_I, self.salient_GO2), (~self.salient_I, self.rest_GO2))
        ]
        return SplitLinear.from_layers(self.salient_I, (parts[0], parts[1]))


def quantize_arb(weight_OI: Tensor, statistics: InputStatistics | None, config: ArbConfig) -> SplitLinear:
    """Binarize a weight; float32 [O, I]."""
    assert statistics is not None
    factor_II = inverse_factor(statistics.hessian_II, config.damping)
    curvature_I = factor_II.diagonal().square().reciprocal()
    size = even_group_size(config.group_size, weight_OI.shape[1])
    count = config.salient or choose_count(weight_OI, curvature_I, size)
    blocks = _Refined(weight_OI, curvature_I, size, count, config.iterations)
    sweep_blocks(weight_OI, factor_II, size, blocks, config.feedback)
    return blocks.layer()


def _spec(config: ArbConfig, rows: int, columns: int) -> LayerSpec:
    """Return what is stored; where the number of salient columns is chosen later, for a typical one."""
    groups, salient = blocks_of(config.group_size, config.salient, columns)
    parts = (
        LayerSpec(format="sign", in_features=width, out_features=rows, planes=2, groups=groups, scale_in=True)
        for width in (salient, columns - salient)
    )
    return LayerSpec(format="split", in_features=columns, out_features=rows, parts=tuple(parts))


ARB = Method(
    summary="row and column scales refined in turn, salient columns and two groups apart (arXiv:2410.03129)",
    config=ArbConfig,
    quantize=quantize_arb,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: paper_bits(config.group_size, config.salient),
    check=lambda config, _rows, columns: check_blocks(config.group_size, config.salient, columns),
    spec=_spec,
)

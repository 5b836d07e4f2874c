"""BiLLM: signs with four values per row and block of columns, salient columns apart, error feedback between blocks.

    1. U from the Hessian; in each block of columns, in order, on the weights as feedback has changed them:
    2. the columns with the largest sum_i w_ij^2 / U_jj^2 are salient; a row stores them as mu +- a1 +- a2;
    3. the others fall into two groups by magnitude, |w| < p and |w| >= p; a row stores m +- a of either group;
    4. what the block leaves over moves into the blocks after it.

Source: arXiv:2402.04291, sections 3.2 (salient columns), 3.3 (bell-shaped split) and 3.4. The mathematics is in
onebit_core.methods.binary_groups. Where we differ: the number of salient columns is one for all blocks of a layer, so
that groups stay equal; it is chosen on the original weights by the error that the output sees, sum d_j (w - q)^2 with
d_j = 1 / U_jj^2 (the published code binarizes the saliency instead of the weight, and so measures another error).
Without d_j, as the paper has it, more columns are chosen and the output error is higher (docs/methods/billm.md). Every
weight takes the nearest of its row's four values. Blocks are of equal width, 96 columns where 128 does not divide.

The true cost is two bits a weight, sign and group or two signs, and 4 + 3 numbers of 16 bits per row and block: 2.9
bits with blocks of 128. The paper's 1.08 counts one bit for all but the salient columns and no scales.

Shape suffixes: O = output features, I = input features, K = columns of a block, S = salient columns, R = the others,
G = blocks; 4 = levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, LutLinear, SignLinear, SplitLinear
from onebit_core.methods.base import Method, even_group_size
from onebit_core.methods.binary_groups import (
    Feedback,
    bell_levels,
    blocks_of,
    check_blocks,
    choose_count,
    nearest_level,
    paper_bits,
    residual_levels,
    residual_scales,
    salient_columns,
    sweep_blocks,
)
from onebit_core.methods.second_order import inverse_factor


@dataclass(frozen=True, kw_only=True)
class BillmConfig(StrictConfig):
    """Settings of billm.

    Attributes:
        group_size: at most so many columns make a block; a row is cut into equal blocks. 0 for one block a row.
        salient: salient columns of a block; 0 chooses the number of least error for each layer.
        thresholds: how many borders between the two magnitude groups are tried.
        feedback: move errors into later blocks only (block, as published), or into all later columns (column).
        damping: added to the Hessian's diagonal, relative to its mean.
    """

    group_size: int = 128
    salient: int = 0
    thresholds: int = 40
    feedback: Feedback = "block"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.salient < 0:
            raise ConfigError(f"salient {self.salient}: a number of columns, or 0 to choose it for each layer")
        if self.thresholds < 1:
            raise ConfigError(f"thresholds {self.thresholds}: at least 1")
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")


class _FourValues:
    """Decides columns by the nearest of four values, keeping indices, scales and which columns are salient."""

    def __init__(self, weight_OI: Tensor, curvature_I: Tensor, size: int, count: int, thresholds: int) -> None:
        rows, columns = weight_OI.shape
        groups, device = columns // size, weight_OI.device
        self.size, self.count, self.thresholds, self.curvature_I = size, count, thresholds, curvature_I
        self.salient_I = torch.zeros(columns, dtype=torch.bool, device=device)
        self.is_salient: list[bool] = []
        self.index_IO = torch.empty(columns, rows, dtype=torch.int32, device=device)
        self.shift_GO, self.scales_2GO = weight_OI.new_zeros(groups, rows), weight_OI.new_zeros(2, groups, rows)
        self.salient_GO4, self.rest_GO4 = (weight_OI.new_zeros(groups, rows, 4) for _ in range(2))

    def fit(self, start: int, weight_OK: Tensor) -> None:
        """Choose a block's salient columns and fit both parts."""
        group, span = start // self.size, slice(start, start + self.size)
        salient_K = salient_columns(weight_OK, self.curvature_I[span], self.count)
        self.salient_I[span] = salient_K
        self.is_salient = salient_K.tolist()
        shift_O, scales_2O = residual_scales(weight_OK[:, salient_K])
        self.shift_GO[group], self.scales_2GO[:, group] = shift_O, scales_2O
        self.salient_GO4[group] = residual_levels(shift_O, scales_2O)
        self.rest_GO4[group] = bell_levels(weight_OK[:, ~salient_K], self.thresholds)

    def decide(self, column: int, values_O: Tensor) -> Tensor:
        """Return the values decided for a column, float32 [O]."""
        group, place = divmod(column, self.size)
        levels_O4 = self.salient_GO4[group] if self.is_salient[place] else self.rest_GO4[group]
        index_O = nearest_level(values_O, levels_O4)
        self.index_IO[column] = index_O.to(torch.int32)
        return levels_O4.gather(1, index_O[:, None])[:, 0]

    def layer(self) -> SplitLinear:
        """Pack everything decided: two signs in salient columns, a two-bit index in the others."""
        salient_OS = self.index_IO[self.salient_I].T
        signs_2OS = torch.stack((salient_OS >> 1, salient_OS & 1)) * 2 - 1
        salient = SignLinear.from_parts(
            signs_2OS, group_scale_POG=self.scales_2GO.transpose(1, 2), shift_OG=self.shift_GO.T
        )
        rest = LutLinear.from_levels(self.index_IO[~self.salient_I].T, self.rest_GO4.transpose(0, 1))
        return SplitLinear.from_layers(self.salient_I, (salient, rest))


def quantize_billm(weight_OI: Tensor, statistics: InputStatistics | None, config: BillmConfig) -> SplitLinear:
    """Binarize a weight; float32 [O, I]."""
    assert statistics is not None
    factor_II = inverse_factor(statistics.hessian_II, config.damping)
    curvature_I = factor_II.diagonal().square().reciprocal()
    size = even_group_size(config.group_size, weight_OI.shape[1])
    count = config.salient or choose_count(weight_OI, curvature_I, size)
    blocks = _FourValues(weight_OI, curvature_I, size, count, config.thresholds)
    sweep_blocks(weight_OI, factor_II, size, blocks, config.feedback)
    return blocks.layer()


def _spec(config: BillmConfig, rows: int, columns: int) -> LayerSpec:
    """Return what is stored; where the number of salient columns is chosen later, for a typical one."""
    groups, salient = blocks_of(config.group_size, config.salient, columns)
    return LayerSpec(
        format="split",
        in_features=columns,
        out_features=rows,
        parts=(
            LayerSpec(
                format="sign", in_features=salient, out_features=rows, planes=2, groups=groups, shift_groups=groups
            ),
            LayerSpec(format="lut", in_features=columns - salient, out_features=rows, planes=2, groups=groups),
        ),
    )


BILLM = Method(
    summary="four values per row and block, salient columns apart, feedback between blocks (arXiv:2402.04291)",
    config=BillmConfig,
    quantize=quantize_billm,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: paper_bits(config.group_size, config.salient),
    check=lambda config, _rows, columns: check_blocks(config.group_size, config.salient, columns),
    spec=_spec,
)

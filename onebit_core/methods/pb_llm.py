"""PB-LLM after training: the most salient weights in 8 bit, all others as signs, with error feedback.

    1. U from the Hessian; a weight's saliency is w^2 / U_jj^2 (or |w|); the top `ratio` of the whole matrix is salient.
    2. A grid of 8 bit per row for the salient ones.
    3. A base for the rest: `svid`: sign * h_i * g_j fitted over the rest only; `row`: sign * h_i with h_i the mean
       magnitude of the row's rest.
    4. The column sweep of second_order decides signs and codes on the weights as feedback has changed them.

Places cost as much as codes, so there are two cheaper ways to choose them. `fixed`: as many salient weights in every
row and block, whose index needs no counts. `column`: whole columns by summed saliency, one bit a column for all rows;
signs are then decided first, and the 8-bit columns take over what these leave (onebit_core.methods.sign_columns).

Source: arXiv:2310.00034, sections 3.2 and 3.3. Where we differ: the row scale is the mean over the binarized weights
(the published code divides by all columns); the svid base is ours and clearly better under Hessian saliency
(docs/methods/pb_llm.md); 8-bit codes round once and keep the sign of negative weights; the true cost is counted: signs
for all weights, codes, scales and the index of the salient ones.

Shape suffixes: O = output features, I = input features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, QuantizedLinear, SalientWeights, SignLinear
from onebit_core.layers.grid import Grid, min_max_grid, round_to_float16
from onebit_core.layers.salient import choose_index
from onebit_core.layers.spec import SALIENT_BLOCK
from onebit_core.methods.base import Method, even_group_size, ladder_over
from onebit_core.methods.rank_one import fit_rank_one
from onebit_core.methods.saliency import Metric, even_mask, salient_columns, salient_mask
from onebit_core.methods.second_order import inverse_factor, sweep
from onebit_core.methods.sign_columns import SplitRule, fine_columns, quantize_split, split_spec

SALIENT_BITS = 8
WORD_BITS = 32


@dataclass(frozen=True, kw_only=True)
class PbLlmConfig(StrictConfig):
    """Settings of pb_llm.

    Attributes:
        ratio: share of salient weights, above 0 and below 1.
        granularity: salient are the top weights of the matrix (element), as many in every row and block of 128 columns
            (fixed), or whole columns, rounded to 32 (column).
        metric: how saliency is measured: hessian or magnitude.
        base: magnitudes of the other weights: svid (row times column) or row.
        feedback: move each column's error into the columns after it.
        damping: added to the Hessian's diagonal, relative to its mean.
        iterations: of the svid base's fit.
    """

    ratio: float = 0.1
    granularity: Literal["element", "fixed", "column"] = "element"
    metric: Metric = "hessian"
    base: Literal["svid", "row"] = "svid"
    feedback: bool = True
    damping: float = 0.01
    iterations: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(
                f"ratio {self.ratio}: a share above 0 and below 1; for none use svid, for all use rtn with 8 bits"
            )
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")

    def rule(self) -> SplitRule:
        """Return how salient columns and the others are quantized."""
        return SplitRule(
            bits=SALIENT_BITS,
            group_size=0,
            column_scale=self.base == "svid",
            search=False,
            feedback=self.feedback,
            damping=self.damping,
            iterations=self.iterations,
        )


def quantize_pb_llm(weight_OI: Tensor, statistics: InputStatistics | None, config: PbLlmConfig) -> QuantizedLinear:
    """Split a weight into signs and salient codes; float32 [O, I]."""
    assert statistics is not None
    factor_II = inverse_factor(statistics.hessian_II, config.damping)
    if config.granularity == "column":
        count = _salient_count(config, *weight_OI.shape) // weight_OI.shape[0]
        columns_I = salient_columns(weight_OI, factor_II, count, config.metric)
        return quantize_split(weight_OI, statistics.hessian_II, columns_I, config.rule())
    if config.granularity == "fixed":
        size = even_group_size(SALIENT_BLOCK, weight_OI.shape[1])
        mask_OI = even_mask(weight_OI, factor_II, _each(config, size), size, config.metric)
    else:
        mask_OI = salient_mask(weight_OI, factor_II, config.ratio, config.metric)
    grid = min_max_grid(weight_OI, SALIENT_BITS)
    h_O, g_I = _fit_base(weight_OI, ~mask_OI, factor_II.diagonal().square().reciprocal(), config)

    if config.feedback:
        columns = _ColumnSplit(mask_OI, grid, h_O, g_I)
        decided_OI = sweep(weight_OI, factor_II, columns.decide)
    else:
        base_OI = torch.where(weight_OI < 0, -1.0, 1.0) * torch.outer(h_O, g_I)
        decided_OI = torch.where(mask_OI, grid.dequantize(grid.quantize(weight_OI)), base_OI)
    return _pack(decided_OI, mask_OI, grid, (h_O, g_I if config.base == "svid" else None), config)


def _each(config: PbLlmConfig, size: int) -> int:
    """Return how many of `size` columns are salient."""
    return max(1, round(config.ratio * size))


def _salient_count(config: PbLlmConfig, rows: int, columns: int) -> int:
    """Return how many weights of a matrix are salient."""
    if config.granularity == "column":
        return rows * fine_columns(
            config.ratio, WORD_BITS, columns
        )  # the bits of a word cost as much if it is not full
    if config.granularity == "fixed":
        size = even_group_size(SALIENT_BLOCK, columns)
        return rows * (columns // size) * _each(config, size)
    return round(config.ratio * rows * columns)


def _fit_base(
    weight_OI: Tensor, rest_OI: Tensor, column_weight_I: Tensor, config: PbLlmConfig
) -> tuple[Tensor, Tensor]:
    """Return h [O] and g [I] of the base; g is all ones for the row base."""
    if config.base == "svid":
        return fit_rank_one(weight_OI.abs(), rest_OI, column_weight_I, config.iterations)
    mean_O = (weight_OI.abs() * rest_OI).sum(1) / rest_OI.sum(1).clamp(min=1)
    return round_to_float16(mean_O), torch.ones_like(weight_OI[0])


class _ColumnSplit:
    """Decides one column: the salient grid where the mask is set, the base elsewhere."""

    def __init__(self, mask_OI: Tensor, grid: Grid, h_O: Tensor, g_I: Tensor) -> None:
        self.mask_IO = mask_OI.T.contiguous()
        self.grid, self.h_O, self.gains = grid, h_O, g_I.tolist()

    def decide(self, column: int, values_O: Tensor, work_IO: Tensor) -> Tensor:
        """Return the values decided for a column, float32 [O]."""
        del work_IO
        base_O = torch.where(values_O < 0, -self.h_O, self.h_O) * self.gains[column]
        codes_O = (torch.round(values_O / self.grid.scale_O) + self.grid.zero_O).clamp_(0, 2**SALIENT_BITS - 1)
        return torch.where(self.mask_IO[column], (codes_O - self.grid.zero_O) * self.grid.scale_O, base_O)


def _pack(
    decided_OI: Tensor, mask_OI: Tensor, grid: Grid, scales: tuple[Tensor, Tensor | None], config: PbLlmConfig
) -> SignLinear:
    """Build the layer; salient places get a positive sign, which their code replaces."""
    h_O, g_I = scales
    signs_OI = torch.where(mask_OI, torch.ones_like(decided_OI), decided_OI)
    return SignLinear.from_parts(
        signs_OI[None],
        scale_in_PI=None if g_I is None else g_I[None],
        scale_out_PO=h_O[None],
        salient=SalientWeights(
            mask_OI=mask_OI,
            codes_OI=grid.quantize(decided_OI).to(torch.int32),
            scale_O=grid.scale_O,
            zero_O=grid.zero_O.to(torch.int32),
            even_blocks=_even_blocks(config, mask_OI.shape[1]),
        ),
    )


def _even_blocks(config: PbLlmConfig, columns: int) -> int:
    """Return into how many blocks with as many salient weights a row is cut; 0 if it is not."""
    return columns // even_group_size(SALIENT_BLOCK, columns) if config.granularity == "fixed" else 0


def _check(config: PbLlmConfig, rows: int, columns: int) -> None:
    """Refuse a ratio that rounds to no weight or to all of them."""
    count = _salient_count(config, rows, columns)
    if not 0 < count < rows * columns:
        raise ConfigError(f"ratio {config.ratio} keeps {count} of {rows * columns} weights; some must be in each part")


def _spec(config: PbLlmConfig, rows: int, columns: int) -> LayerSpec:
    """Return what is stored."""
    count = _salient_count(config, rows, columns)
    if config.granularity == "column":
        return split_spec(count // rows, config.rule(), rows, columns)
    return LayerSpec(
        format="sign",
        in_features=columns,
        out_features=rows,
        scale_in=config.base == "svid",
        scale_out=True,
        salient=choose_index(count, rows, columns, _even_blocks(config, columns)),
    )


PB_LLM = Method(
    summary="most weights as signs, the salient ones in 8 bit, with error feedback (arXiv:2310.00034)",
    config=PbLlmConfig,
    quantize=quantize_pb_llm,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: (1 - config.ratio) + SALIENT_BITS * config.ratio,
    check=_check,
    spec=_spec,
    ladder=ladder_over("ratio", (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)),
)

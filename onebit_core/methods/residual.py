"""Residual sign planes: a sum of P sign matrices, every weight the nearest of its 2^P sums, with error feedback.

    W ~= sum_p  S_p * (h_p g_p^T)          or, with groups of columns,          W ~= sum_p  S_p * c_p

It starts as svid does, each plane decomposing what the planes before left over, and then alternates two exact steps:

    signs    (s_1, ..., s_P) of a weight = those of the 2^P sums  +-a_1 +- ... +-a_P  that is nearest,  a_p = h_pi g_pj
    scales   h_pi = sum_j d_j r_ij s_ij g_pj / sum_j d_j g_pj^2,   g_pj = sum_i r_ij s_ij h_pi / sum_i h_pi^2,
             with r what the other planes leave over and d_j the importance of column j, the same for all planes

Neither can raise sum_ij d_j (w_ij - what_ij)^2. With feedback a column sweep (onebit_core.methods.second_order), large
inputs first, decides the signs of each column for the weights as they are by then; the scales stay. At last each row
gets P factors on its scales, solved for the least output error (w - what) H (w - what)^T under its signs.

Sources: the nearest of all sums: ARB-LLM, arXiv:2410.03129, section 3 (second-order binarization); planes of
OneBit's form that share one importance: RaBiT, arXiv:2602.05367 (its start); the sweep: arXiv:2210.17323, section 3.
Where we differ: RaBiT trains its planes, here nothing is trained. d is the mean square of the inputs, or with feedback
the curvature 1 / U_jj^2. Signs cannot say zero, so errors that a sweep hands on can grow: a row that the sweep leaves
worse than the nearest sums did keeps those.

Shape suffixes: O = output features, I = input features, P = planes, G = groups, K = columns of one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, SignLinear
from onebit_core.layers.grid import round_to_float16
from onebit_core.layers.sums import nearest_sum, signs_of
from onebit_core.methods.base import Method, even_group_size, ladder_over
from onebit_core.methods.rank_one import fit_rank_one
from onebit_core.methods.second_order import inverse_factor, sweep

START_ITERATIONS = 8
RIDGE = 1e-6
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(StrictConfig):
    """Settings of residual.

    Attributes:
        planes: sign planes, 2 to 4.
        group_size: 0 for scales per row and per column; otherwise at most so many columns share a scale per row and
            plane, and a row is cut into equal groups.
        importance: weigh the fit of the scales by nothing, or by what an error in each column costs.
        iterations: of the alternation between signs and scales.
        feedback: decide column by column, moving each error into the columns after it.
        damping: of the feedback, added to the Hessian's diagonal, relative to its mean.
    """

    planes: int = 2
    group_size: int = 0
    importance: Literal["none", "inputs"] = "inputs"
    iterations: int = 15
    feedback: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 2 <= self.planes <= 4:
            raise ConfigError(f"planes {self.planes}: 2 to 4 sign planes are possible; svid has one")
        if self.group_size < 0 or self.group_size == 1:
            raise ConfigError(f"group_size {self.group_size}: use 0 for row and column scales, or at least 2 columns")
        if self.iterations < 0:
            raise ConfigError(f"iterations {self.iterations}: 0 keeps the start, 15 are usual")
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")


class PlaneScales(NamedTuple):
    """What the signs of plane p are multiplied with: row_POG at the column's group times column_PI; float16 values."""

    row_POG: Tensor
    column_PI: Tensor

    def dense(self) -> Tensor:
        """Return the scales of all weights, float32 [P, O, I]."""
        size = self.column_PI.shape[1] // self.row_POG.shape[2]
        return self.row_POG.repeat_interleave(size, 2) * self.column_PI[:, None, :]


class Decided(NamedTuple):
    """A decision for every weight: bit p of a code says that plane p is negative."""

    code_OI: Tensor
    scales: PlaneScales

    def planes(self) -> Tensor:
        """Return the scaled planes, float32 [P, O, I]; their sum is the decided weight."""
        return signs_of(self.code_OI, len(self.scales.column_PI)) * self.scales.dense()


def fit_scales(
    weight_OK: Tensor, importance_K: Tensor, planes: int, iterations: int, *, by_column: bool
) -> tuple[Tensor, Tensor]:
    """Alternate between the nearest sums and the closed forms of the scales.

    Args:
        weight_OK: float32.
        importance_K: float32, > 0: how much an error in each column counts.
        planes: P.
        iterations: alternations; the error never rises.
        by_column: fit a scale per column beside the one per row; otherwise it stays one.

    Returns:
        (row_PO, column_PK): float32, rounded to float16 values; column scales of a plane have mean one.
    """
    importance_K = importance_K / importance_K.mean().clamp(min=1e-30)
    row_PO, column_PK = _start(weight_OK, importance_K, planes, by_column=by_column)
    for _ in range(iterations):
        scales_POK = row_PO[:, :, None] * column_PK[:, None, :]
        signs_POK = signs_of(nearest_sum(weight_OK, scales_POK), planes)
        rest_OK = weight_OK - (signs_POK * scales_POK).sum(0)
        for plane, sign_OK in enumerate(signs_POK):
            # What the other planes leave over, times this plane's signs (whose squares are one).
            wanted_OK = rest_OK * sign_OK + scales_POK[plane]
            weighted_K = importance_K * column_PK[plane]
            row_O = (wanted_OK @ weighted_K) / (weighted_K @ column_PK[plane]).clamp(min=TINY)
            row_PO[plane] = row_O
            if by_column and float(row_O.square().sum()) > TINY:
                column_PK[plane] = (row_O @ wanted_OK) / row_O.square().sum()
            rest_OK = (wanted_OK - torch.outer(row_O, column_PK[plane])) * sign_OK
    mean_P1 = column_PK.abs().mean(1, keepdim=True).clamp(min=TINY)
    return round_to_float16(row_PO * mean_P1), round_to_float16(column_PK / mean_P1)


def _start(weight_OK: Tensor, importance_K: Tensor, planes: int, *, by_column: bool) -> tuple[Tensor, Tensor]:
    """Return row and column scales, each plane fitted to the magnitudes that the planes before left over."""
    rest_OK = weight_OK.clone()
    rows, columns = [], []
    for _ in range(planes):
        row_O, column_K = rest_OK.abs() @ importance_K / importance_K.sum(), torch.ones_like(importance_K)
        if by_column:
            row_O, column_K = fit_rank_one(rest_OK.abs(), None, importance_K, START_ITERATIONS)
        rest_OK -= torch.where(rest_OK < 0, -1.0, 1.0) * torch.outer(row_O, column_K)
        rows.append(row_O)
        columns.append(column_K)
    return torch.stack(rows), torch.stack(columns)


def quantize_residual(weight_OI: Tensor, statistics: InputStatistics | None, config: ResidualConfig) -> SignLinear:
    """Decompose a weight; float32 [O, I]."""
    if not config.feedback:
        importance_I = torch.ones_like(weight_OI[0])
        if config.importance == "inputs":
            assert statistics is not None
            importance_I = statistics.hessian_II.diagonal()
        scales = _fit(weight_OI, importance_I, config)
        return _layer(Decided(nearest_sum(weight_OI, scales.dense()), scales), config)
    assert statistics is not None
    hessian_II = statistics.hessian_II
    order_I = hessian_II.diagonal().argsort(descending=True)
    factor_II = inverse_factor(hessian_II[order_I][:, order_I], config.damping)
    importance_I = torch.ones_like(weight_OI[0])
    if config.importance == "inputs":
        importance_I[order_I] = factor_II.diagonal() ** -2.0
    scales = _fit(weight_OI, importance_I, config)
    plain = Decided(nearest_sum(weight_OI, scales.dense()), scales)
    swept = Decided(_sweep(weight_OI, factor_II, order_I, scales), scales)
    refitted = _refit_rows(weight_OI, swept, hessian_II)
    return _layer(_best_rows(weight_OI, hessian_II, (plain, swept, refitted)), config)


def _fit(weight_OI: Tensor, importance_I: Tensor, config: ResidualConfig) -> PlaneScales:
    """Fit all scales to the weight."""
    importance_I = importance_I.clamp(min=1e-6 * float(importance_I.mean()) + 1e-30)
    if not config.group_size:
        row_PO, column_PI = fit_scales(weight_OI, importance_I, config.planes, config.iterations, by_column=True)
        return PlaneScales(row_PO[:, :, None], column_PI)
    size = even_group_size(config.group_size, weight_OI.shape[1])
    rows = [
        fit_scales(weight_OK, importance_K, config.planes, config.iterations, by_column=False)[0]
        for weight_OK, importance_K in zip(weight_OI.split(size, 1), importance_I.split(size), strict=True)
    ]
    return PlaneScales(torch.stack(rows, 2), weight_OI.new_ones(config.planes, weight_OI.shape[1]))


def _sweep(weight_OI: Tensor, factor_II: Tensor, order_I: Tensor, scales: PlaneScales) -> Tensor:
    """Return the codes of all columns, decided with feedback in the given order; the scales stay."""
    planes, columns = scales.column_PI.shape
    size = columns // scales.row_POG.shape[2]
    numbers = order_I.tolist()
    row_GPO = scales.row_POG.permute(2, 0, 1).contiguous()
    code_IO = torch.empty(weight_OI.T.shape, dtype=torch.uint8, device=weight_OI.device)

    def decide(place: int, values_O: Tensor, work_IO: Tensor) -> Tensor:
        del work_IO
        column = numbers[place]
        scales_PO = row_GPO[column // size] * scales.column_PI[:, column, None]
        code_IO[column] = nearest_sum(values_O, scales_PO)
        return (signs_of(code_IO[column], planes) * scales_PO).sum(0)

    sweep(weight_OI[:, order_I], factor_II, decide)
    return code_IO.T.contiguous()


def _refit_rows(weight_OI: Tensor, decided: Decided, hessian_II: Tensor) -> Decided:
    """Multiply the scales of each row by P factors, one a plane, that give the least output error under its signs."""
    basis_POI = decided.planes()
    pushed_POI = basis_POI @ hessian_II
    gram_OPP = torch.stack([(pushed_POI * basis_OI).sum(2).T for basis_OI in basis_POI], 2)
    right_OP = (pushed_POI * weight_OI).sum(2).T
    ridge_O1 = RIDGE * gram_OPP.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + TINY
    gram_OPP.diagonal(dim1=1, dim2=2).add_(ridge_O1)
    factor_OP, _ = torch.linalg.solve_ex(gram_OPP, right_OP)
    row_POG = round_to_float16(decided.scales.row_POG * factor_OP.T[:, :, None])
    return Decided(decided.code_OI, PlaneScales(row_POG, decided.scales.column_PI))


def _best_rows(weight_OI: Tensor, hessian_II: Tensor, candidates: Sequence[Decided]) -> Decided:
    """Return, row by row, the candidate of the least output error; all have the same column scales."""
    best, best_error_O = candidates[0], torch.full_like(weight_OI[:, 0], torch.inf)
    for candidate in candidates:
        rest_OI = weight_OI - candidate.planes().sum(0)
        error_O = ((rest_OI @ hessian_II) * rest_OI).sum(1)
        better_O1 = (error_O < best_error_O)[:, None]  # false where the error is not a number
        row_POG = torch.where(better_O1, candidate.scales.row_POG, best.scales.row_POG)
        code_OI = torch.where(better_O1, candidate.code_OI, best.code_OI)
        best = Decided(code_OI, PlaneScales(row_POG, best.scales.column_PI))
        best_error_O = torch.where(better_O1[:, 0], error_O, best_error_O)
    return best


def _layer(decided: Decided, config: ResidualConfig) -> SignLinear:
    """Pack what was decided."""
    row_POG, column_PI = decided.scales
    return SignLinear.from_parts(
        signs_of(decided.code_OI, config.planes),
        scale_in_PI=None if config.group_size else column_PI,
        scale_out_PO=None if config.group_size else row_POG[:, :, 0],
        group_scale_POG=row_POG if config.group_size else None,
    )


def _check(config: ResidualConfig, rows: int, columns: int) -> None:
    """Refuse a row that cannot be cut into groups."""
    del rows
    if config.group_size:
        even_group_size(config.group_size, columns)


def _spec(config: ResidualConfig, rows: int, columns: int) -> LayerSpec:
    """Return what is stored."""
    grouped = config.group_size > 0
    return LayerSpec(
        format="sign",
        in_features=columns,
        out_features=rows,
        planes=config.planes,
        groups=columns // even_group_size(config.group_size, columns) if grouped else 0,
        scale_in=not grouped,
        scale_out=not grouped,
    )


RESIDUAL = Method(
    summary="a sum of two to four sign planes, signs chosen together, with error feedback (arXiv:2410.03129)",
    config=ResidualConfig,
    quantize=quantize_residual,
    needs_statistics=lambda config: config.feedback or config.importance == "inputs",
    nominal_bits=lambda config: float(config.planes),
    check=_check,
    spec=_spec,
    ladder=ladder_over("planes", (2, 3, 4)),
)

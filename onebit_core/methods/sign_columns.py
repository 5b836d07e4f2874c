"""Whole columns at some bits, all others as signs with row and column scales; shared by ptq161 and pb_llm.

    W_rest ~= S * (h g^T)   in the columns C (coarse),          integer codes in the columns F (fine)

Coarse columns are decided first, so that the fine ones can take over what they leave:

    1. Column sweep over C, large inputs first; S = signs of the weights as feedback has changed them.
    2. h and g in closed form for these signs, for the error that F cannot take over: with E = W_C - S * (h g^T) and
       M = H_CC - H_CF H_FF^-1 H_FC (the Schur complement) minimize tr(E M E^T):
           h_i = v_i M w_i / v_i M v_i,  v_i = s_i * g;       (M * V^T V) g = sum_i v_i * (M w_i),  V = diag(h) S
    3. F takes over the rest, W_F += E H_CF H_FF^-1, and is rounded by a sweep of its own, large inputs first.

Deciding F last lowers the output error by a sixth to a fifth against the order of the columns, and by a quarter against
F first, on weights with power-law input covariance (docs/methods/ptq161.md).

Sources: the closed forms are least squares; the sweep is GPTQ's, arXiv:2210.17323, section 3. Ours: the order, and M.

Shape suffixes: O = output features, I = input features, C = coarse columns, F = fine columns, K = columns of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.layers import GroupedIntLinear, LayerSpec, SignLinear, SplitLinear
from onebit_core.layers.grid import Grid, best_grid, min_max_grid, round_to_float16
from onebit_core.methods.rank_one import fit_rank_one
from onebit_core.methods.second_order import inverse_factor, sweep

SCALE_RIDGE = 1e-4
"""Added to the diagonal of the system for g, relative to its mean."""


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How both kinds of columns are quantized.

    Attributes:
        bits: of fine columns.
        group_size: fine columns that share a scale; 0 for one group a row. Divides their number.
        column_scale: whether signs have a scale per column beside that per row.
        search: shrink each range of the fine columns to its least squared error.
        feedback: sweep, and let fine columns take over; else everything is rounded for itself.
        damping: added to the Hessian's diagonal, relative to its mean.
        iterations: of the rank-one fit that the scales start from.
    """

    bits: int
    group_size: int
    column_scale: bool
    search: bool
    feedback: bool
    damping: float
    iterations: int


def fine_columns(ratio: float, group_size: int, columns: int) -> int:
    """Return how many columns are fine: whole groups, or one smaller group where the share is less than that."""
    count = max(1, round(ratio * columns))
    return count if not group_size or count < group_size else round(count / group_size) * group_size


def split_spec(fine: int, rule: SplitRule, rows: int, columns: int) -> LayerSpec:
    """Return what is stored for a matrix of that shape."""
    return LayerSpec(
        format="split",
        in_features=columns,
        out_features=rows,
        parts=(
            LayerSpec(
                format="grouped_int", in_features=fine, out_features=rows, planes=rule.bits,
                groups=fine // _size(rule, fine),
            ),
            LayerSpec(
                format="sign", in_features=columns - fine, out_features=rows, scale_in=rule.column_scale, scale_out=True
            ),
        ),
    )  # fmt: skip


def quantize_split(weight_OI: Tensor, hessian_II: Tensor, fine_I: Tensor, rule: SplitRule) -> SplitLinear:
    """Quantize a weight.

    Args:
        weight_OI: float32.
        hessian_II: float32.
        fine_I: bool, the columns that get codes.
        rule: how.
    """
    large_first_I = hessian_II.diagonal().argsort(dim=0, descending=True, stable=True)
    coarse_C, fine_F = large_first_I[~fine_I[large_first_I]], fine_I.nonzero()[:, 0]
    start_C = coarse_C.argsort()  # back to ascending columns
    target_OC, target_OF = weight_OI[:, coarse_C], weight_OI[:, fine_F]
    damped_II = _damped(hessian_II, rule.damping)
    factor_II = inverse_factor(_reorder(hessian_II, torch.cat((coarse_C, fine_F))), rule.damping)
    factor_CC = factor_II[: len(coarse_C), : len(coarse_C)]
    unseen_CC, taken_CF = _reorder(damped_II, coarse_C), None
    if rule.feedback:
        across_FC = torch.linalg.solve(_reorder(damped_II, fine_F), damped_II[fine_F][:, coarse_C])
        unseen_CC = unseen_CC - damped_II[coarse_C][:, fine_F] @ across_FC
        taken_CF = across_FC.T
    signs_OC, h_O, g_C = _decide_signs(target_OC, factor_CC, unseen_CC, rule)
    if taken_CF is not None:
        target_OF = target_OF + (target_OC - signs_OC * torch.outer(h_O, g_C)) @ taken_CF
    fine = _round_codes(target_OF, _reorder(hessian_II, fine_F), rule)
    signs = SignLinear.from_parts(
        signs_OC[None, :, start_C],
        scale_in_PI=g_C[None, start_C] if rule.column_scale else None,
        scale_out_PO=h_O[None],
    )
    return SplitLinear.from_layers(fine_I, (fine, signs))


def _size(rule: SplitRule, fine: int) -> int:
    """Return the columns of a group."""
    return min(rule.group_size or fine, fine)


def _reorder(matrix_II: Tensor, order_K: Tensor) -> Tensor:
    return matrix_II[order_K][:, order_K]


def _damped(hessian_II: Tensor, damping: float) -> Tensor:
    """Return H with something on its diagonal, also where an input was always zero."""
    mean = hessian_II.diagonal().mean().clamp(min=1e-20)
    damped_II = hessian_II.clone()
    damped_II.diagonal().add_(damping * mean)
    return damped_II


def _decide_signs(
    target_OC: Tensor, factor_CC: Tensor, unseen_CC: Tensor, rule: SplitRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return signs [O, C], h [O] and g [C] of the coarse columns; float16 scales, g of mean one."""
    if rule.column_scale:
        curvature_C = factor_CC.diagonal().square().reciprocal()
        h_O, g_C = fit_rank_one(target_OC.abs(), None, curvature_C, rule.iterations)
    else:
        h_O, g_C = round_to_float16(target_OC.abs().mean(1)), torch.ones_like(target_OC[0])
    decided_OC = target_OC
    if rule.feedback:
        gains = g_C.tolist()
        decided_OC = sweep(target_OC, factor_CC, lambda j, values_O, _: torch.where(values_O < 0, -h_O, h_O) * gains[j])
    signs_OC = torch.where(decided_OC < 0, -1.0, 1.0)
    seen_OC = target_OC @ unseen_CC
    if rule.column_scale:
        h_O = _row_scale(seen_OC, signs_OC * g_C, unseen_CC)
        g_C = _column_scale(seen_OC, signs_OC * h_O[:, None], unseen_CC)
        mean = g_C.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
        signs_OC, g_C = _positive(signs_OC, g_C), round_to_float16(g_C.abs() / mean)
    h_O = _row_scale(seen_OC, signs_OC * g_C, unseen_CC)
    signs_OC = _positive(signs_OC.T, h_O).T
    return signs_OC, round_to_float16(h_O.abs()), g_C


def _row_scale(seen_OC: Tensor, model_OC: Tensor, metric_CC: Tensor) -> Tensor:
    """Return the h [O] of least error for W ~= h * model, `seen` being W times the metric."""
    return (seen_OC * model_OC).sum(1) / ((model_OC @ metric_CC) * model_OC).sum(1).clamp(min=1e-30)


def _column_scale(seen_OC: Tensor, model_OC: Tensor, metric_CC: Tensor) -> Tensor:
    """Return the g [C] of least error for W ~= model * g."""
    system_CC = metric_CC * (model_OC.T @ model_OC)
    ridge = SCALE_RIDGE * system_CC.diagonal().mean() + 1e-30
    system_CC.diagonal().add_(ridge)
    wanted_C = (seen_OC * model_OC).sum(0) + ridge  # the ridge pulls towards 1
    scale_C: Tensor = torch.linalg.solve(system_CC, wanted_C)
    return scale_C


def _positive(signs_OC: Tensor, scale_C: Tensor) -> Tensor:
    """Return signs for the absolute values of scales."""
    return torch.where(scale_C < 0, -signs_OC, signs_OC)


def _round_codes(target_OF: Tensor, hessian_FF: Tensor, rule: SplitRule) -> GroupedIntLinear:
    """Round the fine columns, large inputs first; grids are made beforehand, so groups stay those of the columns."""
    columns, size = target_OF.shape[1], _size(rule, target_OF.shape[1])
    grids = [_grid(target_OF, hessian_FF.diagonal(), slice(at, at + size), rule) for at in range(0, columns, size)]
    decided_OF = target_OF
    if rule.feedback:
        order_F = hessian_FF.diagonal().argsort(dim=0, descending=True, stable=True)
        numbers = order_F.tolist()
        factor_FF = inverse_factor(_reorder(hessian_FF, order_F), rule.damping)

        def round_column(place: int, values_O: Tensor, work_IO: Tensor) -> Tensor:
            del work_IO
            grid = grids[numbers[place] // size]
            decided_O1: Tensor = grid.dequantize(grid.quantize(values_O[:, None]))
            return decided_O1[:, 0]

        decided_OF = torch.empty_like(target_OF)
        decided_OF[:, order_F] = sweep(target_OF[:, order_F], factor_FF, round_column)
    codes = [grid.quantize(part) for grid, part in zip(grids, decided_OF.split(size, 1), strict=True)]
    return GroupedIntLinear.from_codes(
        torch.cat(codes, 1).to(torch.int32),
        torch.stack([grid.scale_O for grid in grids], 1),
        torch.stack([grid.zero_O for grid in grids], 1).to(torch.int32),
        rule.bits,
    )


def _grid(target_OF: Tensor, importance_F: Tensor, span: slice, rule: SplitRule) -> Grid:
    """Return the grid of one group."""
    weight_OK = target_OF[:, span]
    return best_grid(weight_OK, rule.bits, importance_F[span]) if rule.search else min_max_grid(weight_OK, rule.bits)

"""Which weights matter most.

    magnitude   |w_ij|
    hessian     w_ij^2 / U_jj^2      (what removing the weight costs after feedback; SparseGPT, arXiv:2301.00774)

U is the factor of onebit_core.methods.second_order. Salient are the top weights of the whole matrix, the top ones of
every row and block, or whole columns by the sum of their squared scores.
"""

from typing import Literal

import torch
from torch import Tensor

Metric = Literal["hessian", "magnitude"]


def salient_mask(weight_OI: Tensor, factor_II: Tensor | None, ratio: float, metric: Metric) -> Tensor:
    """Return a bool mask of the round(ratio * O * I) most salient weights of the whole matrix.

    Args:
        weight_OI: float32.
        factor_II: U, needed by the hessian metric.
        ratio: share of weights, between 0 and 1.
        metric: which score ranks them.
    """
    score_OI = _score(weight_OI, factor_II, metric)
    count = max(1, round(ratio * score_OI.numel()))
    mask_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    mask_OI.view(-1)[score_OI.flatten().topk(count).indices] = True
    return mask_OI


def even_mask(weight_OI: Tensor, factor_II: Tensor | None, count: int, size: int, metric: Metric) -> Tensor:
    """Return a bool mask of the `count` most salient weights of every row and block of `size` columns."""
    score_OGK = _score(weight_OI, factor_II, metric).unflatten(1, (-1, size))
    mask_OGK = torch.zeros_like(score_OGK, dtype=torch.bool)
    mask_OGK.scatter_(2, score_OGK.topk(count, dim=2).indices, value=True)
    return mask_OGK.flatten(1)


def salient_columns(weight_OI: Tensor, factor_II: Tensor | None, count: int, metric: Metric) -> Tensor:
    """Return a bool mask [I] of the `count` columns with the largest sum of squared scores."""
    total_I = _score(weight_OI, factor_II, metric).square().sum(0)
    mask_I = torch.zeros_like(total_I, dtype=torch.bool)
    mask_I[total_I.argsort(dim=0, descending=True, stable=True)[:count]] = True
    return mask_I


def _score(weight_OI: Tensor, factor_II: Tensor | None, metric: Metric) -> Tensor:
    """Return |w|, or |w| / U_jj."""
    score_OI = weight_OI.abs()
    if metric == "hessian":
        assert factor_II is not None
        score_OI = score_OI / factor_II.diagonal()
    return score_OI

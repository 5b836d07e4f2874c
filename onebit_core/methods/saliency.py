"""Which weights matter most.

    magnitude   |w_ij|
    hessian     w_ij^2 / U_jj^2      (what removing the weight costs after feedback; SparseGPT, arXiv:2301.00774)

U is the factor of onebit_core.methods.second_order.
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
    score_OI = weight_OI.abs()
    if metric == "hessian":
        assert factor_II is not None
        score_OI = score_OI / factor_II.diagonal()
    count = max(1, round(ratio * score_OI.numel()))
    mask_OI = torch.zeros_like(weight_OI, dtype=torch.bool)
    mask_OI.view(-1)[score_OI.flatten().topk(count).indices] = True
    return mask_OI

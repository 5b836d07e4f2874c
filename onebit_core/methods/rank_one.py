"""The best rank-one model of magnitudes, over the entries of a mask and weighted by column; shared by svid and pb_llm.

    minimize   sum_ij  d_j m_ij (|w_ij| - h_i g_j)^2      over h, g >= 0

by alternating the two closed forms

    h_i = sum_j d_j m_ij |w_ij| g_j / sum_j d_j m_ij g_j^2        g_j = sum_i m_ij |w_ij| h_i / sum_i m_ij h_i^2

Without mask and weights this converges to the leading singular pair of |W|, which is non-negative (Perron-Frobenius).
Gauge: mean(g) = 1, so that x * g stays in the range of x and h carries the magnitude.
"""

import torch
from torch import Tensor

from onebit_core.layers.grid import round_to_float16


def fit_rank_one(
    magnitude_OI: Tensor, mask_OI: Tensor | None = None, column_weight_I: Tensor | None = None, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """Fit h g^T to magnitudes.

    Args:
        magnitude_OI: float32, >= 0.
        mask_OI: bool, entries to fit; None for all.
        column_weight_I: float32, > 0; None for equal.
        iterations: alternations; converges fast, 8 is enough for most weights.

    Returns:
        (h, g): float32 [O] and [I], rounded to float16 values.
    """
    magnitude_OI = magnitude_OI if mask_OI is None else magnitude_OI * mask_OI
    mask_float_OI = torch.ones_like(magnitude_OI) if mask_OI is None else mask_OI.float()
    weight_I = torch.ones_like(magnitude_OI[0]) if column_weight_I is None else column_weight_I
    tiny = 1e-20
    g_I = torch.ones_like(weight_I)
    h_O = torch.zeros_like(magnitude_OI[:, 0])
    for _ in range(iterations):
        weighted_I = weight_I * g_I
        h_O = (magnitude_OI @ weighted_I) / (mask_float_OI @ (weighted_I * g_I)).clamp(min=tiny)
        g_I = (h_O @ magnitude_OI) / (h_O.square() @ mask_float_OI).clamp(min=tiny)
    mean = g_I.mean().clamp(min=tiny)
    return round_to_float16(h_O * mean), round_to_float16(g_I / mean)

"""Sums of scaled signs: which of the 2^P sums +-a_1 +- ... +-a_P is nearest to a value.

Shared by the method residual and the training of layers with several planes. A code names a sum: its bit p says that
plane p is negative.

Shape suffix: P = planes.
"""

import torch
from torch import Tensor


def nearest_sum(values: Tensor, scales_P: Tensor) -> Tensor:
    """Return the code of the nearest sum, uint8, values' shape.

    Args:
        values: float32, any shape.
        scales_P: float32 [P, ...], the rest as `values`.
    """
    best = torch.full_like(values, torch.inf)
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for candidate in range(2 ** len(scales_P)):
        distance = (values - sum_of(candidate, scales_P)).abs_()
        code.masked_fill_(distance < best, candidate)
        best = torch.minimum(best, distance)
    return code


def sum_of(code: int, scales_P: Tensor) -> Tensor:
    """Return one sum for all places, float32, the shape of one plane's scales."""
    total = torch.zeros_like(scales_P[0])
    for plane, scale in enumerate(scales_P):
        total = total - scale if code >> plane & 1 else total + scale
    return total


def signs_of(code: Tensor, planes: int) -> Tensor:
    """Return the signs of all planes, float32 [P, ...]."""
    return torch.stack([1.0 - 2.0 * (code >> plane & 1) for plane in range(planes)])

"""Learned weight clipping: integer rounding whose range is found by gradient, group by group.

    low = sigmoid(b) * min(W),   high = sigmoid(a) * max(W)                            a and b are learned, per group
    s = (high - low) / (2**B - 1),   z = round(-low / s),   what = s * (clamp(round(w / s) + z, 0, 2**B - 1) - z)

A narrower range rounds the many small weights more finely and clips the few large ones. How much that is worth depends
on the inputs, so a and b follow the gradient of the layer's output error, rounding passed straight through:

    minimize   tr(E H E^T),     E = W - what,     H = second moments of the inputs

Source: OmniQuant, arXiv:2308.13137, section 3.2 (learnable weight clipping). Where we differ: the error is that of one
layer in place of a block, whose part reconstruction does; no equivalent transformation (section 3.3); the range always
holds zero. Each row's error counts relative to that of its plain range, and each row keeps the best grids it was seen
with, float16 scales included and the plain ones among them, so none ends worse than rounding. The original has been
reported to end in NaN at 2 bits (its issue 69): here scales have a floor, a gradient that is not finite counts as zero,
and an error that is not finite is never the best.

Shape suffixes: O = output features, I = input features, K = columns of one group, R = groups of all rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import GroupedIntLinear
from onebit_core.layers.grid import Grid, grid_of_range, min_max_grid
from onebit_core.methods.base import Method, check_bits, check_group_size, grouped_int_spec, ladder_over

START = 4.0
"""Of a and b, as published: the sigmoid of it is 0.982."""


@dataclass(frozen=True, kw_only=True)
class OmniquantConfig(StrictConfig):
    """Settings of omniquant.

    Attributes:
        bits: per weight, 1 to 8.
        group_size: columns that share a scale; 0 for one group per row.
        steps: of gradient descent; 0 leaves a range of 0.982 or the whole, whichever is better.
        rate: of Adam, on a and b.
    """

    bits: int = 3
    group_size: int = 64
    steps: int = 50
    rate: float = 0.1

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.steps < 0:
            raise ConfigError(f"steps {self.steps}: 0 learns nothing, 50 are usual")
        if self.rate <= 0:
            raise ConfigError(f"rate {self.rate}: must be positive; 0.1 is usual")


class _BestRows:
    """The best grids that each row was seen with."""

    def __init__(self, weight_OI: Tensor, hessian_II: Tensor, plain: Grid) -> None:
        self.weight_OI, self.hessian_II = weight_OI, hessian_II
        self.grid = plain
        self.error_O = torch.full_like(weight_OI[:, 0], torch.inf)

    def offer(self, grid: Grid) -> Tensor:
        """Keep a grid [R] for the rows that it is better for; return E H, float32 [O, I]."""
        weight_RK = self.weight_OI.reshape(len(grid.scale_O), -1)
        error_OI = (weight_RK - grid.dequantize(grid.quantize(weight_RK))).view_as(self.weight_OI)
        pushed_OI = error_OI @ self.hessian_II
        error_O = (pushed_OI * error_OI).sum(1)
        better_O = error_O < self.error_O  # false where the error is not a number
        better_R = better_O.repeat_interleave(len(grid.scale_O) // len(error_O))
        self.error_O = torch.where(better_O, error_O, self.error_O)
        self.grid = Grid(
            torch.where(better_R, grid.scale_O, self.grid.scale_O),
            torch.where(better_R, grid.zero_O, self.grid.zero_O),
            grid.bits,
        )
        return pushed_OI


def quantize_omniquant(
    weight_OI: Tensor, statistics: InputStatistics | None, config: OmniquantConfig
) -> GroupedIntLinear:
    """Learn the ranges of a weight and round it; float32 [O, I]."""
    assert statistics is not None
    rows, columns = weight_OI.shape
    weight_RK = weight_OI.reshape(-1, config.group_size or columns)
    plain = min_max_grid(weight_RK, config.bits)
    best = _BestRows(weight_OI, _hessian_of(statistics), plain)
    best.offer(plain)
    size_O1 = best.error_O[:, None].clamp(min=1e-30)
    ends_2R = torch.stack([weight_RK.amin(1).clamp(max=0), weight_RK.amax(1).clamp(min=0)])
    logits_2R = torch.full_like(ends_2R, START)
    optimizer = torch.optim.Adam([logits_2R], lr=config.rate)
    for _ in range(config.steps):
        share_2R = logits_2R.sigmoid()
        low_R, high_R = share_2R * ends_2R
        grid = grid_of_range(low_R, high_R, config.bits)
        pushed_RK = (best.offer(grid) / size_O1).view_as(weight_RK)
        slope_2R = slope_of_ends(weight_RK, grid, low_R, pushed_RK)
        logits_2R.grad = torch.nan_to_num(slope_2R * ends_2R * share_2R * (1 - share_2R), 0.0, 0.0, 0.0)
        optimizer.step()
    low_R, high_R = logits_2R.sigmoid() * ends_2R
    best.offer(grid_of_range(low_R, high_R, config.bits))
    grid = best.grid
    return GroupedIntLinear.from_codes(
        grid.quantize(weight_RK).view(rows, columns).to(torch.int32),
        grid.scale_O.view(rows, -1),
        grid.zero_O.view(rows, -1).to(torch.int32),
        config.bits,
    )


def _hessian_of(statistics: InputStatistics) -> Tensor:
    """Return the second moments; those of white inputs for a layer that calibration never reached."""
    hessian_II = statistics.hessian_II
    reached = bool(hessian_II.diagonal().mean() > torch.finfo(hessian_II.dtype).tiny)
    return hessian_II if reached else torch.eye(len(hessian_II), device=hessian_II.device)


def slope_of_ends(weight_RK: Tensor, grid: Grid, low_R: Tensor, pushed_RK: Tensor) -> Tensor:
    """Return the gradient of sum(E * E H) for the ends of the ranges, [2, R], low first; rounding passes it through.

    A weight inside of its range is what = s * round(w / s), one outside sits at an end, what = s * point with a point
    that moves as the zero point does. With high = low + (2**B - 1) * s both come to

        d what / d s = point - w / s   or   point - low / s,      d what / d low = 0   or   1      (inside or outside)
    """
    scale_R1 = grid.scale_O[:, None]
    points_RK = grid.quantize(weight_RK) - grid.zero_O[:, None]
    inside_RK = points_RK == torch.round(weight_RK / scale_R1)
    from_RK = torch.where(inside_RK, weight_RK, low_R[:, None])
    slope_of_scale_R = -2 * (pushed_RK * (points_RK - from_RK / scale_R1)).sum(1) / (2**grid.bits - 1)
    slope_of_low_R = -2 * pushed_RK.masked_fill(inside_RK, 0).sum(1)
    return torch.stack([slope_of_low_R - slope_of_scale_R, slope_of_scale_R])


OMNIQUANT = Method(
    summary="integer rounding whose ranges are learned by gradient on the output error (arXiv:2308.13137)",
    config=OmniquantConfig,
    quantize=quantize_omniquant,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: float(config.bits),
    check=lambda config, _rows, columns: check_group_size(config.group_size, columns),
    spec=lambda config, rows, columns: grouped_int_spec(config.bits, config.group_size, rows, columns),
    ladder=ladder_over("bits", (2, 3, 4, 5, 6, 8)),
)

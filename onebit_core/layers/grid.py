"""Integer grids: shared by rtn, gptq, the salient part of pb_llm and the 8-bit head.

    q = clamp(round(w / s) + z, 0, 2**b - 1),    w_hat = s * (q - z)

Asymmetric min-max per group, with zero inside the range. Optionally the range shrinks to where the weighted squared
error of the group is least (a grid search over 1.00, 0.96, ... 0.52 of it).

Shape suffixes: O = output features, K = columns of one group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-20
"""Below it a subnormal float16 has less than four bits left; weights that small are zeros of their layer."""

SHRINK_STEPS = tuple(1.0 - 0.04 * step for step in range(13))


def round_to_float16(values: Tensor) -> Tensor:
    """Return values as the float16 on disk will give them back, float32, kept finite.

    Every method decides with the scales that will be stored, so a layer dequantizes to exactly what was decided.
    """
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().float()


class Grid(NamedTuple):
    """A grid per row: float16-exact scale and integer zero point."""

    scale_O: Tensor
    zero_O: Tensor
    bits: int

    def quantize(self, weight_OK: Tensor) -> Tensor:
        """Return codes, float32 holding integers, [O, K]."""
        codes = torch.round(weight_OK / self.scale_O[:, None]) + self.zero_O[:, None]
        return codes.clamp_(0, 2**self.bits - 1)

    def dequantize(self, codes_OK: Tensor) -> Tensor:
        """Return the weights the codes stand for."""
        return (codes_OK - self.zero_O[:, None]) * self.scale_O[:, None]


def min_max_grid(weight_OK: Tensor, bits: int) -> Grid:
    """Fit a grid to the range of each row, which always holds zero."""
    return grid_of_range(weight_OK.amin(1).clamp(max=0), weight_OK.amax(1).clamp(min=0), bits)


def grid_of_range(low_O: Tensor, high_O: Tensor, bits: int) -> Grid:
    """Return the grid whose ends are low <= 0 <= high."""
    step_O = (high_O - low_O) / (2**bits - 1)
    scale_O = round_to_float16(step_O.clamp(min=SMALLEST_SCALE))  # it divides
    zero_O = torch.round(-low_O / scale_O).clamp_(0, 2**bits - 1)
    return Grid(scale_O, zero_O, bits)


def best_grid(weight_OK: Tensor, bits: int, column_weight_K: Tensor | None) -> Grid:
    """Fit a grid whose range minimizes the squared error, weighted by column.

    Args:
        weight_OK: float32.
        bits: 1 to 8.
        column_weight_K: importance of each column, or None for equal.
    """
    low_O, high_O = weight_OK.amin(1).clamp(max=0), weight_OK.amax(1).clamp(min=0)
    best = grid_of_range(low_O, high_O, bits)
    best_error_O = torch.full_like(best.scale_O, torch.inf)
    for shrink in SHRINK_STEPS:
        grid = grid_of_range(low_O * shrink, high_O * shrink, bits)
        error_OK = (grid.dequantize(grid.quantize(weight_OK)) - weight_OK).square_()
        error_O = error_OK.sum(1) if column_weight_K is None else error_OK @ column_weight_K
        better_O = error_O < best_error_O
        best = Grid(
            torch.where(better_O, grid.scale_O, best.scale_O), torch.where(better_O, grid.zero_O, best.zero_O), bits
        )
        best_error_O = torch.where(better_O, error_O, best_error_O)
    return best

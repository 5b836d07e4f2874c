"""What BiLLM and its family share: salient columns, two magnitude groups, and feedback from block to block.

A block is some 128 columns of all rows. In each block the few columns that matter most are salient:

    saliency of column j    sum_i w_ij^2 / U_jj^2              U of onebit_core.methods.second_order

and there every row has four values, mu +- a1 +- a2 (a sign, then the sign of what it left over). The other columns fall
into two groups by magnitude, |w| < p and |w| >= p, each with its mean and its mean deviation, so here too every row has
four values: m +- a of either group (the bell-shaped split).

Sources: BiLLM, arXiv:2402.04291, sections 3.2 and 3.3; ARB-LLM, arXiv:2410.03129, section 3, builds on it. Where we
differ: errors are those of W, not of its saliency as in BiLLM's published code; every weight takes the nearest of its
row's four values, whichever group it was in when they were fitted; the number of salient columns is one a layer.

Shape suffixes: O = output features, I = input features, K = columns of a block, G = blocks; 4 = levels.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from onebit_core.errors import ConfigError
from onebit_core.layers.grid import round_to_float16
from onebit_core.methods.base import even_group_size
from onebit_core.methods.second_order import SWEEP_BLOCK, sweep

Feedback = Literal["block", "column"]

MOST_SALIENT = 49
"""Salient columns a block that are tried, as in BiLLM's published code."""

PATIENCE = 8
"""Counts that are tried past the best: the error falls, then rises."""

TYPICAL_SALIENT = 4
"""What is mostly chosen of 128 columns; how much is stored hardly depends on it."""

PAPER_BITS = 1.09
"""What the papers advertise where they choose the number of salient columns: 1.08 to 1.11."""

GROUP_SHARES = (0.1, 0.9)
"""The smaller group has at least a tenth of a block's weights."""


def check_blocks(group_size: int, salient: int, columns: int) -> None:
    """Refuse a row that cannot be cut into blocks, and blocks that would have no columns but salient ones.

    Raises:
        ConfigError: with what would do.
    """
    size = even_group_size(group_size, columns)
    if max(salient, 1) >= size:
        raise ConfigError(
            f"salient {salient}: blocks of {columns} input features have {size} columns, and some must not be salient; "
            f"use at most {size - 1}, or 0 to choose"
        )


def blocks_of(group_size: int, salient: int, columns: int) -> tuple[int, int]:
    """Return the blocks of a row and its salient columns; a typical number where it is chosen later."""
    size = even_group_size(group_size, columns)
    groups = columns // size
    return groups, groups * (salient or max(1, min(TYPICAL_SALIENT, size // 2)))


def paper_bits(group_size: int, salient: int) -> float:
    """Return one bit a weight and a second one in salient columns, as the papers count."""
    return 1 + salient / group_size if salient and group_size else PAPER_BITS


class Blocks(Protocol):
    """Decides the columns of one block after the other."""

    def fit(self, start: int, weight_OK: Tensor) -> None:
        """Fit scales to the block that begins at column `start`, as it is now."""

    def decide(self, column: int, values_O: Tensor) -> Tensor:
        """Return the values decided for a column of that block, float32 [O], and keep them."""


def sweep_blocks(weight_OI: Tensor, factor_II: Tensor, size: int, blocks: Blocks, feedback: Feedback) -> None:
    """Decide a weight block by block, moving errors into what is not yet decided.

    `block`: nothing moves inside of a block; what a block B leaves over moves into the columns R after it, as far as
    they can absorb it: W_R -= (W_B - Q_B) U_BB^-1 U_BR. (BiLLM's published code has diag(U_BB) in place of U_BB, which
    is right for single columns only.) `column`: the sweep of second_order, inside of a block too.

    Args:
        weight_OI: float32; not modified.
        factor_II: U of `inverse_factor`.
        size: columns of a block; divides I.
        blocks: what decides.
        feedback: block or column.
    """
    columns = weight_OI.shape[1]
    if feedback == "column":

        def decide_column(column: int, values_O: Tensor, work_IO: Tensor) -> Tensor:
            if column % size == 0:
                blocks.fit(column, work_IO[column : column + size].T)
            return blocks.decide(column, values_O)

        sweep(weight_OI, factor_II, decide_column, size if size >= SWEEP_BLOCK else SWEEP_BLOCK // size * size)
        return
    work_OI = weight_OI.clone()
    for start in range(0, columns, size):
        end = start + size
        block_OK = work_OI[:, start:end]
        blocks.fit(start, block_OK)
        decided_OK = torch.stack([blocks.decide(column, work_OI[:, column]) for column in range(start, end)], 1)
        upper_KK = factor_II[start:end, start:end]
        error_OK = torch.linalg.solve_triangular(upper_KK, block_OK - decided_OK, upper=True, left=False)
        work_OI[:, end:] -= error_OK @ factor_II[start:end, end:]


def salient_columns(weight_OK: Tensor, curvature_K: Tensor, count: int) -> Tensor:
    """Return a bool mask [K] of the columns whose loss would cost most.

    Args:
        weight_OK: float32.
        curvature_K: 1 / U_jj^2.
        count: how many.
    """
    score_K = weight_OK.square().sum(0) * curvature_K
    mask_K = torch.zeros_like(score_K, dtype=torch.bool)
    mask_K[score_K.argsort(dim=0, descending=True, stable=True)[:count]] = True
    return mask_K


def choose_count(weight_OI: Tensor, curvature_I: Tensor, size: int) -> int:
    """Return the number of salient columns a block that loses least, summed over all blocks of a weight.

    The loss of a candidate is sum_ij d_j (w_ij - q_ij)^2 with d = 1 / U_jj^2 and four values mu +- a1 +- a2 a row on
    either side, the cheap stand-in for the two groups that the published code uses too.
    """
    score_I = weight_OI.square().sum(0) * curvature_I
    order_GK = score_I.view(-1, size).argsort(dim=1, descending=True, stable=True)
    order_GK = order_GK + torch.arange(0, weight_OI.shape[1], size, device=order_GK.device)[:, None]
    ranked_OK = weight_OI[:, order_GK.flatten()].view(-1, size)  # rows of all blocks, one below the other
    cost_OK = curvature_I[order_GK].expand(weight_OI.shape[0], -1, -1).reshape(-1, size)
    best, least = 1, float("inf")
    for count in range(1, min(MOST_SALIENT, size // 2) + 1):
        loss = sum(
            float(((part_OK - nearest(part_OK, residual_levels(*residual_scales(part_OK)))).square() * part_cost).sum())
            for part_OK, part_cost in (
                (ranked_OK[:, :count], cost_OK[:, :count]),
                (ranked_OK[:, count:], cost_OK[:, count:]),
            )
        )
        if loss < least:
            best, least = count, loss
        if count - best >= PATIENCE:
            break
    return best


def residual_scales(weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shift [O] and the two scales [2, O], the larger first, of mu +- a1 +- a2; float16 values.

    a1 is the mean deviation from the mean, a2 that of what is left; both means go into the shift.
    """
    mean_O = weight_OK.mean(1)
    centred_OK = weight_OK - mean_O[:, None]
    first_O = centred_OK.abs().mean(1)
    rest_OK = centred_OK - torch.where(centred_OK < 0, -first_O[:, None], first_O[:, None])
    rest_mean_O = rest_OK.mean(1)
    second_O = (rest_OK - rest_mean_O[:, None]).abs().mean(1)
    scales_2O = torch.stack((torch.maximum(first_O, second_O), torch.minimum(first_O, second_O)))
    return round_to_float16(mean_O + rest_mean_O), round_to_float16(scales_2O)


def residual_levels(shift_O: Tensor, scales_2O: Tensor) -> Tensor:
    """Return the four values, ascending, float32 [O, 4]; index = 2 * (first sign is +) + (second sign is +)."""
    large_O, small_O = scales_2O
    levels = (-large_O - small_O, -large_O + small_O, large_O - small_O, large_O + small_O)
    return torch.stack(levels, 1) + shift_O[:, None]


def bell_levels(weight_OK: Tensor, thresholds: int) -> Tensor:
    """Return the four values of the two magnitude groups, ascending, float32 [O, 4] holding float16 values.

    The threshold, one for the whole block, is the best of the quantiles of |w| between a tenth and nine tenths. With m
    and a the mean and the mean deviation of a group of n weights, the error is sum w^2 - sum n (m^2 + a^2).

    Args:
        weight_OK: float32.
        thresholds: how many quantiles are tried.
    """
    magnitude_OK = weight_OK.abs()
    shares = torch.linspace(*GROUP_SHARES, thresholds, device=weight_OK.device)
    best, most = weight_OK.new_zeros(weight_OK.shape[0], 4), -1.0
    for threshold in _quantiles(magnitude_OK, shares):
        large_OK = magnitude_OK >= threshold
        (outer_mean_O, outer_O, outer_gain), (inner_mean_O, inner_O, inner_gain) = (
            _group_scales(weight_OK, group_OK) for group_OK in (large_OK.float(), (~large_OK).float())
        )
        if outer_gain + inner_gain > most:
            most = outer_gain + inner_gain
            levels = (outer_mean_O - outer_O, inner_mean_O - inner_O, inner_mean_O + inner_O, outer_mean_O + outer_O)
            best = torch.stack(levels, 1)
    return round_to_float16(best).sort(1).values


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """Return quantiles of any number of values; torch.quantile stops at 2**24."""
    ordered = values.flatten().sort().values
    return ordered[((ordered.numel() - 1) * shares).round().long()]


def _group_scales(weight_OK: Tensor, group_OK: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return mean [O] and mean deviation [O] of the weights in a group, and the gain sum n (m^2 + a^2)."""
    count_O = group_OK.sum(1)
    divisor_O = count_O.clamp(min=1)
    mean_O = (weight_OK * group_OK).sum(1) / divisor_O
    deviation_O = ((weight_OK - mean_O[:, None]).abs() * group_OK).sum(1) / divisor_O
    return mean_O, deviation_O, float((count_O * (mean_O.square() + deviation_O.square())).sum())


def nearest(values_OK: Tensor, levels_O4: Tensor) -> Tensor:
    """Return the nearest of a row's levels for each value, float32 [O, K]."""
    return levels_O4.gather(1, nearest_level(values_OK, levels_O4))


def nearest_level(values: Tensor, levels_O4: Tensor) -> Tensor:
    """Return the index of the nearest of ascending levels, int64; values float32 [O] or [O, K]."""
    middle_O3 = (levels_O4[:, 1:] + levels_O4[:, :-1]) / 2
    shape = (-1, 1, 3) if values.ndim > 1 else (-1, 3)
    return (values.unsqueeze(-1) > middle_O3.view(shape)).sum(-1)

"""A product of two sign matrices: what nanoquant and dbf share - the rank that bits buy, the projection, the packing.

    W ~= diag(u) U diag(v) V diag(g),     U [O, R], V [R, I] of +1 and -1

Both methods look for A [O, R] and B [R, I] with A B ~= W D in which each factor is near a sign matrix times a rank-one
magnitude; D holds the importance of the inputs, and is divided out of B before the layer is packed.

Sources: DBF, arXiv:2505.11076; NanoQuant, arXiv:2602.06694, section 3. Where we differ: bits are counted with scales
and padding, and ranks are multiples of a word; importance of the inputs only, from the second moments that calibration
records.

Shape suffixes: O = output features, I = input features, R = rank, M and N = sizes of a factor.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.layers import FactorLinear, LayerSpec
from onebit_core.methods.base import Rung
from onebit_core.methods.rank_one import fit_rank_one

RANK_STEP = 32
"""Ranks are multiples of a word, so that the rows of U waste no bits."""

SCALE_BITS = 16
PROJECTION_ITERATIONS = 4
LADDER_BITS = (0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.5, 3.0)
TRIAL_ITERATIONS = 8


def check_bits_of_factors(bits: float) -> None:
    """Refuse bits that no pair of factors is meant for.

    Raises:
        ConfigError: bits outside 0.1 to 4.
    """
    if not 0.1 <= bits <= 4:
        raise ConfigError(f"bits {bits}: 0.1 to 4 are possible")


def rank_of(bits: float, rows: int, columns: int) -> int:
    """Return the largest rank that costs at most `bits` per weight, scales and padding included; 0 if none does."""
    step = RANK_STEP
    words = -(-columns // 32) * 32
    budget = bits * rows * columns - SCALE_BITS * (rows + columns)
    return max(0, int(budget / (rows + words + SCALE_BITS)) // step * step)


def check_rank(config: Any, rows: int, columns: int) -> None:
    """Refuse bits that leave no rank.

    Raises:
        ConfigError: with the shape of the weight.
    """
    if rank_of(config.bits, rows, columns) == 0:
        raise ConfigError(
            f"bits {config.bits}: too few for a {rows} x {columns} weight, whose smallest factors (rank {RANK_STEP}) "
            "and scales take more"
        )


def factor_spec(config: Any, rows: int, columns: int) -> LayerSpec:
    """Return what is stored."""
    rank = max(RANK_STEP, rank_of(config.bits, rows, columns))
    return LayerSpec(format="factor", in_features=columns, out_features=rows, rank=rank)


def factor_ladder(config: Any) -> tuple[Rung, ...]:
    """Return the same settings at other bits; a trial need not converge."""
    steps = [dataclasses.replace(config, bits=bits) for bits in LADDER_BITS]
    return tuple(
        Rung(step, dataclasses.replace(step, iterations=min(step.iterations, TRIAL_ITERATIONS))) for step in steps
    )


def importance_root(statistics: InputStatistics, shrinkage: float) -> Tensor:
    """Return the square root of each input's mean square, relative to the mean of all, float32 [I].

    Args:
        statistics: of the inputs.
        shrinkage: how far the mean squares are pulled to their mean, 0 to 1.
    """
    importance_I = statistics.hessian_II.diagonal()
    mean = importance_I.mean().clamp(min=1e-30)
    return ((1 - shrinkage) * importance_I / mean + shrinkage).clamp(min=1e-6).sqrt()


def project(free_MN: Tensor) -> Tensor:
    """Return the nearest matrix that is a sign matrix times a rank-one magnitude."""
    h_M, g_N = fit_rank_one(free_MN.abs(), iterations=PROJECTION_ITERATIONS)
    return torch.where(free_MN < 0, -1.0, 1.0) * torch.outer(h_M, g_N)


def pack_factors(up_OR: Tensor, down_RI: Tensor, root_I: Tensor, scale: Tensor) -> FactorLinear:
    """Project two free factors and pack them; the layer keeps how far each entry lies from its sign for training.

    Args:
        up_OR: float32.
        down_RI: float32; the product is about weight * root / scale.
        root_I: float32, the importance that the weight was multiplied with.
        scale: the number that it was divided by.
    """
    near_OR, near_RI = project(up_OR), project(down_RI) / root_I
    up_scale_O, up_scale_R = fit_rank_one(near_OR.abs())
    down_scale_R, down_scale_I = fit_rank_one(near_RI.abs())
    balance = up_scale_O.mean().clamp(min=1e-30)
    layer = FactorLinear.from_factors(
        down_RI,
        up_OR,
        scale_in_I=down_scale_I,
        scale_mid_R=up_scale_R * down_scale_R * balance,
        scale_out_O=up_scale_O * (scale / balance),
    )
    layer.start = {
        "up": up_OR / torch.outer(up_scale_O, up_scale_R).clamp(min=1e-12),
        "down": down_RI / root_I / torch.outer(down_scale_R, down_scale_I).clamp(min=1e-12),
    }
    return layer

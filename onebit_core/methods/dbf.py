"""Double binary factorization: a product of two sign matrices, each factor solved by an ADMM of its own.

    W ~= diag(u) U diag(v) V diag(g),     U [O, R], V [R, I] of +1 and -1,     bits = (O + I) * R / (O * I)

One factor is solved while the other stays, turn by turn. With X the fixed factor, its columns normalized, and Y the
weight in the norm that the inputs set, a half turn seeks the B that is a sign matrix times a rank-one magnitude and
for which |X B - Y|^2 is least, by three steps of

    B <- (X^T X + (rho + eps) 1)^-1 (X^T Y + rho (Z - D))        ridge regression, drawn to Z - D
    Z <- sign(B + D) * rank one of |B + D|                       projection
    D <- D + B - Z                                               dual variable, carried from turn to turn

The first step of turn t of T takes rho = min(1, t / (T - 3))^3, the other two take 1: early turns may go anywhere, late
ones must stay near sign matrices. Per second of work this gets further than nanoquant's single steps with a rho that
rises linearly, and like those it is a start, not a result: at one bit a small model needs reconstruction after it.

Source: DBF, arXiv:2505.11076 ("Addition is almost all you need"), the factorization and its importance. Where we
differ: importance of the inputs only, from the second moments of calibration (published: of the outputs as well, from
gradients); bits are true bits, ranks multiples of 32; 40 turns (published: 80 and more); no fine-tuning of the blocks
in between, which is what reconstruction does.

Shape suffixes: O = output features, I = input features, R = rank, M and N = sizes of a factor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import FactorLinear
from onebit_core.methods.base import Method
from onebit_core.methods.factors import (
    check_bits_of_factors,
    check_rank,
    factor_ladder,
    factor_spec,
    importance_root,
    pack_factors,
    project,
)

STEPS = 3
"""Of the ADMM of one half turn."""

FULL_PULL_TURNS = 3
"""The last turns, in which the first step is drawn as strongly as the others."""

RIDGE = 3e-2


@dataclass(frozen=True, kw_only=True)
class DbfConfig(StrictConfig):
    """Settings of dbf.

    Attributes:
        bits: true bits per weight of every layer, scales included; 0.1 to 4.
        iterations: turns, each of which solves both factors.
        seed: of the random start.
    """

    bits: float = 1.0
    iterations: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits_of_factors(self.bits)
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")


class Factor(NamedTuple):
    """One factor: the near sign matrix Z, the dual variable D, and what was projected to get Z."""

    near_RN: Tensor
    dual_RN: Tensor
    free_RN: Tensor


def quantize_dbf(weight_OI: Tensor, statistics: InputStatistics | None, config: DbfConfig) -> FactorLinear:
    """Factorize a weight; float32 [O, I]."""
    assert statistics is not None
    root_I = importance_root(statistics, 0.0)
    rank = factor_spec(config, *weight_OI.shape).rank
    scale = weight_OI.abs().mean().clamp(min=1e-30)
    up_OR, down_RI = factorize_double(weight_OI * root_I / scale, rank, config.iterations, config.seed)
    return pack_factors(up_OR, down_RI, root_I, scale)


def factorize_double(weight_OI: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A [O, R] and B [R, I] whose projections multiply to about the weight.

    Not projected, because how far an entry lies from its sign matters to a training that goes on from there.
    """
    if weight_OI.shape[0] > weight_OI.shape[1]:  # the smaller side first, as published
        down_IR, up_RO = factorize_double(weight_OI.T, rank, iterations, seed)
        return up_RO.T, down_IR.T
    draw = torch.Generator().manual_seed(seed)
    up, down = (_random(rank, size, draw, weight_OI.device) for size in weight_OI.shape)
    for turn in range(iterations):
        pull = min(1.0, turn / max(1, iterations - FULL_PULL_TURNS)) ** 3
        up = _solve(_unit_rows(down.near_RN).T, weight_OI.T, up, pull)
        down = _solve(_unit_rows(up.near_RN).T, weight_OI, down, pull)
    size_R1: Tensor = up.near_RN.norm(dim=1, keepdim=True)
    return (up.free_RN / size_R1.clamp(min=1e-12)).T, down.free_RN


def _random(rank: int, size: int, draw: torch.Generator, device: torch.device) -> Factor:
    near_RN = torch.randn(rank, size, generator=draw).to(device)
    return Factor(near_RN, torch.zeros_like(near_RN), near_RN)


def _unit_rows(matrix_RN: Tensor) -> Tensor:
    norm_R1: Tensor = matrix_RN.norm(dim=1, keepdim=True)
    return matrix_RN / norm_R1.clamp(min=1e-12)


def _solve(basis_MR: Tensor, target_MN: Tensor, factor: Factor, pull: float) -> Factor:
    """Return the factor after some steps towards min |basis @ factor - target|^2 over scaled sign matrices."""
    gram_RR = basis_MR.T @ basis_MR
    gram_RR.diagonal().add_(RIDGE * gram_RR.diagonal().mean() + 1e-12)
    right_RN = basis_MR.T @ target_MN
    near_RN, dual_RN, free_RN = factor
    inverse_RR = _inverse(gram_RR, pull)
    for step in range(STEPS):
        if step == 1:
            pull, inverse_RR = 1.0, _inverse(gram_RR, 1.0)
        free_RN = inverse_RR @ (right_RN + pull * (near_RN - dual_RN)) + dual_RN
        near_RN = project(free_RN)
        dual_RN = free_RN - near_RN
    return Factor(near_RN, dual_RN, free_RN)


def _inverse(gram_RR: Tensor, ridge: float) -> Tensor:
    damped_RR = gram_RR.clone()
    damped_RR.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped_RR))


DBF = Method(
    summary="a product of two sign matrices, each solved by its own ADMM (arXiv:2505.11076); needs reconstruction",
    config=DbfConfig,
    quantize=quantize_dbf,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: config.bits,
    check=check_rank,
    spec=factor_spec,
    ladder=factor_ladder,
)

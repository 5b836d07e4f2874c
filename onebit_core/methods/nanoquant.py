"""A product of two sign matrices at any number of bits, found by alternating directions (ADMM).

    W ~= diag(u) U diag(v) V diag(g),     U [O, R], V [R, I] of +1 and -1,     bits = (O + I) * R / (O * I)

Both factors are at first free matrices A and B with A B ~= W in the norm that the inputs set. ADMM pulls them towards
the matrices that are a sign matrix times a rank-one magnitude: each turn solves two ridge regressions, projects on
that set (`fit_rank_one` of the magnitudes), and carries the difference as a dual variable.

    X = normalize(columns of Z_A):   B <- (X^T X + (rho * s + eps) 1)^-1 (X^T W + rho * s (Z_B - U_B)),   A likewise
    Z_B <- sign * rank one of (B + U_B),     U_B <- U_B + B - Z_B

with s the mean of the Gram matrix' diagonal and rho rising from 0 to 1. On its own this is a start, not a result: at
one bit a small model needs reconstruction after it (docs/methods/nanoquant.md).

Sources: NanoQuant, arXiv:2602.06694, section 3 (LB-ADMM); DBF, arXiv:2505.11076. Where we differ: importance of the
inputs only, from the second moments that calibration records, with shrinkage; a scale between the factors is kept.

Shape suffixes: O = output features, I = input features, R = rank, M and N = sizes of a factor.
"""

from dataclasses import dataclass

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

RIDGE = 3e-2


@dataclass(frozen=True, kw_only=True)
class NanoquantConfig(StrictConfig):
    """Settings of nanoquant.

    Attributes:
        bits: true bits per weight of every layer, scales included; 0.1 to 4.
        iterations: turns of the alternation.
        shrinkage: how far the importance of the inputs is pulled to its mean, 0 to 1.
        seed: of the random start.
    """

    bits: float = 1.0
    iterations: int = 60
    shrinkage: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits_of_factors(self.bits)
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage {self.shrinkage}: 0 keeps the importance of the inputs, 1 ignores it")


def quantize_nanoquant(weight_OI: Tensor, statistics: InputStatistics | None, config: NanoquantConfig) -> FactorLinear:
    """Factorize a weight; float32 [O, I]."""
    assert statistics is not None
    root_I = importance_root(statistics, config.shrinkage)
    rank = factor_spec(config, *weight_OI.shape).rank
    scale = weight_OI.abs().mean().clamp(min=1e-30)
    up_OR, down_RI = factorize(weight_OI * root_I / scale, rank, config.iterations, config.seed)
    return pack_factors(up_OR, down_RI, root_I, scale)


def factorize(weight_OI: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A [O, R] and B [R, I] whose projections multiply to about the weight.

    Not projected, because how far an entry lies from its sign matters to a training that goes on from there.
    """
    if weight_OI.shape[0] < weight_OI.shape[1]:  # the larger side first, as published
        down_IR, up_RO = factorize(weight_OI.T, rank, iterations, seed)
        return up_RO.T, down_IR.T
    draw = torch.Generator().manual_seed(seed)
    free_OR = torch.randn(weight_OI.shape[0], rank, generator=draw).to(weight_OI.device)
    free_RI = torch.randn(rank, weight_OI.shape[1], generator=draw).to(weight_OI.device)
    near_OR, near_RI = project(free_OR), project(free_RI)
    dual_OR, dual_RI = free_OR - near_OR, free_RI - near_RI
    for turn in range(iterations):
        rho = (turn + 1) / iterations
        size_R = near_OR.norm(dim=0).clamp(min=1e-12)
        next_RI = _regress(near_OR / size_R, weight_OI, near_RI - dual_RI, rho)
        next_OR = _regress(_unit_rows(near_RI).T, weight_OI.T, (near_OR - dual_OR).T, rho).T
        free_RI, free_OR = next_RI + dual_RI, next_OR + dual_OR
        near_RI, near_OR = project(free_RI), project(free_OR)
        dual_RI, dual_OR = free_RI - near_RI, free_OR - near_OR
    return free_OR / near_OR.norm(dim=0).clamp(min=1e-12), free_RI


def _unit_rows(matrix_RN: Tensor) -> Tensor:
    norm_R1: Tensor = matrix_RN.norm(dim=1, keepdim=True)
    return matrix_RN / norm_R1.clamp(min=1e-12)


def _regress(basis_MR: Tensor, target_MN: Tensor, near_RN: Tensor, rho: float) -> Tensor:
    """Solve min |basis @ X - target|^2 + rho * s |X - near|^2 for X [R, N]."""
    gram_RR = basis_MR.T @ basis_MR
    weight = rho * gram_RR.diagonal().mean()
    right_RN = basis_MR.T @ target_MN + weight * near_RN
    gram_RR.diagonal().add_(weight + RIDGE)
    return torch.cholesky_solve(right_RN, torch.linalg.cholesky(gram_RR))


NANOQUANT = Method(
    summary="a product of two sign matrices at any number of bits (arXiv:2602.06694); needs reconstruction",
    config=NanoquantConfig,
    quantize=quantize_nanoquant,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: config.bits,
    check=check_rank,
    spec=factor_spec,
    ladder=factor_ladder,
)

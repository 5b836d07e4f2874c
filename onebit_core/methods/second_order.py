"""Error feedback: the column sweep shared by gptq and pb_llm.

Quantizing column j of W leaves an error; the columns not yet quantized can absorb it where the inputs are correlated:

    U = chol(H^-1), upper:   e = (w_j - q_j) / U_jj,    w_k -= e * U_jk   for k > j

Source: GPTQ, arXiv:2210.17323, section 3.3 (steps 1 to 3). Where we differ: a Cholesky that fails is tried again with
ten times the damping, and at last H is replaced by its diagonal, which is plain rounding; columns whose inputs were
always zero keep their weights in place of being cleared.

Shape suffixes: O = output features, I = input features; J marks the transposed sweep [I, O], whose rows are contiguous.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SWEEP_BLOCK = 128
"""Columns whose feedback is applied at once to the rest of the matrix."""

DAMPING_TRIES = 5


def inverse_factor(hessian_II: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular float32 [I, I], with U^T U = (H + damping * mean(diag H) * 1)^-1.

    Args:
        hessian_II: float32, symmetric; not modified.
        damping: relative to the mean of the diagonal; multiplied by ten after each failed factorization.
    """
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean()
    mean = torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)  # a dead layer: as with white inputs
    base_II = hessian_II.clone()
    base_II.diagonal()[diagonal_I == 0] = mean
    for attempt in range(DAMPING_TRIES):
        damped_II = base_II.clone()
        damped_II.diagonal().add_(damping * 10**attempt * mean)
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        del damped_II  # of a wide layer each copy is gigabytes
        if failed or not torch.isfinite(factor_II).all():
            continue
        upper_II: Tensor
        inverse_II = torch.cholesky_inverse(factor_II)
        del factor_II
        upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
        del inverse_II
        if not failed and torch.isfinite(upper_II).all():
            return upper_II
    return torch.diag((base_II.diagonal().abs() + damping * mean).rsqrt())


def sweep(
    weight_OI: Tensor,
    factor_II: Tensor,
    quantize_column: Callable[[int, Tensor, Tensor], Tensor],
    block_size: int = SWEEP_BLOCK,
) -> Tensor:
    """Quantize column by column, moving each column's error into the columns after it.

    Args:
        weight_OI: float32; not modified.
        factor_II: U of `inverse_factor`.
        quantize_column: (column, current values float32 [O], current matrix [I, O]) to the values decided, float32 [O].
            The matrix is the sweep's working copy, read-only, with all feedback so far applied to this block.
        block_size: columns per lazy update.

    Returns:
        The decided weight, float32 [O, I].
    """
    work_IO = weight_OI.T.contiguous()
    decided_IO = torch.empty_like(work_IO)
    in_features = work_IO.shape[0]
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        error_JO = torch.empty_like(work_IO[start:end])
        for column in range(start, end):
            current_O = work_IO[column]
            decided_O = quantize_column(column, current_O, work_IO)
            decided_IO[column] = decided_O
            error_O = (current_O - decided_O) / factor_II[column, column]
            work_IO[column + 1 : end].addr_(factor_II[column, column + 1 : end], error_O, alpha=-1)
            error_JO[column - start] = error_O
        work_IO[end:].addmm_(factor_II[start:end, end:].T, error_JO, alpha=-1)
    return decided_IO.T.contiguous()


def output_error(weight_OI: Tensor, decided_OI: Tensor, hessian_II: Tensor) -> float:
    """Return the squared relative output error tr(E H E^T) / tr(W H W^T), E = W - decided."""
    difference_OI = weight_OI - decided_OI
    reference = ((weight_OI @ hessian_II) * weight_OI).sum()
    return float(((difference_OI @ hessian_II) * difference_OI).sum() / reference.clamp(min=1e-30))


def weight_error(weight_OI: Tensor, decided_OI: Tensor) -> float:
    """Return the squared relative Frobenius error |W - decided|^2 / |W|^2."""
    return float((weight_OI - decided_OI).square().sum() / weight_OI.square().sum().clamp(min=1e-30))

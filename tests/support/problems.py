"""Weights and input statistics to quantize, of the kinds that tell methods apart."""

import torch

from onebit_core.calibration.statistics import InputStatistics


def correlated_problem(
    rows: int = 48, columns: int = 256, seed: int = 0, *, uneven: float = 0.0
) -> tuple[torch.Tensor, InputStatistics]:
    """A Gaussian weight, and correlated inputs of unequal size with a power-law spectrum.

    Args:
        rows: output features.
        columns: input features.
        seed: of everything.
        uneven: standard deviation of the logarithm of row and column scales of the weight.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = draw(rows, columns) * 0.02
    weight = weight * (uneven * draw(rows, 1)).exp() * (uneven * draw(1, columns)).exp()
    basis, _ = torch.linalg.qr(draw(columns, columns))
    hessian = (basis * torch.arange(1, columns + 1).float() ** -1.0) @ basis.T
    sizes = (0.7 * draw(columns)).exp()
    hessian = hessian * sizes[:, None] * sizes
    return weight, InputStatistics(hessian_II=(hessian + hessian.T) / 2, num_tokens=1000)

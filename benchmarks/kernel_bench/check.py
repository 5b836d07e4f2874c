"""A wrong kernel is not fast: everything is compared with the float64 product before it is timed.

The comparison is against the largest output, because outputs near zero are sums of large terms that cancel; and for
every row and token, because a wrong tail hides in an average.

Shape suffixes: T = tokens, O = output features, I = input features, R = rows compared.
"""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 1.2e-2}
"""Largest error over largest output, by the dtype of x: rounding of the result, and 14-bit activations for float32."""

OWN_GRID_TOLERANCE = 0.7
"""For a rival that rounds the dense weight to a grid of its own; only finds what is broken."""

MAX_WORK = 2**35
"""Products of the float64 check above which a sample of rows is compared."""

SAMPLED_ROWS = 2048
CHUNK_ROWS = 1024


def compared_rows(rows: int, columns: int, tokens: int) -> Tensor:
    """Return the rows to compare: all, or for large products a sample with both ends."""
    if rows * columns * tokens <= MAX_WORK or rows <= SAMPLED_ROWS:
        return torch.arange(rows)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randperm(rows, generator=generator)[:SAMPLED_ROWS]
    ends = torch.cat((torch.arange(64), torch.arange(rows - 64, rows)))
    together: Tensor = torch.cat((sample, ends)).unique()
    return together


def exact_product(weight_OI: Tensor, x_TI: Tensor, rows_R: Tensor) -> Tensor:
    """Return float64 [T, R]: the product with some rows of a dense weight."""
    x = x_TI.double()
    chunks = torch.split(rows_R.to(weight_OI.device), CHUNK_ROWS)
    return torch.cat([x @ weight_OI[chunk].double().T for chunk in chunks], -1)


def largest_error(got_TO: Tensor, exact_TR: Tensor, rows_R: Tensor) -> float:
    """Return the largest difference over the largest exact output; infinite for a wrong shape or a NaN."""
    if got_TO.ndim != 2 or got_TO.shape[0] != exact_TR.shape[0]:
        return float("inf")
    got_TR = got_TO[:, rows_R.to(got_TO.device)].double()
    error = (got_TR - exact_TR).abs().max() / exact_TR.abs().max()
    return float("inf") if error.isnan() else float(error)

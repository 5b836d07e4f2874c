"""What calibration records about the input of a linear: its second moments.

    H = sum_t w_t x_t x_t^T / sum_t w_t          (the Hessian of the layer's squared output error, up to a factor)

Source: GPTQ, arXiv:2210.17323, section 3. We differ in the weights w_t: the first token of a sequence is the attention
sink. Every later token reads it, but it is one of a thousand rows of H, so an error feedback moves the error into its
direction for free and the whole sequence receives it through the values. Weighting it up (default 64 for the inputs of
attention) repairs that.

Shape suffixes: S = samples, T = tokens of a sample, I = input features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Second moments of a layer's input.

    Attributes:
        hessian_II: float32, symmetric, positive semi-definite.
        num_tokens: how many rows it is the mean of.
    """

    hessian_II: Tensor
    num_tokens: int


class StatisticsAccumulator:
    """Sums second moments over batches; float32 sums, products in bfloat16 precision where the CPU has it."""

    def __init__(
        self, in_features: int, *, first_token_weight: float = 1.0, device: str | torch.device = "cpu"
    ) -> None:
        self._sum_II = torch.zeros(in_features, in_features, device=device)
        self._total_weight = 0.0
        self._num_tokens = 0
        self._first_token_weight = first_token_weight

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add a batch of inputs.

        Args:
            x: floating [S, T, I], whose position 0 of every sample is a first token, or [N, I]: tokens picked out of
                samples, none of them a first one, and maybe none at all.
        """
        rows_RI = x.float().reshape(-1, x.shape[-1])
        weight = float(len(rows_RI))
        if x.ndim == 3 and self._first_token_weight != 1:
            rows = x.float().clone()
            rows[:, 0] *= self._first_token_weight**0.5
            rows_RI = rows.flatten(0, 1)
            weight += len(x) * (self._first_token_weight - 1)
        with fast_float32_products():
            self._sum_II.addmm_(rows_RI.T, rows_RI)
        self._total_weight += weight
        self._num_tokens += len(rows_RI)

    def finish(self) -> InputStatistics:
        """Return the statistics of everything added."""
        return InputStatistics(
            hessian_II=self._sum_II / max(self._total_weight, 1.0),
            num_tokens=self._num_tokens,
        )


class fast_float32_products:  # noqa: N801  (used as a keyword, like torch.no_grad)
    """Within this context the CPU may multiply float32 matrices with bfloat16 inputs and float32 sums.

    On a CPU with AMX this is several times faster; elsewhere it changes nothing. The previous setting returns on exit.
    """

    def __enter__(self) -> None:
        self._previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if not torch.cuda.is_available() else self._previous)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self._previous)

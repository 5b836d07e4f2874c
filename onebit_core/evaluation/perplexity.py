"""Perplexity with a standard error.

    perplexity = exp(m),   m = mean negative log-likelihood of the predicted tokens, in nats

Tokens of a window are correlated, windows nearly are not; so the error is taken over windows. With the window
means m_1 .. m_W (all windows have equal length, so m is their mean) and s their standard deviation, the delta
method gives

    standard error of m           s / sqrt(W)
    standard error of perplexity  exp(m) * s / sqrt(W)

One window alone says nothing about windows; its tokens are then taken as independent, which is too optimistic.

The error is that of the text sample: two models on the same windows differ much more significantly than their
errors suggest, because hard windows are hard for both.

Shape suffixes: W = windows, T = predicted tokens of a window, V = vocabulary.
"""

import math

from torch import Tensor

from onebit_core.artifact.manifest import Perplexity

LARGEST_EXPONENT = 300.0
"""A model can be bad enough for exp to overflow; e^300 is reported instead, which is as bad."""


def token_loss(log_probability_TV: Tensor, target_T: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, in nats, shape [T].

    Args:
        log_probability_TV: float32 log-probabilities.
        target_T: int64 token ids that really followed.
    """
    return -log_probability_TV.gather(-1, target_T[:, None]).squeeze(-1)


def mean_and_error(values_WT: Tensor) -> tuple[float, float]:
    """Return the mean of a per-token figure and its standard error over windows (over tokens, of a single one)."""
    values_WT = values_WT.double()
    samples = values_WT.mean(dim=1) if len(values_WT) > 1 else values_WT.flatten()
    error = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else 0.0
    return values_WT.mean().item(), error


def perplexity(loss_WT: Tensor) -> Perplexity:
    """Return the perplexity of token losses in nats."""
    mean, error = mean_and_error(loss_WT)
    value = math.exp(min(mean, LARGEST_EXPONENT))
    return Perplexity(value=value, standard_error=value * error)

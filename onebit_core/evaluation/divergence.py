"""How far a compressed model's predictions are from its original's, whatever the text says.

Perplexity asks whether the model still predicts the text; divergence asks whether it is still the same model.
Errors that cancel in perplexity do not cancel here, so it is the finer instrument (llama.cpp's quantizations are
compared the same way). Per predicted token, with p the original's and q the compressed model's distribution:

    KL(p || q) = sum_v p_v (log p_v - log q_v)      in nats, >= 0, and 0 only if they are equal
    top-1 agreement = 1 if both rank the same token first, else 0

Both models are run in the same precision, and rounding makes a noise floor: about 1e-3 nats in bfloat16.

Shape suffixes: W = windows, T = predicted tokens of a window, V = vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from onebit_core.evaluation.perplexity import mean_and_error


@dataclass(frozen=True, kw_only=True)
class DivergenceSummary:
    """KL divergence over the tokens of a text, in nats; `standard_error` is that of the mean, over windows."""

    mean: float
    standard_error: float
    median: float
    p99: float
    max: float


def token_divergence(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """Return KL(p || q) of each token in nats, shape [T].

    Args:
        log_p_TV: float32 log-probabilities of the original.
        log_q_TV: the same of the compressed model.
    """
    divergence_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    return divergence_T.clamp_min(0.0)  # rounding can leave a tiny negative sum; NaN stays NaN


def token_agreement(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """Return, per token, whether both distributions rank the same token first, bool [T]."""
    return log_p_TV.argmax(-1) == log_q_TV.argmax(-1)


def summarize_divergence(divergence_WT: Tensor) -> DivergenceSummary:
    """Summarize per-token divergences over windows."""
    mean, error = mean_and_error(divergence_WT)
    median, p99, largest = np.quantile(divergence_WT.double().numpy(), [0.5, 0.99, 1.0])
    return DivergenceSummary(mean=mean, standard_error=error, median=float(median), p99=float(p99), max=float(largest))

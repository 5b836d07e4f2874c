"""Whether an artifact keeps to what its job asked for.

Bits are counted before anything is evaluated, so a job that is too large ends early:

    bits = 8 * bytes of all tensors / weights of the original

KL divergence and top-1 agreement are those of the evaluation, and every text must keep to them: an average over texts
would let an easy one hide a hard one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.jobs.types import Limits


def broken_by_size(limits: Limits, whole_model_bits: float) -> str | None:
    """Say in one sentence that the artifact is too large; None if it is not."""
    if limits.max_bits is not None and whole_model_bits > limits.max_bits:
        return f"it has {whole_model_bits:.4g} bits per weight over the whole model; max_bits is {limits.max_bits:g}"
    return None


def broken_by_loss(limits: Limits, evaluation: Sequence[Mapping[str, Any]]) -> str | None:
    """Say in one sentence on which text the artifact lost too much; None if it did not.

    Args:
        limits: what was asked for.
        evaluation: EvaluationResult of each text, as plain values.
    """
    for result in evaluation:
        text, kl, top1 = result["dataset"], float(result["kl_mean"]), float(result["top1_agreement"])
        # Written so that NaN breaks a limit.
        if limits.max_kl is not None and not kl <= limits.max_kl:
            return f"its mean KL divergence on {text} is {kl:.4g} nats; max_kl is {limits.max_kl:g}"
        if limits.min_top1 is not None and not top1 >= limits.min_top1:
            return f"its top-1 agreement on {text} is {top1:.4g}; min_top1 is {limits.min_top1:g}"
    return None

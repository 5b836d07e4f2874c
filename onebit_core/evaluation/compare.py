"""Compare any number of compressed models with their original on one text, in one pass.

    for each window:
        the original and every candidate run once over the window
        for each slice of positions:
            the original's log-probabilities are computed once, and every candidate is held against them

Sharing the original's half of the work is what makes it cheap to measure a dozen settings of a method together.
Forward passes run in the models' own dtype; log-softmax and everything after it in float32, sums over tokens in
float64.

Shape suffixes: W = windows, T = positions of a window, V = vocabulary.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from onebit_core.artifact.manifest import EvaluationResult
from onebit_core.artifact.writer import current_versions, utc_now
from onebit_core.errors import EvaluationError
from onebit_core.evaluation.divergence import summarize_divergence, token_agreement, token_divergence
from onebit_core.evaluation.logits import LogitsReader
from onebit_core.evaluation.perplexity import mean_and_error, perplexity, token_loss
from onebit_core.evaluation.windows import TokenWindows
from onebit_core.progress import Watch

POSITIONS_PER_SLICE = 64
"""Small enough for log-probabilities to stay near the caches: 512 took twice as long on two cores."""

ORIGINAL = "the original"


@dataclass(kw_only=True)
class TokenScores:
    """Per-token figures of one candidate, one tensor [T - 1] a window."""

    loss: list[Tensor] = field(default_factory=list)
    divergence: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)


def evaluate_models(
    original: PreTrainedModel,
    candidates: Mapping[str, PreTrainedModel],
    windows: TokenWindows,
    watch: Watch | None = None,
    *,
    positions_per_slice: int = POSITIONS_PER_SLICE,
) -> dict[str, EvaluationResult]:
    """Measure every candidate against the original.

    Args:
        original: the uncompressed model, in evaluation mode.
        candidates: compressed models by name, on the same device.
        windows: the text.
        watch: told after every window, in stage `evaluate`.
        positions_per_slice: how many positions' log-probabilities are in memory at once.

    Returns:
        One result a candidate, in the same order.

    Raises:
        EvaluationError: a window exceeds a model's context, vocabularies differ, or logits are not finite.
        Cancelled: between two windows or models.
    """
    watch = watch or Watch()
    for name, model in {ORIGINAL: original, **candidates}.items():
        _check_fits(name, model, windows)
    readers = {name: LogitsReader(model, windows.tokens_WT[0]) for name, model in candidates.items()}
    original_reader = LogitsReader(original, windows.tokens_WT[0])
    original_loss: list[Tensor] = []
    scores = {name: TokenScores() for name in candidates}
    slices = _slices(windows.tokens_WT.shape[1] - 1, positions_per_slice)
    total = len(windows.tokens_WT)
    watch.report("evaluate", 0, total, dataset=windows.name)
    for index, tokens_T in enumerate(windows.tokens_WT):
        for reader in (original_reader, *readers.values()):
            reader.start(tokens_T)
            watch.cancel.raise_if_cancelled()
        original_loss.append(_score_window(original_reader, readers, tokens_T, slices, scores))
        _check_finite(windows.name, index, original_loss[-1], scores)
        so_far = {name: perplexity(torch.stack(score.loss)).value for name, score in scores.items()}
        shown = {"original": perplexity(torch.stack(original_loss)).value, **so_far}
        watch.report("evaluate", index + 1, total, dataset=windows.name, **_few(shown))
    loss_WT = torch.stack(original_loss)
    return {name: _result(windows, loss_WT, scores[name], original) for name in candidates}


@torch.inference_mode()
def _score_window(
    original: LogitsReader,
    candidates: Mapping[str, LogitsReader],
    tokens_T: Tensor,
    slices: Sequence[tuple[int, int]],
    scores: Mapping[str, TokenScores],
) -> Tensor:
    """Add one window to every candidate's scores and return the original's token losses [T - 1]."""
    original_loss: list[Tensor] = []
    parts = {name: TokenScores() for name in candidates}
    for start, stop in slices:
        log_p_TV = F.log_softmax(original.read(start, stop), dim=-1)
        target_T = tokens_T[start + 1 : stop + 1].to(log_p_TV.device)
        original_loss.append(token_loss(log_p_TV, target_T))
        for name, reader in candidates.items():
            log_q_TV = F.log_softmax(reader.read(start, stop), dim=-1)
            if log_q_TV.shape != log_p_TV.shape:
                raise EvaluationError(
                    f"{name} has a vocabulary of {log_q_TV.shape[-1]}, the original one of {log_p_TV.shape[-1]}; "
                    "they are not the same model"
                )
            parts[name].loss.append(token_loss(log_q_TV, target_T))
            parts[name].divergence.append(token_divergence(log_p_TV, log_q_TV))
            parts[name].agreement.append(token_agreement(log_p_TV, log_q_TV))
    for name, part in parts.items():
        scores[name].loss.append(torch.cat(part.loss).cpu())
        scores[name].divergence.append(torch.cat(part.divergence).cpu())
        scores[name].agreement.append(torch.cat(part.agreement).cpu())
    return torch.cat(original_loss).cpu()


def _slices(positions: int, length: int) -> list[tuple[int, int]]:
    """Cut 0..positions into slices of a length, the last one shorter."""
    return [(start, min(start + length, positions)) for start in range(0, positions, length)]


def _few(perplexities: Mapping[str, float]) -> dict[str, float]:
    """Keep what fits on a line: the original and one candidate; of many candidates, only the original."""
    names = list(perplexities)
    if len(names) == 2:
        return {"original": perplexities[names[0]], "compressed": perplexities[names[1]]}
    return {"original": perplexities[names[0]]}


def _check_fits(name: str, model: PreTrainedModel, windows: TokenWindows) -> None:
    """Refuse windows longer than the context the model was made for, or ids it has no embedding for."""
    context = getattr(model.config, "max_position_embeddings", None)
    length = windows.tokens_WT.shape[1]
    if context is not None and length > context:
        raise EvaluationError(
            f"text {windows.name}: a window of {length} tokens is longer than the context of {name}, {context} tokens"
        )
    vocabulary = model.config.vocab_size
    largest = int(windows.tokens_WT.max())
    if largest >= vocabulary:
        raise EvaluationError(
            f"text {windows.name}: token id {largest} is outside the vocabulary of {name}, {vocabulary} tokens"
        )


def _check_finite(text: str, window: int, loss_T: Tensor, scores: Mapping[str, TokenScores]) -> None:
    """Refuse figures made of infinite or NaN logits, naming the window they appeared in."""
    figures: dict[str, tuple[Tensor, ...]] = {ORIGINAL: (loss_T,)}
    figures |= {name: (score.loss[-1], score.divergence[-1]) for name, score in scores.items()}
    for name, tensors in figures.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise EvaluationError(f"text {text}: logits of {name} are not finite in window {window}")


def _result(
    windows: TokenWindows, original_loss_WT: Tensor, scores: TokenScores, original: PreTrainedModel
) -> EvaluationResult:
    """Summarize one candidate."""
    divergence = summarize_divergence(torch.stack(scores.divergence))
    agreement, agreement_error = mean_and_error(torch.stack(scores.agreement))
    return EvaluationResult(
        dataset=windows.name,
        fingerprint=windows.fingerprint,
        windows=windows.tokens_WT.shape[0],
        window_tokens=windows.tokens_WT.shape[1],
        tokens=original_loss_WT.numel(),
        original=perplexity(original_loss_WT),
        compressed=perplexity(torch.stack(scores.loss)),
        kl_mean=divergence.mean,
        kl_standard_error=divergence.standard_error,
        kl_median=divergence.median,
        kl_p99=divergence.p99,
        kl_max=divergence.max,
        top1_agreement=agreement,
        top1_standard_error=agreement_error,
        device=describe_device(original.device),
        dtype=str(original.dtype).removeprefix("torch."),
        date=utc_now(),
        versions=current_versions(),
    )


def describe_device(device: torch.device) -> str:
    """Name the hardware: the GPU's name, or `cpu` with its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"

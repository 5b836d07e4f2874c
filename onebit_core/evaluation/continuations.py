"""How likely a model finds a continuation after a context: what multiple-choice questions are scored by.

    log p(continuation | context) = sum_i log p(c_i | context, c_1 .. c_i-1)

Sequences are sorted by length and run side by side, filled up at the end. The head is applied only where a token of a
continuation is predicted, some positions at a time (see logits.py), so logits stay small whatever the batch is.

Shape suffixes: B = sequences, T = positions, N = predicted tokens, V = vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from onebit_core.errors import EvaluationError
from onebit_core.evaluation.logits import LogitsReader
from onebit_core.model.head import PROBE_TOKENS

POSITIONS_PER_BATCH = 4096
POSITIONS_PER_SLICE = 64
CONTEXT_IF_UNSAID = 2048

WITH_WHOLE_LOGITS = 512
"""Positions in a batch of a model whose logits cannot be had position by position."""

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of its continuation, at least one."""


class ContinuationScorer:
    """Scores continuations with one causal language model."""

    def __init__(self, model: PreTrainedModel, positions_per_batch: int = POSITIONS_PER_BATCH) -> None:
        """Find out how the model makes logits.

        Args:
            model: in evaluation mode.
            positions_per_batch: sequences times the longest of them, at most (but one sequence always runs).
        """
        self._reader = LogitsReader(model, torch.arange(PROBE_TOKENS))
        self._context: int = getattr(model.config, "max_position_embeddings", None) or CONTEXT_IF_UNSAID
        fewer = WITH_WHOLE_LOGITS if self._reader.keeps_logits else positions_per_batch
        self._positions_per_batch = min(positions_per_batch, fewer)

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return, per pair, the log-likelihood in nats and whether greedy decoding would write the continuation.

        Of a pair longer than the model's context the beginning is left out, as lm-eval does.

        Raises:
            EvaluationError: a continuation alone is longer than the context, or logits are not finite.
        """
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for batch in self._batches(pairs):
            for index, score in zip(batch, self._score_batch([pairs[index] for index in batch]), strict=True):
                scores[index] = score
        return scores

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Cut the indices into batches, the longest first, so that too large a batch fails at once."""
        lengths = [min(len(context) + len(continuation) - 1, self._context) for context, continuation in pairs]
        order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
        while order:
            size = max(1, self._positions_per_batch // lengths[order[0]])
            yield order[:size]
            order = order[size:]

    @torch.inference_mode()
    def _score_batch(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        """Score pairs side by side."""
        counts = [len(continuation) for _, continuation in pairs]
        if max(counts) > self._context:
            raise EvaluationError(f"a choice of {max(counts)} tokens does not fit into a context of {self._context}")
        sequences = [[*context, *continuation][-(self._context + 1) :] for context, continuation in pairs]
        length = max(map(len, sequences)) - 1
        tokens_BT = torch.zeros(len(pairs), length, dtype=torch.int64)
        positions: list[int] = []
        for row, (tokens, count) in enumerate(zip(sequences, counts, strict=True)):
            tokens_BT[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            end = row * length + len(tokens) - 1
            positions.extend(range(end - count, end))
        self._reader.start_batch(tokens_BT)
        target_N = torch.tensor([token for _, continuation in pairs for token in continuation])
        return iter(self._sums(torch.tensor(positions), target_N, counts))

    def _sums(self, positions_N: Tensor, target_N: Tensor, counts: Sequence[int]) -> list[tuple[float, bool]]:
        """Add up the log-probabilities of each continuation's tokens."""
        logs, firsts = [], []
        slices = zip(positions_N.split(POSITIONS_PER_SLICE), target_N.split(POSITIONS_PER_SLICE), strict=True)
        for position_N, wanted_N in slices:
            log_p_NV = F.log_softmax(self._reader.read_at(position_N), dim=-1)
            wanted_on_device_N = wanted_N.to(log_p_NV.device)
            logs.append(log_p_NV.gather(-1, wanted_on_device_N[:, None]).squeeze(-1).cpu())
            firsts.append((log_p_NV.argmax(-1) == wanted_on_device_N).cpu())
        log_N, first_N = torch.cat(logs).double(), torch.cat(firsts)
        if not bool(log_N.isfinite().all()):
            raise EvaluationError("logits are not finite; the model is broken")
        return [
            (one.sum().item(), bool(greedy.all()))
            for one, greedy in zip(log_N.split(list(counts)), first_N.split(list(counts)), strict=True)
        ]

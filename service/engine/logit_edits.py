"""What changes a row's logits before its token is chosen, in the order of `SamplingParams`.

    forbidden    allowed_bits (a grammar), then forbidden (min_tokens): -inf
    penalties    l > 0: l / repetition, else l * repetition      of tokens in prompt or completion
                 l - frequency * times - presence                of tokens in the completion
    bias         l + bias

Penalties, bias and forbidden tokens are lists of (row, token), so a step's edits cost what they touch, whatever the
vocabulary. Repetition: arXiv:1909.05858, section 4.1.

Legend: R rows, V vocabulary, W words of 32 bits, N edits of all rows.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD_BITS = 32


class TokenCounts:
    """The different tokens of one sequence, and how often each was generated; grows by one token at a time.

    Attributes:
        ids: the different tokens, in order of their first appearance.
        times: how often each was generated; 0 for those of the prompt alone.
    """

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt_token_ids))
        self.times = array("d", [0.0]) * len(self.ids)
        self._place = {token_id: place for place, token_id in enumerate(self.ids)}

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        place = self._place.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.times.append(0.0)
        self.times[place] += 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LogitEdits:
    """What changes one row's logits.

    Attributes:
        allowed_bits: int32 words; bit i of word w allows token 32 * w + i. None allows all.
        forbidden: tokens that are not drawn.
        counts: of the sequence's tokens; None without penalties.
        repetition: divides positive and multiplies negative logits.
        frequency: subtracted for every time a token was generated.
        presence: subtracted once from those that were generated.
        bias: tokens and what is added to each.
    """

    allowed_bits: Tensor | None = None
    forbidden: tuple[int, ...] = ()
    counts: TokenCounts | None = None
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()


def edited_logits(logits_RV: Tensor, edits: ListOf[LogitEdits]) -> Tensor:
    """Return the logits after each row's edits, as a float32 copy.

    Args:
        logits_RV: any floating dtype; not changed.
        edits: one per row.
    """
    logits_RV = logits_RV.to(torch.float32, copy=True)
    _allow(logits_RV, edits)
    forbidden = [np.array(edit.forbidden, dtype=np.int64) for edit in edits]
    if any(map(len, forbidden)):
        logits_RV[_places(forbidden, logits_RV.device)] = -torch.inf
    _penalize(logits_RV, edits)
    biased = [np.array([token_id for token_id, _ in edit.bias], dtype=np.int64) for edit in edits]
    if any(map(len, biased)):
        values_N = [value for edit in edits for _, value in edit.bias]
        places = _places(biased, logits_RV.device)
        logits_RV[places] += torch.tensor(values_N, dtype=torch.float32, device=logits_RV.device)
    return logits_RV


def _allow(logits_RV: Tensor, edits: ListOf[LogitEdits]) -> None:
    """Forbid what the rows' grammars do not allow; the bits are unpacked where the logits are."""
    rows = [row for row, edit in enumerate(edits) if edit.allowed_bits is not None]
    if not rows:
        return
    device = logits_RV.device
    words_RW = torch.stack([edit.allowed_bits for edit in edits if edit.allowed_bits is not None]).to(device)
    bits_RV = (words_RW[..., None] >> torch.arange(WORD_BITS, dtype=torch.int32, device=device)) & 1
    allowed_RV = bits_RV.flatten(1)[:, : logits_RV.shape[-1]].bool()
    logits_RV[rows] = torch.where(allowed_RV, logits_RV[rows], -torch.inf)


def _penalize(logits_RV: Tensor, edits: ListOf[LogitEdits]) -> None:
    """Move the logits of tokens that the sequences hold already."""
    counts = [edit.counts for edit in edits]
    ids = [np.frombuffer(count.ids, np.int64) if count and count.ids else np.empty(0, np.int64) for count in counts]
    if not any(map(len, ids)):
        return
    device = logits_RV.device
    places = _places(ids, device)
    times_N = np.concatenate([np.frombuffer(count.times, np.float64) for count in counts if count and count.ids])
    factors = np.array([(edit.repetition, edit.frequency, edit.presence) for edit in edits])
    repetition_N, frequency_N, presence_N = np.repeat(factors, [len(each) for each in ids], axis=0).T
    less_N = _on(frequency_N * times_N + presence_N * (times_N > 0), device)
    divisor_N = _on(repetition_N, device)
    logits_N = logits_RV[places]
    logits_RV[places] = torch.where(logits_N > 0, logits_N / divisor_N, logits_N * divisor_N) - less_N


def _places(ids: list[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and tokens of all rows' lists, as an index into the logits."""
    rows_N = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
    return torch.from_numpy(rows_N).to(device), torch.from_numpy(np.concatenate(ids)).to(device)


def _on(numbers_N: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(numbers_N.astype(np.float32)).to(device)

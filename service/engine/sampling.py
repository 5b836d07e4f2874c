"""From logits to tokens, for all rows of a step in one tensor program.

    temperature 0    the largest logit
    otherwise        p = softmax(logits / temperature), cut to the fewest tokens that reach top_p, drawn by inverse
                     transform: the first token whose cumulative probability exceeds u times the kept mass

`u` is one number in [0, 1) per token, a hash of the sequence's seed and the count of tokens it has drawn. So a draw
depends on nothing else: not on the batch, not on preemption, not on the step, and no generator state is kept.

A row that is not finite (NaN anywhere, or +inf) draws nothing and does not disturb its neighbours.

Legend: R rows, V vocabulary, N most probable tokens.
"""

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

SHORT_LISTS = (512, 8192)  # most nuclei are smaller, and finding 512 is ten times cheaper than sorting a vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How one row is drawn: temperature at least 0, top_p and uniform in 0..1."""

    temperature: float
    top_p: float
    uniform: float


def uniform_number(seed: int, index: int) -> float:
    """Return a number in [0, 1), equal for equal (seed, index) and independent otherwise; 53 random bits."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_RV: Tensor, draws: ListOf[Draw]) -> list[int | None]:
    """Draw one token per row; None for a row that is not finite.

    Args:
        logits_RV: any floating dtype.
        draws: one per row.
    """
    largest_R, token_R = logits_RV.max(dim=-1)  # a NaN anywhere in the row comes out as the largest
    finite_R = largest_R.isfinite()
    hot = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if hot:
        rows = torch.tensor(hot, device=logits_RV.device)
        token_R = token_R.index_copy(0, rows, _draw(logits_RV[rows], [draws[row] for row in hot]))
    results = torch.where(finite_R, token_R, -1).tolist()
    return [None if token < 0 else token for token in results]


def _draw(logits_RV: Tensor, draws: ListOf[Draw]) -> Tensor:
    """Draw from rows that all have a temperature; a row that is not finite draws something meaningless."""
    device = logits_RV.device
    numbers = [(draw.temperature, draw.top_p, draw.uniform) for draw in draws]
    temperature_R, top_p_R, uniform_R = torch.tensor(numbers, dtype=torch.float64, device=device).T
    logits_RV = logits_RV.float()
    logits_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)  # so that a tiny temperature cannot overflow
    p_RV = torch.softmax(logits_RV / temperature_R[:, None].float().clamp(min=1e-6), dim=-1).nan_to_num_()
    whole = [row for row, draw in enumerate(draws) if draw.top_p >= 1]
    nucleus = [row for row, draw in enumerate(draws) if draw.top_p < 1]
    token_R = torch.empty(len(draws), dtype=torch.int64, device=device)
    if whole:
        rows = torch.tensor(whole, device=device)
        cumulative_RV = p_RV[rows].double().cumsum(dim=-1)
        token_R[rows] = _invert(cumulative_RV, cumulative_RV[:, -1], uniform_R[rows])
    if nucleus:
        rows = torch.tensor(nucleus, device=device)
        token_R[rows] = _draw_nucleus(p_RV[rows], top_p_R[rows], uniform_R[rows])
    return token_R


def _draw_nucleus(p_RV: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
    """Draw from the most probable tokens, looking at more of them only where fewer do not reach top_p."""
    token_R = torch.empty_like(top_p_R, dtype=torch.int64)
    vocabulary = p_RV.shape[-1]
    rest_R = torch.arange(len(p_RV), device=p_RV.device)
    for length in (*(length for length in SHORT_LISTS if length < vocabulary), vocabulary):
        p_RN, ids_RN = p_RV[rest_R].topk(length, dim=-1)
        enough_R = p_RN.sum(dim=-1, dtype=torch.float64) >= top_p_R[rest_R]
        done = torch.ones_like(enough_R) if length == vocabulary else enough_R
        rows = rest_R[done]
        token_R[rows] = _draw_sorted(p_RN[done], ids_RN[done], top_p_R[rows], uniform_R[rows])
        rest_R = rest_R[~done]
        if not len(rest_R):
            break
    return token_R


def _draw_sorted(p_RN: Tensor, ids_RN: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
    """Keep the tokens before which less than top_p has gathered, the first always, and draw one of them."""
    cumulative_RN = p_RN.double().cumsum(dim=-1)
    before_RN = cumulative_RN - p_RN
    num_kept_R = (before_RN < top_p_R[:, None]).sum(dim=-1).clamp(min=1)
    mass_R = cumulative_RN.gather(-1, num_kept_R[:, None] - 1)[:, 0]
    choice_R = _invert(cumulative_RN, mass_R, uniform_R)
    return ids_RN.gather(-1, choice_R[:, None])[:, 0]


def _invert(cumulative_RN: Tensor, mass_R: Tensor, uniform_R: Tensor) -> Tensor:
    """Return the first index whose cumulative probability exceeds uniform * mass."""
    target_R = torch.minimum(uniform_R * mass_R, torch.nextafter(mass_R, torch.zeros_like(mass_R)))
    found_R = torch.searchsorted(cumulative_RN, target_R[:, None], right=True)[:, 0]
    return found_R.clamp(max=cumulative_RN.shape[-1] - 1)

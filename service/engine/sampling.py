"""From logits to tokens, for all rows of a step in one tensor program.

    edits            what forbids tokens or moves their logits, for the rows that have any          logit_edits
    temperature 0    the largest logit, the first of equal ones
    otherwise        p = softmax(logits / temperature); min_p, then top_k, then top_p; one is drawn  multinomial

The draw is an inverse transform of `u`, one number in [0, 1) per token: a hash of the sequence's seed and the count of
tokens it has drawn. So a draw depends on nothing else: not on the batch, not on preemption, not on the step, and no
generator state is kept. Everything is computed row by row, and rows without a feature pay nothing for it; on a CPU a
few rows at a time, whose probabilities then stay in its cache.

A row that is not finite (NaN anywhere, or +inf) draws nothing and does not disturb its neighbours.

Legend: R rows, V vocabulary, X some of the rows.
"""

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from service.engine.logit_edits import LogitEdits, edited_logits
from service.engine.multinomial import draw_cut, draw_whole
from service.engine.ranking import largest

COLDEST = 1e-6  # temperatures below divide like this one, so that no logit overflows
CPU_ROWS = 8  # rows that are drawn together on a CPU: 1.5 MB of probabilities for 49152 tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How one row is drawn; see `service.engine.types.SamplingParams`.

    Attributes:
        temperature: at least 0.
        top_p: 0 to 1.
        uniform: the row's random number, in [0, 1).
        top_k: 0 for all.
        min_p: 0 to 1.
        edits: what changes the row's logits first; None for nothing.
    """

    temperature: float
    top_p: float
    uniform: float
    top_k: int = 0
    min_p: float = 0.0
    edits: LogitEdits | None = None


def uniform_number(seed: int, index: int) -> float:
    """Return a number in [0, 1), equal for equal (seed, index) and independent otherwise; 53 random bits."""
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits_RV: Tensor, draws: ListOf[Draw]) -> list[int | None]:
    """Draw one token per row; None for a row that is not finite, or whose edits forbid every token.

    Args:
        logits_RV: any floating dtype; not changed.
        draws: one per row.
    """
    finite_R = logits_RV.amax(dim=-1).isfinite()  # a NaN anywhere in the row comes out as the largest
    token_R = torch.full((len(draws),), -1, dtype=torch.int64, device=logits_RV.device)
    at_once = CPU_ROWS if logits_RV.device.type == "cpu" else len(draws)
    for rows in _split([draw.edits is None for draw in draws], at_once=at_once):
        chosen = [draws[row] for row in rows]
        logits_XV = _take(logits_RV, rows)
        edits = [draw.edits for draw in chosen if draw.edits is not None]
        token_R[rows] = _choose(edited_logits(logits_XV, edits) if edits else logits_XV, chosen)
    results = torch.where(finite_R, token_R, -1).tolist()
    return [None if token < 0 else token for token in results]


def _choose(logits_RV: Tensor, draws: list[Draw]) -> Tensor:
    """Choose the rows' tokens, the logits being what they shall be; -1 where all are forbidden."""
    token_R = torch.empty(len(draws), dtype=torch.int64, device=logits_RV.device)
    for rows in _split([draw.temperature > 0 for draw in draws]):
        logits_XV = _take(logits_RV, rows)
        chosen = [draws[row] for row in rows]
        if chosen[0].temperature > 0:
            token_R[rows] = _draw(logits_XV, chosen)
        else:
            value_X, token_X = largest(logits_XV)
            token_R[rows] = torch.where(value_X == -torch.inf, -1, token_X)
    return token_R


def _draw(logits_RV: Tensor, draws: list[Draw]) -> Tensor:
    """Draw from rows that all have a temperature."""
    device, vocabulary = logits_RV.device, logits_RV.shape[-1]
    numbers = [(draw.temperature, draw.min_p, draw.top_p, draw.uniform) for draw in draws]
    temperature_R, min_p_R, top_p_R, uniform_R = torch.tensor(numbers, dtype=torch.float64, device=device).T
    p_RV = torch.softmax(logits_RV.float() / temperature_R[:, None].float().clamp(min=COLDEST), dim=-1)
    token_R = torch.empty(len(draws), dtype=torch.int64, device=device)
    for rows in _split([draw.top_p >= 1 and draw.top_k == 0 for draw in draws]):
        p_XV = _take(p_RV, rows)
        chosen = [draws[row] for row in rows]
        if chosen[0].top_p >= 1 and chosen[0].top_k == 0:
            min_p_X = min_p_R[rows] if any(draw.min_p for draw in chosen) else None
            token_R[rows] = draw_whole(p_XV, min_p_R=min_p_X, uniform_R=uniform_R[rows])
        else:
            top_k_X = torch.tensor([draw.top_k or vocabulary for draw in chosen], device=device).clamp(max=vocabulary)
            token_R[rows] = draw_cut(
                p_XV, min_p_R=min_p_R[rows], top_k_R=top_k_X, top_p_R=top_p_R[rows], uniform_R=uniform_R[rows]
            )
    return torch.where(p_RV[:, 0].isnan(), -1, token_R)


def _split(marks: list[bool], *, at_once: int | None = None) -> list[list[int]]:
    """Return the rows that are marked and those that are not, in lists that are not empty and not over `at_once`."""
    parts = [row for row, mark in enumerate(marks) if mark], [row for row, mark in enumerate(marks) if not mark]
    step = at_once or max(len(marks), 1)
    return [rows[first : first + step] for rows in parts for first in range(0, len(rows), step)]


def _take(values_RV: Tensor, rows: list[int]) -> Tensor:
    """Return some rows, without a copy when they are neighbours."""
    first, last = rows[0], rows[-1] + 1
    return values_RV[first:last] if last - first == len(rows) else values_RV[rows]

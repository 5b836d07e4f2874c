"""Log probabilities of tokens, of the model's raw logits: log p(t) = l_t - log sum_v exp(l_v), in float32.

A few rows at a time, so that a long prompt in a half-precision dtype is not copied whole.

Legend: R rows, V vocabulary, X some of the rows, N most probable tokens.
"""

from collections.abc import Sequence as ListOf

import torch
from torch import Tensor

from service.engine.ranking import most
from service.engine.types import MOST_LOGPROBS, TokenLogprobs

ROWS = 64  # of logits that are looked at together
LEAST = -9999.0  # OpenAI's number for "hardly ever", in place of minus infinity, which JSON does not know


def token_logprobs(logits_RV: Tensor, token_ids: ListOf[int], numbers: ListOf[int]) -> list[TokenLogprobs]:
    """Return what is to be reported of each row.

    Args:
        logits_RV: raw logits, any floating dtype.
        token_ids: the token that stands at each row.
        numbers: how many most probable tokens to report besides it, 0 to MOST_LOGPROBS.
    """
    reports = []
    for first in range(0, len(token_ids), ROWS):
        part = slice(first, first + ROWS)
        reports.extend(_of_rows(logits_RV[part].float(), token_ids[part], numbers[part]))
    return reports


def _of_rows(logits_XV: Tensor, token_ids: ListOf[int], numbers: ListOf[int]) -> list[TokenLogprobs]:
    total_X1 = logits_XV.logsumexp(dim=-1, keepdim=True)
    chosen_X1 = logits_XV.gather(-1, torch.tensor(token_ids, device=logits_XV.device)[:, None]) - total_X1
    chosen = chosen_X1[:, 0].clamp(min=LEAST).tolist()
    top: list[list[tuple[int, float]]] = [[] for _ in token_ids]
    if any(numbers):  # always as many, so that the order of equal ones does not depend on the other rows
        value_XN, id_XN = most(logits_XV, min(MOST_LOGPROBS, logits_XV.shape[-1]))
        values = (value_XN - total_X1).clamp(min=LEAST).tolist()
        top = [list(zip(*row, strict=True)) for row in zip(id_XN.tolist(), values, strict=True)]
    return [
        TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(pairs[:number]))
        for token_id, logprob, pairs, number in zip(token_ids, chosen, top, numbers, strict=True)
    ]

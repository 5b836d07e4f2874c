"""One token from each row's probabilities: cut to the probable ones, then drawn by inverse transform.

    min_p    tokens at least min_p times as probable as the most probable one are left
    top_k    of those the k most probable
    top_p    of those the fewest whose probabilities reach top_p of what is left (after top_k, as in vLLM)
    draw     the first token at which the cumulative probability exceeds u times the mass of what is left

Without top_k and top_p the tokens keep their order, and the draw looks for the block of BLOCK tokens first. With them
the most probable tokens are looked at in order, more of them only where fewer do not decide the cut. A row that is not
finite draws something meaningless.

Legend: R rows, V vocabulary, N most probable tokens, B blocks, K tokens of a block.
"""

import torch
from torch import Tensor

from service.engine.ranking import blocks, entries, most

SHORT_LISTS = (64, 512, 8192)  # most nuclei are smaller, and finding 64 is ten times cheaper than sorting a vocabulary


def draw_whole(p_RV: Tensor, *, min_p_R: Tensor | None, uniform_R: Tensor) -> Tensor:
    """Draw from all the tokens that min_p leaves; None leaves all."""
    if min_p_R is not None:
        p_RV = torch.where(p_RV >= p_RV.amax(dim=-1, keepdim=True) * min_p_R[:, None].float(), p_RV, 0)
    head_RBK, rest_RK = blocks(p_RV)
    mass_RB = torch.cat([head_RBK.sum(dim=-1), rest_RK.sum(dim=-1, keepdim=True)], dim=-1).double()
    cumulative_RB = mass_RB.cumsum(dim=-1)
    target_R = uniform_R * cumulative_RB[:, -1]
    block_R = _first_above(cumulative_RB, target_R)
    target_R = target_R - (cumulative_RB - mass_RB).gather(-1, block_R[:, None])[:, 0]
    index_RK = entries(block_R, p_RV.shape[-1])
    inside_RK = p_RV.gather(-1, index_RK).double()
    inside_RK[:, 1:].masked_fill_(index_RK[:, 1:] == index_RK[:, :-1], 0)  # past the end of the vocabulary
    place_R = _first_above(inside_RK.cumsum(dim=-1), target_R)
    return index_RK.gather(-1, place_R[:, None])[:, 0]


def draw_cut(p_RV: Tensor, *, min_p_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
    """Draw from the most probable tokens; p sums to 1, and top_k is at least 1."""
    vocabulary = p_RV.shape[-1]
    token_R = torch.empty_like(top_k_R)
    rest_R = torch.arange(len(p_RV), device=p_RV.device)
    for length in (*(length for length in SHORT_LISTS if length < vocabulary), vocabulary):
        p_RN, ids_RN = most(p_RV if len(rest_R) == len(p_RV) else p_RV[rest_R], length)
        min_p, top_k, top_p, uniform = (each_R[rest_R] for each_R in (min_p_R, top_k_R, top_p_R, uniform_R))
        cumulative_RN = p_RN.double().cumsum(dim=-1)
        probable_R = (p_RN >= p_RN[:, :1] * min_p[:, None].float()).sum(dim=-1)
        left_R = torch.minimum(top_k, probable_R).clamp(1, length)
        known_R = (probable_R < length) | (top_k <= length) | (length == vocabulary)  # all that is left is in the list
        mass_R = torch.where(known_R, _at(cumulative_RN, left_R - 1), 1.0)
        kept_R = ((cumulative_RN - p_RN) < (top_p * mass_R)[:, None]).sum(dim=-1).clamp(min=1)
        uncut_R = (min_p == 0) & (top_k >= vocabulary)
        decided_R = known_R | (uncut_R & (cumulative_RN[:, -1] >= top_p))
        mass_R = _at(cumulative_RN, torch.minimum(kept_R, left_R) - 1)
        choice_R = _first_above(cumulative_RN, torch.minimum(uniform * mass_R, _just_below(mass_R)))
        token_R[rest_R[decided_R]] = _at(ids_RN, choice_R)[decided_R]
        rest_R = rest_R[~decided_R]
        if not len(rest_R):
            break
    return token_R


def _first_above(cumulative_RN: Tensor, target_R: Tensor) -> Tensor:
    """Return where the cumulative mass first exceeds the target, which is taken to lie in 0 to just below the mass."""
    target_R = torch.minimum(target_R.clamp(min=0), _just_below(cumulative_RN[:, -1]))
    found_R = torch.searchsorted(cumulative_RN, target_R[:, None], right=True)[:, 0]
    return found_R.clamp(max=cumulative_RN.shape[-1] - 1)


def _just_below(mass_R: Tensor) -> Tensor:
    return torch.nextafter(mass_R, torch.zeros_like(mass_R))


def _at(values_RN: Tensor, place_R: Tensor) -> Tensor:
    """Return one entry of each row."""
    return values_RN.gather(-1, place_R[:, None])[:, 0]

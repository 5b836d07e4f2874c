"""Attention over pages equals attention written out in float64: soft caps, sinks and masks, in parts too."""

import pytest
import torch

from service.engine import attention
from service.engine.attention import Scoring, _bent_in_parts

HEADS, KEY_HEADS, TOKENS, KEYS, SIZE = 4, 2, 5, 11, 8


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def written_out(query_HTD, keys_KSD, values_KSD, mask_TS, scoring):
    """One head and one query after the other, in float64."""
    output = torch.empty(HEADS, TOKENS, SIZE, dtype=torch.float64)
    for head in range(HEADS):
        keys, values = (each[head // (HEADS // KEY_HEADS)].double() for each in (keys_KSD, values_KSD))
        for token in range(TOKENS):
            scores = keys @ query_HTD[head, token].double() * scoring.scale
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            exponents = (scores + mask_TS[token].double()).exp()
            sink = 0.0 if scoring.sinks_H is None else scoring.sinks_H[head].double().exp()
            output[head, token] = exponents @ values / (exponents.sum() + sink)
    return output


@pytest.mark.parametrize("most_scores", [1, 100, 1 << 20])
@pytest.mark.parametrize("softcap", [None, 0.3, 5.0])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_bent_scores_equal_the_formula(monkeypatch, most_scores, softcap, has_sinks):
    """Query heads that share a key head, a causal mask, however few queries are computed at once."""
    monkeypatch.setattr(attention, "MOST_SCORES", most_scores)
    query_HTD, keys_KSD, values_KSD = (
        random(HEADS, TOKENS, SIZE),
        random(KEY_HEADS, KEYS, SIZE),
        random(KEY_HEADS, KEYS, SIZE),
    )
    mask_TS = torch.full((TOKENS, KEYS), float("-inf")).triu(KEYS - TOKENS + 1)
    scoring = Scoring(scale=0.7, softcap=softcap, sinks_H=random(HEADS) if has_sinks else None)
    output = _bent_in_parts(
        query_HTD.unflatten(0, (KEY_HEADS, -1))[None], keys_KSD[None], values_KSD[None], mask_TS, scoring
    )
    expected = written_out(query_HTD, keys_KSD, values_KSD, mask_TS, scoring)
    torch.testing.assert_close(output[0].flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)

"""Logits are edited as the sampling parameters say, row by row."""

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from service.engine.logit_edits import WORD_BITS, LogitEdits, TokenCounts, edited_logits

VOCABULARY = 77


def logits_of(rows, dtype=torch.float32):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(rows)).to(dtype) * 4


def counted(prompt, generated):
    counts = TokenCounts(prompt)
    for token in generated:
        counts.add(token)
    return counts


def words_of(allowed):
    """Return bits that allow some tokens, as a grammar gives them."""
    words = [sum(1 << bit for bit in range(WORD_BITS) if word * WORD_BITS + bit in allowed) for word in range(3)]
    return torch.tensor([word - (1 << 32) if word >= 1 << 31 else word for word in words], dtype=torch.int32)


def test_repetition_penalty_is_that_of_transformers():
    """Tokens of prompt and completion, each once, however often they came."""
    logits = logits_of(1)
    prompt, generated = [3, 3, 9, 50, 76], [9, 10, 10, 11]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits)
    actual = edited_logits(logits, [LogitEdits(counts=counted(prompt, generated), repetition=1.7)])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.5), (-2.0, 0.7)])
def test_frequency_and_presence_penalties_follow_openais_formula(frequency, presence):
    """The logit - count * frequency - (count > 0) * presence, counting the completion only."""
    logits = logits_of(1)
    prompt, generated = [3, 3, 9, 50], [9, 10, 10, 11, 10]
    expected = logits.clone()
    for token, count in Counter(generated).items():
        expected[0, token] -= count * frequency + presence
    edits = LogitEdits(counts=counted(prompt, generated), frequency=frequency, presence=presence)
    torch.testing.assert_close(edited_logits(logits, [edits]), expected)


def test_counts_grow_by_one_token_at_a_time():
    """Each different token once, in order of appearance, with how often it was generated."""
    counts = counted([7, 8, 7], [8, 5, 5, 8, 8])
    assert (counts.ids.tolist(), counts.times.tolist()) == ([7, 8, 5], [0, 3, 2])


def test_bias_is_added_after_the_penalties():
    """A penalty scales the logit, not the bias."""
    logits = torch.full((1, VOCABULARY), 2.0)
    edits = LogitEdits(counts=counted([4], []), repetition=2.0, bias=((4, 10.0), (5, -100.0)))
    assert edited_logits(logits, [edits])[0, 3:7].tolist() == [2.0, 11.0, -98.0, 2.0]


def test_forbidden_tokens_stay_forbidden():
    """Neither a bias nor a penalty brings one back."""
    edits = LogitEdits(forbidden=(1, 76), bias=((1, 100.0),), counts=counted([76], [1]), repetition=1.5, presence=-2.0)
    actual = edited_logits(logits_of(1), [edits])
    assert (actual[0] == -torch.inf).nonzero().flatten().tolist() == [1, 76]


def test_bits_allow_tokens():
    """Bit i of word w stands for token 32 * w + i, the highest bit of a word too."""
    allowed = {0, 1, 30, 31, 32, 63, 64, 76}
    logits = logits_of(2)
    actual = edited_logits(logits, [LogitEdits(), LogitEdits(allowed_bits=words_of(allowed))])
    assert actual[0].equal(logits[0])
    assert {token for token, value in enumerate(actual[1].tolist()) if value > -torch.inf} == allowed
    assert actual[1][sorted(allowed)].equal(logits[1][sorted(allowed)])


def test_rows_are_edited_each_by_its_own():
    """Mixed rows give what each gives alone, and the given logits are left as they are."""
    edits = [
        LogitEdits(counts=counted([1, 2, 3], [3, 3]), repetition=0.8, frequency=0.3, presence=0.2),
        LogitEdits(bias=((9, 3.0), (10, -3.0))),
        LogitEdits(counts=counted([], []), frequency=1.0),
        LogitEdits(forbidden=(5,), allowed_bits=words_of(set(range(0, VOCABULARY, 2)))),
        LogitEdits(counts=counted([60], [61]), presence=-1.0, forbidden=(60,)),
    ]
    logits = logits_of(len(edits), torch.bfloat16)
    before = logits.clone()
    together = edited_logits(logits, edits)
    assert together.dtype == torch.float32
    for row, edit in enumerate(edits):
        assert together[row].equal(edited_logits(logits[row : row + 1], [edit])[0])
    assert logits.equal(before)

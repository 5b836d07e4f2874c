"""Reported log probabilities are log_softmax of the raw logits."""

import pytest
import torch

from service.engine.logprobs import LEAST, ROWS, token_logprobs
from service.engine.types import MOST_LOGPROBS


@pytest.mark.parametrize("vocabulary", [5, 700])
def test_they_are_log_softmax(vocabulary):
    """The token's own, and the most probable ones in order; more rows than are looked at together."""
    rows = ROWS + 3
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * 3
    tokens = [row % vocabulary for row in range(rows)]
    numbers = [row % (MOST_LOGPROBS + 1) for row in range(rows)]
    expected = logits.double().log_softmax(-1)
    for row, report in enumerate(token_logprobs(logits, tokens, numbers)):
        assert report.token_id == tokens[row]
        assert report.logprob == pytest.approx(expected[row, tokens[row]].item(), abs=1e-5)
        values, ids = expected[row].sort(descending=True)
        number = min(numbers[row], vocabulary)
        assert [token for token, _ in report.top] == ids[:number].tolist()
        assert [value for _, value in report.top] == pytest.approx(values[:number].tolist(), abs=1e-5)


def test_a_forbidden_token_has_the_least():
    """Minus infinity is no JSON."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    report = token_logprobs(logits, [1], [3])[0]
    assert report.logprob == LEAST
    assert report.top[-1] == (1, LEAST)


def test_a_row_does_not_depend_on_the_others():
    """Equal to the last bit, alone and among 64, whatever the others ask for, equal logits included."""
    logits = (torch.randn(64, 3000, generator=torch.Generator().manual_seed(2)) * 3).bfloat16()
    numbers = [row % 6 for row in range(64)]
    together = token_logprobs(logits, list(range(64)), numbers)
    alone = [token_logprobs(logits[row : row + 1], [row], [numbers[row]])[0] for row in range(64)]
    assert together == alone

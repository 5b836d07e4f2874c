"""Divergence against torch's own, and against numbers worked out by hand."""

import pytest
import torch
from torch.nn import functional as F

from onebit_core.evaluation.divergence import summarize_divergence, token_agreement, token_divergence


def random_log_probabilities(seed: int) -> torch.Tensor:
    logits_TV = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed))
    return F.log_softmax(3 * logits_TV, dim=-1)


def test_agrees_with_torch_kl_div() -> None:
    """Per token, the sum over the vocabulary of torch's pointwise divergence."""
    log_p_TV, log_q_TV = random_log_probabilities(0), random_log_probabilities(1)

    expected_T = F.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)

    torch.testing.assert_close(token_divergence(log_p_TV, log_q_TV), expected_T)


def test_is_zero_for_equal_distributions() -> None:
    """Not nearly zero: zero."""
    log_p_TV = random_log_probabilities(0)

    assert token_divergence(log_p_TV, log_p_TV.clone()).eq(0).all()


def test_is_measured_from_the_original() -> None:
    """For p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = log 2 / 2 + log(2/3) / 2, not the other way round."""
    log_p_TV, log_q_TV = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()

    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()

    torch.testing.assert_close(token_divergence(log_p_TV, log_q_TV), expected[None])


def test_agreement_compares_the_first_rank() -> None:
    """Same winner in the first row, another one in the second."""
    log_p_TV = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    log_q_TV = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()

    assert token_agreement(log_p_TV, log_q_TV).tolist() == [True, False]


def test_summary_of_a_known_sample() -> None:
    """Values 0..200 in two windows: mean and median 100, 99th percentile 198, largest 200."""
    values = torch.cat([torch.arange(0.0, 201.0), torch.tensor([100.0])]).view(2, 101)

    summary = summarize_divergence(values)

    assert (summary.mean, summary.median, summary.max) == pytest.approx((100, 100, 200))
    assert summary.p99 == pytest.approx(198, abs=0.1)
    assert summary.standard_error == pytest.approx(values.mean(1).std().item() / 2**0.5)

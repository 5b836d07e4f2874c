"""Perplexity against numbers worked out by hand."""

import math

import pytest
import torch

from onebit_core.evaluation.perplexity import LARGEST_EXPONENT, mean_and_error, perplexity, token_loss


def test_loss_is_minus_the_log_probability_of_what_followed() -> None:
    """Probability 1/4 for the first target and 1/2 for the second."""
    log_probability_TV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()

    losses = token_loss(log_probability_TV, torch.tensor([0, 1]))

    torch.testing.assert_close(losses, torch.tensor([math.log(4), math.log(2)]))


def test_perplexity_of_a_fair_coin_is_two() -> None:
    """Every token at probability 1/2: perplexity 2, without any error."""
    result = perplexity(torch.full((3, 5), math.log(2)))

    assert result.value == pytest.approx(2)
    assert result.standard_error == pytest.approx(0, abs=1e-12)


def test_standard_error_is_taken_over_windows() -> None:
    """Window means 1 and 3: mean 2, deviation sqrt(2), error of the mean sqrt(2) / sqrt(2) = 1, times exp(2)."""
    result = perplexity(torch.tensor([[0.0, 2.0], [2.0, 4.0]]))

    assert result.value == pytest.approx(math.exp(2))
    assert result.standard_error == pytest.approx(math.exp(2))


def test_a_single_window_takes_its_error_over_tokens() -> None:
    """Losses 1 and 3 in one window: mean 2, error 1."""
    assert mean_and_error(torch.tensor([[1.0, 3.0]])) == pytest.approx((2.0, 1.0))


def test_a_hopeless_model_still_has_a_finite_perplexity() -> None:
    """A mean loss of 10000 nats would overflow exp; the report must stay valid JSON."""
    assert perplexity(torch.full((2, 2), 1e4)).value == pytest.approx(math.exp(LARGEST_EXPONENT))

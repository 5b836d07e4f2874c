"""A draw follows its own row's distribution and depends on nothing else."""

import math

import pytest
import torch

from service.engine.sampling import SHORT_LISTS, Draw, sample, uniform_number

NUM_DRAWS = 4000


def draws_of(row, *, temperature=1.0, top_p=1.0, count=NUM_DRAWS):
    """Return how often each token is drawn from one row of logits."""
    draws = [Draw(temperature=temperature, top_p=top_p, uniform=uniform_number(7, index)) for index in range(count)]
    tokens = sample(row.expand(count, -1), draws)
    return torch.bincount(torch.tensor(tokens), minlength=len(row)) / count


def random_logits(rows, vocabulary, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_takes_the_largest_logit():
    """Greedy rows are argmax, whatever their top_p and number."""
    logits = random_logits(5, 50)
    draws = [Draw(temperature=0, top_p=0.3, uniform=0.9)] * 5
    assert sample(logits, draws) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_softmax_of_the_logits_over_the_temperature(temperature):
    """Over many seeds the tokens come as often as their probability says."""
    row = torch.tensor([0.0, 1.0, 2.0, -1.0])
    weights = [math.exp(value / temperature) for value in row.tolist()]
    expected = torch.tensor([weight / sum(weights) for weight in weights])
    assert (draws_of(row, temperature=temperature) - expected).abs().max() < 0.03


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    """0.5 + 0.3 reaches 0.75, so the two other tokens are never drawn, and the kept keep their proportion."""
    row = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    expected = torch.tensor([0.0, 0.5 / 0.8, 0.0, 0.3 / 0.8])
    assert (draws_of(row, top_p=0.75) - expected).abs().max() < 0.03


def test_top_p_zero_keeps_the_most_probable_token():
    """At least one token is always kept."""
    logits = random_logits(6, 40)
    draws = [Draw(temperature=2.0, top_p=0.0, uniform=0.99)] * 6
    assert sample(logits, draws) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocabulary", [4 * length for length in SHORT_LISTS])
def test_a_flat_distribution_larger_than_the_short_lists_is_still_drawn_whole(vocabulary):
    """With top_p over a flat vocabulary the nucleus is its larger part, and no token is favoured."""
    row = torch.zeros(vocabulary)
    draws = [Draw(temperature=1.0, top_p=0.9, uniform=(index + 0.5) / 200) for index in range(200)]
    tokens = sample(row.expand(200, -1), draws)
    assert len(set(tokens)) == 200
    assert all(token is not None and token < vocabulary for token in tokens)


def test_a_draw_does_not_depend_on_the_rest_of_the_batch():
    """Each row of a mixed batch draws what it draws alone."""
    logits = random_logits(24, 3000)
    draws = [
        Draw(
            temperature=(0.0, 0.7, 1.0, 5.0)[row % 4], top_p=(1.0, 0.9, 0.5)[row % 3], uniform=uniform_number(row, row)
        )
        for row in range(24)
    ]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(24)]
    backwards = sample(logits.flip(0), draws[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_draws_nothing_and_leaves_its_neighbours_alone(poison):
    """One NaN or infinity costs its own row only."""
    logits = random_logits(3, 600)
    draws = [Draw(temperature=1.0, top_p=top_p, uniform=0.4) for top_p in (0.9, 0.9, 1.0)]
    expected = sample(logits, draws)
    poisoned = logits.clone()
    poisoned[1, 17] = poison
    assert sample(poisoned, draws) == [expected[0], None, expected[2]]
    assert sample(poisoned, [Draw(temperature=0, top_p=1, uniform=0)] * 3)[1] is None


def test_forbidden_tokens_are_never_drawn():
    """A logit of minus infinity is a probability of zero, for the smallest and the largest number too."""
    row = torch.tensor([[float("-inf"), 1.0, float("-inf"), 1.0, float("-inf")]])
    for uniform in (0.0, 0.5, 1 - 2.0**-53):
        for top_p in (1.0, 0.999):
            assert sample(row, [Draw(temperature=1.0, top_p=top_p, uniform=uniform)])[0] in (1, 3)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    """Dividing by nearly nothing gives the largest logit, not NaN."""
    logits = random_logits(4, 100) * 1e3
    draws = [Draw(temperature=1e-300, top_p=1.0, uniform=0.5)] * 4
    assert sample(logits, draws) == logits.argmax(-1).tolist()


def test_a_step_without_drawing_rows_draws_nothing():
    """A step of prompt chunks only has no logits."""
    assert sample(torch.empty(0, 10), []) == []


def test_numbers_are_uniform_and_fixed_by_seed_and_index():
    """The numbers are the same on every machine, differ by seed and index, and fill [0, 1) evenly."""
    numbers = torch.tensor([uniform_number(3, index) for index in range(NUM_DRAWS)], dtype=torch.float64)
    assert uniform_number(3, 0) == numbers[0].item() != uniform_number(4, 0)
    assert len(numbers.unique()) == NUM_DRAWS
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = torch.histc(numbers.float(), bins=10, min=0, max=1) / NUM_DRAWS
    assert (histogram - 0.1).abs().max() < 0.02

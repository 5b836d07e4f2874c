"""A draw follows its own row's distribution and depends on nothing else."""

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engine.logit_edits import LogitEdits
from service.engine.multinomial import SHORT_LISTS
from service.engine.sampling import Draw, sample, uniform_number

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


CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"min_p": 0.2},
    {"min_p": 0.01},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.6},
    {"top_k": 300, "top_p": 0.99},
    {"min_p": 0.05, "top_p": 0.7},
    {"min_p": 0.001, "top_p": 0.95},
    {"min_p": 0.1, "top_k": 5, "top_p": 0.9},
    {"temperature": 3.0, "min_p": 0.002, "top_k": 600, "top_p": 0.999},
    {"temperature": 3.0, "top_k": 10_000, "top_p": 0.5},
]


def transformers_probabilities(logits, *, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    """Return what transformers' own warpers, in vLLM's order, leave of the probabilities."""
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize("vocabulary", [5, 256, 1500])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_cuts_are_those_of_transformers(cut, vocabulary):
    """Evenly spaced numbers draw every token as often as its probability after the cuts says, up to one draw."""
    logits = random_logits(1, vocabulary, seed=vocabulary) * 0.7
    expected = transformers_probabilities(logits, **cut)[0]
    draws = [
        Draw(**{"temperature": 1.0, "top_p": 1.0, **cut, "uniform": (u + 0.5) / NUM_DRAWS}) for u in range(NUM_DRAWS)
    ]
    counts = torch.bincount(torch.tensor(sample(logits.expand(NUM_DRAWS, -1), draws)), minlength=vocabulary)
    assert (counts - expected * NUM_DRAWS).abs().max() <= 1.01
    assert not counts[expected == 0].any()


def test_a_flat_row_is_cut_by_top_k_and_min_p_past_every_short_list():
    """Where the cut lies far down, it is still found."""
    vocabulary = 4 * SHORT_LISTS[-1]
    row = torch.zeros(vocabulary)
    row[: vocabulary // 2] = 1.0
    numbers = [(index + 0.5) / 400 for index in range(400)]
    common = {"temperature": 1.0, "top_p": 0.9}
    by_min_p = sample(row.expand(400, -1), [Draw(**common, min_p=0.5, uniform=u) for u in numbers])
    assert max(by_min_p) < vocabulary // 2
    assert len(set(by_min_p)) == 400
    top_k = SHORT_LISTS[-1] + 9
    by_top_k = sample(row.expand(400, -1), [Draw(**common, top_k=top_k, uniform=u) for u in numbers])
    assert max(by_top_k) < vocabulary // 2
    assert len(set(by_top_k)) == 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_draw_does_not_depend_on_the_rest_of_the_batch(dtype):
    """Each row of a mixed batch draws what it draws alone, whatever is cut, edited or equal in it."""
    rows = 64
    logits = random_logits(rows, 3000).to(dtype)
    draws = [
        Draw(
            temperature=(0.0, 0.7, 1.0, 5.0)[row % 4],
            top_p=(1.0, 0.9, 0.5)[row % 3],
            top_k=(0, 0, 0, 40, 800)[row % 5],
            min_p=(0.0, 0.0, 0.1)[row % 7 % 3],
            uniform=uniform_number(row, row),
            edits=LogitEdits(forbidden=(row,), bias=((row + 1, 4.0),)) if row % 6 == 1 else None,
        )
        for row in range(rows)
    ]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], [draws[row]])[0] for row in range(rows)]
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


def test_the_logits_are_not_changed():
    """Log probabilities are taken of the same tensor afterwards."""
    logits = random_logits(3, 300)
    before = logits.clone()
    edits = LogitEdits(forbidden=(1, 2), bias=((5, 9.0),))
    sample(logits, [Draw(temperature=t, top_p=0.5, uniform=0.3, edits=edits) for t in (0.0, 1.0, 1.0)])
    assert logits.equal(before)


def test_a_row_whose_tokens_are_all_forbidden_draws_nothing():
    """Greedy or not, there is no token to give; the neighbours have theirs."""
    logits = random_logits(3, 4)
    nothing = LogitEdits(forbidden=(0, 1, 2, 3))
    for temperature in (0.0, 1.0):
        common = {"temperature": temperature, "top_p": 1.0, "uniform": 0.5}
        tokens = sample(logits, [Draw(**common), Draw(**common, edits=nothing), Draw(**common)])
        assert [token is None for token in tokens] == [False, True, False]


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

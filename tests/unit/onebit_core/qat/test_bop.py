"""The optimizer of signs turns the surest ones, so many as it may, and waits for new gradients there."""

import pytest
import torch
from torch import nn

from onebit_core.qat.bop import BETAS, FEWEST_GRADIENTS, SMALLEST, Bop

SHAPES = ((6, 8), (3, 5, 2))


def signs(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).sign()) for shape in SHAPES]


def give(values, gradients) -> None:
    for value, gradient in zip(values, gradients, strict=True):
        value.grad = gradient.clone()


def reference(start, history, share) -> list[torch.Tensor]:
    """Return the signs after steps on a history of gradients: all parameters as one vector, in float64."""
    s = torch.cat([value.detach().double().flatten() for value in start])
    m, v = torch.zeros_like(s), torch.zeros_like(s)
    count = max(1, round(share * len(s))) if share else 0
    for step, gradients in enumerate(history, start=1):
        g = torch.cat([gradient.double().flatten() for gradient in gradients])
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        if step < FEWEST_GRADIENTS:
            continue
        r = s * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + SMALLEST)
        turned = [int(place) for place in r.argsort(descending=True)[:count] if r[place] > 0]
        s[turned] *= -1
        m[turned] = 0
    return [part.view(shape) for part, shape in zip(s.split([48, 30]), SHAPES, strict=True)]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 1.0])
def test_the_signs_that_turn_are_those_of_the_formula(share):
    """Over twenty steps of noise with a drift, for parameters of different shapes and any share."""
    draw = torch.Generator().manual_seed(1)
    drift = [torch.randn(shape, generator=draw) for shape in SHAPES]
    history = [[d + torch.randn(d.shape, generator=draw) for d in drift] for _ in range(20)]
    values = signs()
    expected = reference(values, history, share)
    optimizer = Bop(values, lr=share)
    for gradients in history:
        give(values, gradients)
        optimizer.step()
    assert all(torch.equal(value.detach().double(), wanted) for value, wanted in zip(values, expected, strict=True))


def test_no_sign_turns_before_its_gradients_say_something():
    """The first gradient makes all equally sure."""
    values = signs()
    before = [value.detach().clone() for value in values]
    optimizer = Bop(values, lr=1.0)
    for _ in range(FEWEST_GRADIENTS - 1):
        give(values, before)
        optimizer.step()
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))
    give(values, before)
    optimizer.step()
    assert all(torch.equal(value, -old) for value, old in zip(values, before, strict=True))


def test_signs_that_lower_the_loss_already_stay():
    """However many may turn."""
    values = signs()
    before = [value.detach().clone() for value in values]
    optimizer = Bop(values, lr=1.0)
    for _ in range(3 * FEWEST_GRADIENTS):
        give(values, [-old for old in before])
        optimizer.step()
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


def test_a_parameter_that_no_token_reached_stays():
    """An expert without tokens has no gradient; the others go on."""
    values = signs()
    still = values[1].detach().clone()
    optimizer = Bop(values, lr=0.1)
    for _ in range(FEWEST_GRADIENTS):
        values[0].grad, values[1].grad = values[0].detach().clone(), None
        optimizer.step()
    assert torch.equal(values[1], still)
    assert not optimizer.state[values[1]]


def test_equal_gradients_turn_no_more_signs_than_may():
    """Where all are equally sure, as many turn as the share says."""
    values = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = Bop(values, lr=0.05)
    for _ in range(FEWEST_GRADIENTS):
        give(values, [torch.ones(shape) for shape in SHAPES])
        optimizer.step()
    assert sum(int((value < 0).sum()) for value in values) == round(0.05 * 78)

"""The losses are what their formulas say, with the gradients that autograd finds for the plain form."""

import pytest
import torch
from torch import nn

from onebit_core.qat import losses
from onebit_core.qat.losses import hidden_loss, logit_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("positions", [1, 7, 40])
def test_the_logits_loss_in_slices_is_the_plain_one(monkeypatch, positions):
    """Value and gradient, whole and cut into slices of 16 positions with a rest."""
    monkeypatch.setattr(losses, "POSITIONS_AT_ONCE", 16)
    head, teacher_head = nn.Linear(8, 11), nn.Linear(8, 11)
    head.requires_grad_(requires_grad=False)
    states, wanted = draw(positions, 8).requires_grad_(), draw(positions, 8, seed=1)
    loss = logit_loss(states, wanted, (head, teacher_head))
    (3 * loss).backward()

    plain = states.detach().double().requires_grad_()
    with torch.no_grad():
        target = teacher_head(wanted).double().softmax(-1)
    found = (plain @ head.weight.double().T + head.bias.double()).softmax(-1)
    expected = (target * (target / found).log()).sum(-1).mean()
    (3 * expected).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(states.grad, plain.grad.float(), rtol=1e-4, atol=1e-7)


def test_equal_models_lose_nothing():
    """Neither in their logits nor in their hidden states, whatever the length of these."""
    states = draw(5, 8).requires_grad_()
    assert float(logit_loss(states.detach(), states.detach(), (lambda x: x, lambda x: x))) == pytest.approx(0, abs=1e-6)
    seen = [draw(1, 5, 8, seed=seed) for seed in range(3)]
    assert float(hidden_loss(seen, [2 * each for each in seen])) == pytest.approx(0, abs=1e-6)


def test_the_hidden_loss_is_a_sum_over_blocks_of_means_over_tokens():
    """Unit vectors at 90 degrees are 2 apart, squared; what the first block reads does not count."""
    east, north = torch.tensor([[[3.0, 0.0]] * 4]), torch.tensor([[[0.0, 0.5]] * 4])
    assert float(hidden_loss([north, east, east], [east, north, east])) == pytest.approx(2.0)
    assert float(hidden_loss([north, east, east], [east, north, north])) == pytest.approx(4.0)
    assert float(hidden_loss([east], [north])) == 0.0

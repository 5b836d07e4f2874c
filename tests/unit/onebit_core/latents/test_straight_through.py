"""A sign in training: +1 or -1 forward, another function's gradient backward."""

import math

import pytest
import torch

from onebit_core.latents.straight_through import SURROGATES, product_dtype, sign_through


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_sign_has_the_gradient_of_its_surrogate(surrogate):
    """And the value of a sign, zero being positive, in whatever dtype is asked for."""
    latent = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    signs = sign_through(latent, surrogate, torch.bfloat16)
    assert signs.dtype == torch.bfloat16
    assert signs.tolist() == [-1, -1, 1, 1, 1]
    signs.float().sum().backward()
    expected = {
        "identity": [1.0] * 5,
        "clipped": [0.0, 1.0, 1.0, 1.0, 0.0],
        "smooth": [1.001 - math.tanh(t) ** 2 for t in (-2.0, -0.5, 0.0, 0.5, 2.0)],
    }[surrogate]
    assert latent.grad.dtype == torch.float32
    assert latent.grad.tolist() == pytest.approx(expected, rel=1e-5)


def test_products_run_in_the_dtype_that_autocast_says():
    """Signs are made in it at once, in place of being cast."""
    x = torch.ones(2)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16

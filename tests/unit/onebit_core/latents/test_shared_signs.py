"""The planes of a weight follow one latent, which passes through their sums in order."""

import copy

import pytest
import torch

from onebit_core.latents.shared_signs import SharedSignLatent, sign_latent
from onebit_core.latents.sign import SignLatent
from onebit_core.layers import SignLinear
from onebit_core.methods.svid import SvidConfig, quantize_svid


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(kind: str) -> SignLinear:
    """Return planes whose signs were not chosen by their nearest sum."""
    signs = draw(3, 8, 64)
    if kind == "groups and shift":
        return SignLinear.from_parts(
            signs, group_scale_POG=0.1 + draw(3, 8, 4, seed=1).abs(), shift_OG=draw(8, 2, seed=2)
        )
    rows, columns = 0.1 + draw(3, 8, seed=1).abs(), 0.1 + draw(3, 64, seed=2).abs()
    return SignLinear.from_parts(signs, scale_in_PI=columns, scale_out_PO=rows)


def test_one_plane_keeps_a_latent_of_its_own():
    """Several share one."""
    weight = draw(8, 64)
    latents = [sign_latent(quantize_svid(weight, None, SvidConfig(planes=planes)), weight) for planes in (1, 2)]
    assert [type(latent) for latent in latents] == [SignLatent, SharedSignLatent]
    assert [value.shape for value in latents[1].latents()] == [weight.shape]


@pytest.mark.parametrize("kind", ["rows and columns", "groups and shift"])
def test_an_untrained_latent_is_its_layer(kind):
    """Whatever the weight was: the latent starts in the cell of the decided sum."""
    layer = layer_of(kind)
    before = copy.deepcopy(layer.state_dict())
    latent = sign_latent(layer, draw(8, 64, seed=3))
    torch.testing.assert_close(latent.base_weight(), layer.dequantize(), rtol=1e-5, atol=1e-5)
    latent.harden()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_a_latent_starts_nearer_to_the_weight_than_its_sum():
    """Inside of the cell, so that a sign decided against the weight turns back easily."""
    weight = draw(8, 64)
    layer = quantize_svid(weight, None, SvidConfig(planes=2))
    latent = sign_latent(layer, weight)
    assert isinstance(latent, SharedSignLatent)
    start = latent.latent_OI * latent.unit_OI
    assert (start - weight).norm() < 0.5 * (layer.dequantize() - weight).norm()


def trained(latent: SignLatent, wanted: float) -> float:
    """Descend on the squared distance of the first weight from a value; return where it ends."""
    optimizer = torch.optim.SGD(latent.latents(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (latent.base_weight()[0, 0] - wanted).square().backward()
        optimizer.step()
    return float(latent.base_weight()[0, 0].detach())


def test_training_crosses_zero():
    """From -1 + 0.25 to 1 - 0.25 both planes must turn, in opposite directions; with a latent each they do not."""
    signs = torch.tensor([[[-1.0]], [[1.0]]])
    layer = SignLinear.from_parts(signs, scale_out_PO=torch.tensor([[1.0], [0.25]]))
    weight = torch.tensor([[-0.75]])
    assert trained(SharedSignLatent(layer, weight), 0.75) == 0.75
    assert trained(SignLatent(layer, weight), 0.75) != 0.75


def test_frozen_signs_stay_while_scales_move():
    """What only scales are trained for keeps every sign, also where sums pass each other."""
    weight = draw(8, 64)
    layer = quantize_svid(weight, None, SvidConfig(planes=2))
    signs = layer.signs.clone()
    latent = sign_latent(layer, weight)
    for value in latent.latents():
        value.requires_grad = False
    with torch.no_grad():
        latent.factor["scale_out"][1] *= 4.0
        expected = latent.base_weight()
    hardened = latent.harden()
    assert torch.equal(hardened.signs, signs)
    torch.testing.assert_close(hardened.dequantize(), expected, rtol=1e-3, atol=1e-3)


def test_what_was_trained_is_what_is_packed():
    """Signs of the nearest sums under the scales as they are by then."""
    weight = draw(8, 64)
    layer = quantize_svid(weight, None, SvidConfig(planes=2))
    latent = sign_latent(layer, weight)
    with torch.no_grad():
        for value in latent.latents():
            value += draw(8, 64, seed=5) / 4
        latent.factor["scale_in"] *= 1.25
        expected = latent.base_weight()
    torch.testing.assert_close(latent.harden().dequantize(), expected, rtol=2e-3, atol=1e-3)

"""Latents stand for the layer they came from, and training them brings a block nearer to the original."""

import copy

import pytest
import torch
from torch import nn

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.latents import LATENTS
from onebit_core.latents.straight_through import sign_through
from onebit_core.layers import SalientWeights, SignLinear
from onebit_core.methods import METHODS
from onebit_core.reconstruction import ReconstructionConfig, reconstruct_block
from onebit_core.reconstruction.block import block_loss

SETTINGS = {
    "gptq": {"bits": 3, "group_size": 16},
    "svid": {"planes": 2},
    "pb_llm": {"ratio": 0.2},
    "lut2": {"group_size": 16},
    "billm": {"group_size": 32},
    "arb": {"group_size": 32},
    "ptq161": {"group_size": 16},
    "nanoquant": {"bits": 2.5, "iterations": 20},
    "dbf": {"bits": 2.5, "iterations": 10},
    "residual": {},
    "omniquant": {"bits": 2, "group_size": 16},
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(method: str, weight: torch.Tensor):
    statistics = InputStatistics(hessian_II=torch.eye(weight.shape[1]), num_tokens=1)
    settings = METHODS[method].config.from_dict(SETTINGS[method])
    return METHODS[method].quantize(weight, statistics, settings)


class Block(nn.Module):
    """Two linears with a residual, like half of a decoder block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def original() -> Block:
    torch.manual_seed(0)
    return Block()


def put_quantized(block: Block, method: str) -> dict[str, torch.Tensor]:
    weights = {name: block.get_submodule(name).weight.detach().clone() for name in ("up", "down")}
    for name, weight in weights.items():
        layer = quantized(method, weight)
        if block.get_submodule(name).bias is not None:
            layer.set_bias(block.get_submodule(name).bias)
        setattr(block, name, layer)
    return weights


def run(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return block(hidden)


@pytest.mark.parametrize("method", SETTINGS)
def test_an_untrained_latent_is_its_layer(method):
    """It multiplies by the same weight, and packs to the same bits."""
    weight = draw(48, 64)
    layer = quantized(method, weight)
    layer.set_bias(draw(48, seed=1))
    before = copy.deepcopy(layer.state_dict())
    latent = LATENTS[layer.spec.format](layer, weight)
    x = draw(5, 64, seed=2)
    torch.testing.assert_close(latent(x), layer(x), rtol=1e-4, atol=1e-4)
    hardened = latent.harden()
    assert all(torch.equal(hardened.state_dict()[name], value) for name, value in before.items())


def test_group_scales_and_shifts_train_too():
    """A sign layer with all it may have: groups, shift, salient weights."""
    weight = draw(8, 64)
    mask = draw(8, 64, seed=3) > 1.5
    layer = SignLinear.from_parts(
        weight[None],
        scale_out_PO=torch.full((1, 8), 0.5),
        group_scale_POG=draw(1, 8, 4, seed=1).abs(),
        shift_OG=draw(8, 2, seed=2) / 10,
        salient=SalientWeights(
            mask_OI=mask,
            codes_OI=torch.full((8, 64), 200),
            scale_O=torch.full((8,), 0.01),
            zero_O=torch.full((8,), 100),
        ),
    )
    before = layer.dequantize()
    latent = LATENTS["sign"](layer, weight)
    latent(draw(3, 64)).square().sum().backward()
    assert {name for name, value in latent.named_parameters() if value.grad is not None} == {
        "latent_POI", "factor.scale_out", "factor.group_scale", "factor.shift",
    }  # fmt: skip
    with torch.no_grad():
        for factor in latent.factors():
            factor += 0.25
    after = latent.harden().dequantize()
    assert torch.equal(after[mask], before[mask])
    assert not torch.equal(after[~mask], before[~mask])


@pytest.mark.parametrize("method", SETTINGS)
def test_training_brings_a_block_nearer_to_the_original(original, method):
    """The loss on the samples falls, and on inputs that were not trained on."""
    inputs, unseen = draw(64, 16, 64), draw(16, 16, 64, seed=1)
    targets, wanted = original(inputs).detach(), original(unseen).detach()
    block = copy.deepcopy(original)
    weights = put_quantized(block, method)
    bits = block.up.bits_per_weight()
    start = float(block_loss(block(unseen), wanted))
    config = ReconstructionConfig(preset="light", epochs=6, batch=8)
    before, after = reconstruct_block(block, weights, (inputs, targets), run, config)
    assert after < 0.95 * before
    assert float(block_loss(block(unseen), wanted)) < start
    assert block.up.bits_per_weight() == bits
    torch.testing.assert_close(float(block_loss(block(inputs), targets)), after, rtol=0.02, atol=0)


def test_training_that_does_harm_is_undone(original):
    """A rate far too large leaves the block as it was."""
    block = copy.deepcopy(original)
    weights = put_quantized(block, "gptq")
    before = copy.deepcopy(block.state_dict())
    inputs = draw(8, 4, 64)
    config = ReconstructionConfig(preset="light", latent_rate=100.0, scale_rate=100.0)
    losses = reconstruct_block(block, weights, (inputs, original(inputs).detach()), run, config)
    assert losses[0] == losses[1]
    assert all(torch.equal(block.state_dict()[name], value) for name, value in before.items())


def test_the_same_seed_gives_the_same_bits(original):
    """Order of samples included."""
    inputs = draw(16, 4, 64)
    states = []
    for _ in range(2):
        block = copy.deepcopy(original)
        weights = put_quantized(block, "lut2")
        reconstruct_block(
            block, weights, (inputs, original(inputs).detach()), run, ReconstructionConfig(preset="light")
        )
        states.append(block.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_signs_pass_the_gradient_straight_through():
    """Forward a sign, backward the identity; the sign of zero is +1."""
    latent = torch.tensor([-0.3, 0.0, 2.0], requires_grad=True)
    signs = sign_through(latent)
    (signs * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert signs.tolist() == [-1.0, 1.0, 1.0]
    assert latent.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "huge"}, "huge"),
        ({"epochs": -1}, "epochs -1"),
        ({"epochs": 2, "scale_rate": float("nan")}, "scale_rate: nan"),
        ({"batch": 0}, "batch 0"),
        ({"rate": 1}, "rate"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    """The value is in the message."""
    with pytest.raises(ConfigError, match=message):
        ReconstructionConfig.from_dict(values)


def test_epochs_without_a_rate_take_that_of_full():
    """Asking for epochs alone trains."""
    asked = ReconstructionConfig(epochs=3)
    assert (asked.latent_rate, asked.scale_rate) == (1e-2, 5e-3)
    assert asked.distill_rate == 0
    assert ReconstructionConfig(preset="light", distill_epochs=1).distill_rate == 2e-3


class Stopped(Exception):
    """Raised by a check."""


def test_a_training_that_is_stopped_leaves_the_block_as_it_was(original):
    """Layers are back in their places, with their bits."""
    block = copy.deepcopy(original)
    weights = put_quantized(block, "lut2")
    layers, before = (block.up, block.down), copy.deepcopy(block.state_dict())
    calls = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise Stopped

    inputs = draw(8, 4, 64)
    samples = (inputs, original(inputs).detach())
    with pytest.raises(Stopped):
        reconstruct_block(block, weights, samples, run, ReconstructionConfig(preset="full"), check)
    assert (block.up, block.down) == layers
    assert all(torch.equal(block.state_dict()[name], value) for name, value in before.items())


def test_frozen_indices_stay_while_levels_move():
    """What only scales are trained for keeps every index, also where levels pass each other."""
    weight = draw(8, 64)
    layer = quantized("lut2", weight)
    planes = layer.planes.clone()
    latent = LATENTS["lut"](layer, layer.base_weight())
    latent.latent_OI.requires_grad = False
    with torch.no_grad():
        latent.delta_OG4[..., 1] += 3.0
        expected = latent.base_weight()
    hardened = latent.harden()
    assert torch.equal(hardened.planes, planes)
    torch.testing.assert_close(hardened.dequantize(), expected, rtol=1e-3, atol=1e-3)


def test_presets_are_written_out():
    """A manifest shows the numbers behind the name."""
    assert ReconstructionConfig().enabled is False
    full = ReconstructionConfig(preset="full").to_dict()
    assert full["epochs"] == 1
    assert ReconstructionConfig(preset="full", epochs=3).epochs == 3

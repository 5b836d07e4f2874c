"""A rotated layer is its inner layer behind an orthogonal matrix: nothing is stored for it, all backends agree."""

import copy
import itertools
import math

import pytest
import torch

from onebit_core.errors import ConfigError
from onebit_core.kernels import packed_backend
from onebit_core.latents import LATENTS
from onebit_core.layers import (
    GroupedIntLinear,
    LayerSpec,
    RotatedLinear,
    SignLinear,
    SplitLinear,
    build_layer,
    packed_bytes,
    quantized_layers,
    release_stored,
    use_backend,
)
from onebit_core.layers.rotated import rotate, rotate_back, rotation_block
from onebit_core.methods import METHODS
from onebit_core.pipeline.rotation import quantize_weight, rotated_statistics
from tests.support.backends import CPU_BACKENDS

ROWS = 21


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int_layer(columns: int) -> GroupedIntLinear:
    codes = (draw(ROWS, columns).abs() * 1000).int() % 16
    return GroupedIntLinear.from_codes(codes, draw(ROWS, 1).abs(), torch.full((ROWS, 1), 7), 4)


def split_layer() -> SplitLinear:
    signs = SignLinear.from_parts(draw(1, ROWS, 40), scale_out_PO=draw(1, ROWS).abs())
    return SplitLinear.from_layers(torch.arange(64) < 24, (int_layer(24), signs))


INNER = {"one block": lambda: int_layer(64), "three blocks of 32": lambda: int_layer(96), "a split layer": split_layer}


@pytest.mark.parametrize(("columns", "block"), [(576, 64), (1536, 256), (4096, 256), (96, 32), (7, 1)])
def test_the_block_is_the_largest_power_of_two_that_divides(columns, block):
    assert rotation_block(columns) == block


@pytest.mark.parametrize("columns", [8, 96, 1536, 7])
def test_the_rotation_is_orthogonal_and_its_entries_are_hadamard(columns):
    """Against the matrix written out: +-1 over the root of the block, by the parity of common bits."""
    matrix = rotate(torch.eye(columns))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(columns), atol=1e-5, rtol=0)
    block = rotation_block(columns)
    for row, column in itertools.product(range(min(columns, 40)), repeat=2):
        same = row // block == column // block
        parity = bin((row % block) & (column % block)).count("1") % 2
        wanted = (1 - 2 * parity) / math.sqrt(block) if same else 0.0
        assert abs(matrix[row, column]) == pytest.approx(abs(wanted))
        assert matrix[row, column] * matrix[row, row - row % block] * wanted >= 0  # up to one sign a row
    x = draw(3, 5, columns)
    torch.testing.assert_close(rotate_back(rotate(x)), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_backend_multiplies_by_the_dense_weight(name, with_bias, backend):
    layer = RotatedLinear.around(INNER[name]())
    bias = draw(ROWS, seed=9)
    if with_bias:
        layer.set_bias(bias)
    x = draw(2, 3, layer.in_features, seed=7)
    rotated = rotate(torch.eye(layer.in_features)).double()
    weight = layer.inner.dequantize().double() @ rotated.T
    expected = x.double() @ weight.T + (bias.double() if with_bias else 0)
    use_backend(layer, backend)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
    assert layer(x[:, :0]).shape == (2, 0, ROWS)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_nothing_is_stored_for_the_rotation():
    layer = RotatedLinear.around(int_layer(64))
    assert layer.bits_per_weight() == int_layer(64).bits_per_weight()
    assert [(name, part) for name, part, _ in layer.stored_tensors()] == [
        ("parts.0.planes", "codes"), ("parts.0.scale", "scales"), ("parts.0.zero", "scales")
    ]  # fmt: skip
    empty = build_layer(LayerSpec.from_dict(layer.spec.to_dict()))
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in layer.state_dict().items()
    }


@pytest.mark.parametrize("name", INNER)
def test_a_released_layer_multiplies_on(name):
    layer = RotatedLinear.around(INNER[name]())
    layer.set_bias(draw(ROWS, seed=3))
    if packed_backend("cpu").why_unavailable() is not None:
        pytest.skip("the cpu backend cannot run here")
    model = torch.nn.Sequential(layer)
    x = draw(4, layer.in_features, seed=5)
    use_backend(model, "cpu")
    expected = model(x)
    release_stored(model)
    assert torch.equal(model(x), expected)
    assert packed_bytes(model) > 0
    assert [name for name, _ in quantized_layers(model)] == ["0"]


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [{"format": "sign", "in_features": 32, "out_features": 8}],
        [{"format": "sign", "in_features": 64, "out_features": 8, "bias": True}],
        [{"format": "sign", "in_features": 64, "out_features": 8}] * 2,
        [
            {
                "format": "rotated",
                "in_features": 64,
                "out_features": 8,
                "parts": [{"format": "sign", "in_features": 64, "out_features": 8}],
            }
        ],
    ],
)
def test_a_spec_that_cannot_be_is_refused(parts):
    with pytest.raises(ConfigError, match="LayerSpec"):
        LayerSpec.from_dict({"format": "rotated", "in_features": 64, "out_features": 8, "parts": parts})


@pytest.mark.parametrize("name", INNER)
def test_latents_are_the_layer_and_write_it_back(name):
    layer = RotatedLinear.around(INNER[name]())
    before = copy.deepcopy(layer)
    latent = LATENTS["rotated"](layer, layer.dequantize())
    x = draw(5, layer.in_features, seed=1)
    torch.testing.assert_close(latent(x), x @ layer.dequantize().T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(latent.base_weight(), layer.dequantize(), atol=1e-4, rtol=1e-3)
    assert latent.latents()
    assert latent.factors()
    latent.harden()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), before.buffers(), strict=True))


def statistics_of(columns: int, outlier: float):
    from onebit_core.calibration.statistics import StatisticsAccumulator

    accumulator = StatisticsAccumulator(columns)
    x = draw(2, 400, columns, seed=4)
    x[..., 5] *= outlier
    accumulator.add(x)
    return accumulator.finish()


def test_statistics_of_rotated_inputs_are_those_of_inputs_that_were_rotated():
    from onebit_core.calibration.statistics import StatisticsAccumulator

    x = draw(2, 50, 96, seed=2)
    plain, rotated = StatisticsAccumulator(96), StatisticsAccumulator(96)
    plain.add(x)
    rotated.add(rotate(x))
    found = rotated_statistics(plain.finish())
    torch.testing.assert_close(found.hessian_II, rotated.finish().hessian_II, atol=1e-4, rtol=1e-3)
    assert found.num_tokens == 100


def test_auto_rotates_where_it_saves_error_and_only_there():
    """A weight with an outlier a row fits a min-max grid better when it is spread; signs are best as they are."""
    gptq, svid = METHODS["rtn"], METHODS["svid"]
    weight = draw(48, 128)
    weight[torch.arange(48), torch.arange(48)] *= 25
    statistics = statistics_of(128, 1.0)
    settings = gptq.config.from_dict({"bits": 3, "group_size": 0})
    chosen = quantize_weight(gptq, weight, statistics, settings, "auto")
    plain = quantize_weight(gptq, weight, statistics, settings, "off")
    assert isinstance(chosen, RotatedLinear)
    assert not isinstance(plain, RotatedLinear)

    def error(layer):
        difference = layer.dequantize() - weight
        return float(((difference @ statistics.hessian_II) * difference).sum())

    assert error(chosen) < 0.5 * error(plain)
    structured = torch.sign(draw(48, 128)) * torch.outer(draw(48, seed=1).abs(), draw(128, seed=2).abs())
    assert isinstance(quantize_weight(svid, structured, statistics, svid.config(), "all"), RotatedLinear)
    assert not isinstance(quantize_weight(svid, structured, statistics, svid.config(), "auto"), RotatedLinear)


def test_an_odd_number_of_inputs_is_left_as_it_is():
    settings = METHODS["svid"].config()
    assert not isinstance(quantize_weight(METHODS["svid"], draw(8, 7), None, settings, "all"), RotatedLinear)

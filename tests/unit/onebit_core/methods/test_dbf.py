"""Double binary factorization: within its bits, as good as published, and nearer to a weight than nanoquant starts."""

import pytest
import torch

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.methods import METHODS
from onebit_core.methods.dbf import DbfConfig, factorize_double, quantize_dbf
from onebit_core.methods.factors import project
from onebit_core.methods.nanoquant import factorize
from onebit_core.methods.second_order import output_error, weight_error


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def white(columns: int) -> InputStatistics:
    return InputStatistics(hessian_II=torch.eye(columns), num_tokens=1)


def decaying(weight: torch.Tensor) -> torch.Tensor:
    """Give a weight singular values 1, 1/2, 1/3, ..."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left @ torch.diag(torch.arange(1, len(values) + 1).float() ** -1.0) @ right


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5, 2.5])
@pytest.mark.parametrize("shape", [(512, 512), (256, 768)])
def test_it_keeps_within_its_bits(bits, shape):
    """True bits, scales and padding included, are at most what was asked for, close to it, and known beforehand."""
    config = DbfConfig(bits=bits, iterations=1)
    true_bits = quantize_dbf(gaussian(*shape), white(shape[1]), config).bits_per_weight()
    assert bits - 0.2 < true_bits <= bits
    assert METHODS["dbf"].true_bits(config, *shape) == true_bits


def test_noise_and_a_decaying_spectrum_cost_what_is_known():
    """One bit of Gaussian noise leaves about a sign matrix's 0.363, a decaying spectrum less than half of that."""
    noise = gaussian(384, 384)
    errors = []
    for weight in (noise, decaying(noise)):
        scaled = weight / weight.abs().mean()
        up, down = factorize_double(scaled, 192, iterations=40, seed=0)
        errors.append(weight_error(scaled, project(up) @ project(down)))
    assert 0.32 < errors[0] < 0.37
    assert errors[1] < 0.5 * errors[0]


def test_inner_steps_pay():
    """With fewer turns than nanoquant it comes nearer to a weight."""
    weight = gaussian(256, 256)
    double, single = factorize_double(weight, 128, 40, 0), factorize(weight, 128, 60, 0)
    errors = [weight_error(weight, project(up) @ project(down)) for up, down in (double, single)]
    assert errors[0] < errors[1]


def test_more_turns_lower_the_error():
    """Each doubling."""
    weight = decaying(gaussian(128, 192))
    scaled = weight / weight.abs().mean()
    factors = [factorize_double(scaled, 96, iterations, 0) for iterations in (5, 20, 80)]
    errors = [weight_error(scaled, project(up) @ project(down)) for up, down in factors]
    assert errors == sorted(errors, reverse=True)


def test_a_weight_and_its_transpose_are_one_problem():
    """Both have the smaller side first, so the same random start leads to the same product."""
    weight = gaussian(64, 96)
    up, down = factorize_double(weight, 32, 10, 0)
    turned_up, turned_down = factorize_double(weight.T, 32, 10, 0)
    assert torch.equal(up @ down, (turned_up @ turned_down).T)


def test_the_layer_is_the_product_that_was_found():
    """Packing projects both factors and rounds scales, no more; the importance of the inputs is divided out again."""
    weight = decaying(gaussian(96, 128)) * 0.05
    statistics = InputStatistics(hessian_II=torch.diag(torch.logspace(-1, 1, 128)), num_tokens=1)
    config = DbfConfig(bits=2.0)
    layer = quantize_dbf(weight, statistics, config)
    root = statistics.hessian_II.diagonal().div(statistics.hessian_II.diagonal().mean()).sqrt()
    scale = weight.abs().mean()
    up, down = factorize_double(weight * root / scale, layer.spec.rank, config.iterations, config.seed)
    wanted = project(up) @ (project(down) / root) * scale
    torch.testing.assert_close(layer.dequantize(), wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))


def test_bits_are_spent_where_inputs_are_large():
    """The error that the inputs see is far lower than it would be for white inputs."""
    weight = gaussian(96, 256)
    statistics = InputStatistics(hessian_II=torch.diag(torch.logspace(-2, 2, 256)), num_tokens=1)
    layers = [quantize_dbf(weight, inputs, DbfConfig(bits=2.0)) for inputs in (statistics, white(256))]
    errors = [output_error(weight, layer.dequantize(), statistics.hessian_II) for layer in layers]
    assert errors[0] < 0.7 * errors[1]


def test_training_starts_from_the_continuous_values():
    """The signs packed are those of what lies behind them."""
    layer = quantize_dbf(gaussian(64, 96), white(96), DbfConfig(bits=2.0, iterations=5))
    assert layer.start["up"].shape == (64, layer.spec.rank)
    assert layer.start["down"].shape == (layer.spec.rank, 96)
    assert float((layer.start["down"].abs()).mean()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 0.05}, "bits 0.05"), ({"iterations": 0}, "iterations 0"), ({"rank": 8}, "unknown option 'rank'")],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    """The message names the option and its value."""
    with pytest.raises(ConfigError, match=message):
        DbfConfig.from_dict(settings)


def test_bits_that_leave_no_rank_are_refused():
    """The shape is in the message."""
    with pytest.raises(ConfigError, match="too few for a 64 x 64 weight"):
        METHODS["dbf"].check(DbfConfig(bits=0.5), 64, 64)

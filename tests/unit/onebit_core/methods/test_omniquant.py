"""Learned weight clipping: no row ends worse than rounding, the gradient is that of autograd, and nothing is NaN."""

import itertools

import pytest
import torch

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.layers.grid import grid_of_range
from onebit_core.methods import METHODS
from onebit_core.methods.omniquant import OmniquantConfig, quantize_omniquant, slope_of_ends
from onebit_core.methods.rtn import RtnConfig, quantize_rtn
from onebit_core.methods.second_order import output_error
from tests.support.problems import correlated_problem


def row_errors(weight: torch.Tensor, decided: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """Return the output error of each row, in float64."""
    rest = (weight - decided).double()
    return ((rest @ statistics.hessian_II.double()) * rest).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rate", [0.1, 100.0])
@pytest.mark.parametrize("group_size", [0, 32])
def test_no_row_ends_worse_than_plain_rounding(bits, rate, group_size):
    """Also with a rate that is far too large, and for weights with outliers."""
    weight, statistics = correlated_problem(rows=24, columns=96, uneven=0.5)
    weight[3, 5], weight[4, :] = 3.0, weight[4, :] ** 3
    plain = quantize_rtn(weight, None, RtnConfig(bits=bits, group_size=group_size)).dequantize()
    config = OmniquantConfig(bits=bits, group_size=group_size, rate=rate)
    learned = quantize_omniquant(weight, statistics, config).dequantize()
    before, after = row_errors(weight, plain, statistics), row_errors(weight, learned, statistics)
    assert (after <= 1.0001 * before).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_learned_ranges_beat_searched_ones(bits):
    """At the same bits the output error is far below that of ranges searched for the least squared error."""
    weight, statistics = correlated_problem(rows=64, columns=256)
    learned = quantize_omniquant(weight, statistics, OmniquantConfig(bits=bits))
    searched = quantize_rtn(weight, None, RtnConfig(bits=bits, search=True))
    assert learned.spec == searched.spec
    errors = [output_error(weight, layer.dequantize(), statistics.hessian_II) for layer in (learned, searched)]
    assert errors[0] < 0.8 * errors[1]


def test_more_steps_never_do_harm():
    """The best of more grids is no worse."""
    weight, statistics = correlated_problem(rows=16, columns=64)
    errors = [
        output_error(
            weight,
            quantize_omniquant(weight, statistics, OmniquantConfig(steps=steps)).dequantize(),
            statistics.hessian_II,
        )
        for steps in (0, 1, 5, 20, 60)
    ]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_the_gradient_is_that_of_autograd(bits):
    """Rounding passed straight through, clipping not; float16 scales included."""
    weight, statistics = correlated_problem(rows=12, columns=32)
    hessian, steps = statistics.hessian_II, 2**bits - 1
    ends = torch.stack([0.6 * weight.amin(1), 0.7 * weight.amax(1)]).requires_grad_()

    def through(values: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return values + (rounded - values).detach()

    low, high = ends
    step = (high - low) / steps
    scale = through(step, step.half().float())[:, None]
    zero = through(-low[:, None] / scale, torch.round(-low[:, None] / scale))
    codes = through(weight / scale, torch.round(weight / scale)) + zero
    error = weight - scale * (codes.clamp(0, steps) - zero)
    ((error @ hessian) * error).sum().backward()

    fixed = ends.detach()
    grid = grid_of_range(fixed[0], fixed[1], bits)
    torch.testing.assert_close(grid.dequantize(grid.quantize(weight)), (weight - error).detach())
    slope = slope_of_ends(weight, grid, fixed[0], error.detach() @ hessian)
    torch.testing.assert_close(slope, ends.grad, rtol=1e-3, atol=1e-3 * float(ends.grad.abs().max()))


def test_an_outlier_that_inputs_never_see_is_clipped():
    """A weight on a dead input stretches the plain range of its group; the learned range leaves it out."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=draw)
    weight[:, 7] = 20.0
    power = torch.ones(64)
    power[7] = 0.0
    statistics = InputStatistics(hessian_II=torch.diag(power), num_tokens=1)
    layer = quantize_omniquant(weight, statistics, OmniquantConfig(bits=3, steps=200))
    assert float(layer.dequantize()[:, 7].max()) < 8.0
    assert output_error(weight, layer.dequantize(), statistics.hessian_II) < 0.1


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("size", [1e-30, 1e37])
def test_few_bits_and_extreme_inputs_give_no_nan(bits, size):
    """Where errors overflow or vanish, the layer is finite and no worse than plain rounding."""
    weight, statistics = correlated_problem(rows=8, columns=64)
    weight[0], weight[1] = 0.0, 0.25
    extreme = InputStatistics(hessian_II=statistics.hessian_II * size, num_tokens=1)
    decided = quantize_omniquant(weight, extreme, OmniquantConfig(bits=bits)).dequantize()
    plain = quantize_rtn(weight, None, RtnConfig(bits=bits)).dequantize()
    assert torch.isfinite(decided).all()
    assert (row_errors(weight, decided, statistics) <= 1.0001 * row_errors(weight, plain, statistics)).all()


def test_the_bits_are_those_of_the_formula():
    """Known beforehand: B + (16 + B) / group."""
    assert METHODS["omniquant"].true_bits(OmniquantConfig(bits=3, group_size=64), 128, 256) == 3 + (16 + 3) / 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": 0}, "bits 0"), ({"steps": -1}, "steps -1"), ({"rate": 0.0}, "rate 0.0"), ({"lwc": True}, "'lwc'")],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    """The message names the option and its value."""
    with pytest.raises(ConfigError, match=message):
        OmniquantConfig.from_dict(settings)

"""Every method takes what real models contain: layers that are never reached, rows of zeros, constant columns."""

import pytest
import torch

from onebit_core.calibration.statistics import InputStatistics, StatisticsAccumulator
from onebit_core.layers import QuantizedLinear
from onebit_core.methods import METHODS
from onebit_core.methods.second_order import output_error, weight_error
from tests.support.quantized import SETTINGS

ROWS, COLUMNS = 8, 64


def weights() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def correlated() -> torch.Tensor:
    """Inputs [T, I] whose features share a few directions."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(300, 16, generator=draw) @ torch.randn(16, COLUMNS, generator=draw) + 0.3


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    return InputStatistics(hessian_II=inputs.T @ inputs / max(len(inputs), 1), num_tokens=len(inputs))


def quantize(name: str, weight: torch.Tensor, statistics: InputStatistics) -> QuantizedLinear:
    method = METHODS[name]
    return method.quantize(weight, statistics, method.config.from_dict(SETTINGS[name]))


@pytest.mark.parametrize("name", METHODS)
def test_a_dead_layer_is_quantized_as_with_white_inputs(name):
    """All inputs zero say nothing about the weight, which may be needed all the same: it is kept about as well."""
    white = quantize(name, weights(), statistics_of(torch.eye(COLUMNS) * COLUMNS**0.5))
    dead = quantize(name, weights(), StatisticsAccumulator(COLUMNS).finish())
    assert torch.isfinite(dead.dequantize()).all()
    errors = [weight_error(weights(), layer.dequantize()) for layer in (white, dead)]
    assert errors[1] <= 1.25 * errors[0]
    assert output_error(weights(), dead.dequantize(), torch.zeros(COLUMNS, COLUMNS)) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_row_of_zeros_stays_zero(name):
    """An output that is switched off is not switched on, and the other rows are as good as they were."""
    weight, statistics = weights(), statistics_of(correlated())
    whole = quantize(name, weight, statistics).dequantize()
    others = torch.arange(ROWS) != 3
    pruned = torch.where(others[:, None], weight, 0.0)
    decided = quantize(name, pruned, statistics).dequantize()
    assert not decided[3].any()
    assert torch.isfinite(decided).all()
    assert weight_error(weight[others], decided[others]) <= 1.3 * weight_error(weight[others], whole[others])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_an_input_that_is_constant_does_no_harm(name, value):
    """A feature that is the same for every token, zero included: the output is as good as with inputs unknown."""
    inputs = correlated()
    inputs[:, 5] = value
    decided = quantize(name, weights(), statistics_of(inputs)).dequantize()
    assert torch.isfinite(decided).all()
    white = quantize(name, weights(), statistics_of(torch.eye(COLUMNS) * COLUMNS**0.5)).dequantize()
    hessian = statistics_of(inputs).hessian_II
    assert output_error(weights(), decided, hessian) <= 2 * output_error(weights(), white, hessian)


@pytest.mark.parametrize("name", METHODS)
def test_a_constant_column_of_weights_is_kept(name):
    """A column of equal weights, far larger than the others, is stored to within a tenth."""
    weight = weights()
    weight[:, 5] = 0.5
    decided = quantize(name, weight, statistics_of(correlated())).dequantize()
    assert torch.isfinite(decided).all()
    assert ((decided[:, 5] - 0.5).abs() < 0.05).all()

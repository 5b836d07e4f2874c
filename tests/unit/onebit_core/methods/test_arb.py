"""ARB refines scales in turn: exact where it can be, never worse for another turn, better than BiLLM for less."""

import itertools

import pytest
import torch

from onebit_core.errors import ConfigError
from onebit_core.methods import METHODS
from onebit_core.methods.arb import ARB, ArbConfig, fit_groups, fit_second_order, nearest_signs, quantize_arb
from onebit_core.methods.billm import BILLM, BillmConfig, quantize_billm
from onebit_core.methods.second_order import output_error
from tests.support.problems import correlated_problem


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups_weight(row_2O: torch.Tensor, column_K: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest of +-small and +-large, by trying all four."""
    values = torch.stack([sign * row_2O[place, :, None] * column_K for place in range(2) for sign in (-1.0, 1.0)])
    choice = (values - weight).abs().argmin(0, keepdim=True)
    return values.gather(0, choice)[0]


def order_weight(row_2O: torch.Tensor, column_2K: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest of the four sums, by trying all."""
    first, second = (row[:, None] * column for row, column in zip(row_2O, column_2K, strict=True))
    values = torch.stack([s * first + t * second for s in (-1.0, 1.0) for t in (-1.0, 1.0)])
    return values.gather(0, (values - weight).abs().argmin(0, keepdim=True))[0]


def test_magnitudes_of_two_groups_with_column_scales_come_back():
    """c_j * (b_i or r_i), both signs."""
    small, column = draw(9).abs() * 0.1 + 0.4, draw(40, seed=1).abs() * 0.2 + 0.9
    is_large = draw(9, 40, seed=2) > 0.3
    magnitude = torch.where(is_large, 4 * small[:, None], small[:, None]) * column
    weight = magnitude * draw(9, 40, seed=3).sign()
    scales = fit_groups(weight, torch.ones(40), 30)
    torch.testing.assert_close(groups_weight(scales.row_2O, scales.column_2K[0], weight), weight, rtol=2e-3, atol=0)


def test_sums_of_two_scaled_signs_come_back():
    """s_ij r_i c_j + t_ij b_i d_j."""
    row, column = draw(9).abs() * 0.1 + 1.0, draw(12, seed=1).abs() * 0.1 + 1.0
    inner_row, inner_column = draw(9, seed=2).abs() * 0.05 + 0.3, draw(12, seed=3).abs() * 0.1 + 1.0
    signs = draw(2, 9, 12, seed=4).sign()
    weight = signs[0] * torch.outer(row, column) + signs[1] * torch.outer(inner_row, inner_column)
    scales = fit_second_order(weight, torch.ones(12), 60)
    torch.testing.assert_close(order_weight(*scales, weight), weight, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("kind", ["groups", "order"])
def test_another_turn_never_raises_the_error(kind):
    """The error that is minimized, weighted by column, up to the rounding of scales."""
    weight, cost = draw(16, 48) * draw(1, 48, seed=1).exp(), draw(48, seed=2).exp()
    errors = []
    for turns in range(1, 12):
        if kind == "groups":
            scales = fit_groups(weight, cost, turns)
            decided = groups_weight(scales.row_2O, scales.column_2K[0], weight)
        else:
            decided = order_weight(*fit_second_order(weight, cost, turns), weight)
        errors.append(float(((weight - decided).square() * cost).sum()))
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]


def test_two_signs_are_those_of_the_nearest_sum():
    """Also where the second scale is the larger one in some columns."""
    weight, row, column = draw(6, 20), draw(2, 6, seed=1).abs(), draw(2, 20, seed=2).abs()
    signs = nearest_signs(weight, row, column)
    decided = sum(signs[k] * torch.outer(row[k], column[k]) for k in range(2))
    torch.testing.assert_close(decided, order_weight(row, column, weight))


@pytest.mark.parametrize("feedback", ["block", "column"])
@pytest.mark.parametrize("seed", range(2))
def test_it_loses_less_than_billm_at_fewer_bits(seed, feedback):
    """On weights whose rows and columns differ in scale, which is what its column scales are for."""
    weight, statistics = correlated_problem(rows=128, columns=256, seed=seed, uneven=0.5)
    refined = quantize_arb(weight, statistics, ArbConfig(feedback=feedback))
    plain = quantize_billm(weight, statistics, BillmConfig(feedback=feedback))
    errors = [output_error(weight, layer.dequantize(), statistics.hessian_II) for layer in (refined, plain)]
    assert errors[0] < 0.7 * errors[1]
    assert ARB.true_bits(ArbConfig(), 4096, 4096) < BILLM.true_bits(BillmConfig(), 4096, 4096)


def test_bits_are_counted_honestly():
    """Two bits, four numbers of 16 bits per row and block, two per column, an index."""
    config = ArbConfig(salient=4)
    assert ARB.true_bits(config, 4096, 4096) == 2 + 4 * 16 / 128 + (2 * 16 + 1) / 4096
    assert ARB.nominal_bits(config) == 1 + 4 / 128


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (3, 48), (7, 288), (16, 256)])
def test_what_is_stored_is_known_before(rows, columns):
    """Where the number of salient columns is given, the spec follows from the settings."""
    weight, statistics = correlated_problem(rows=rows, columns=columns)
    config = ArbConfig(salient=3)
    assert quantize_arb(weight, statistics, config).spec == ARB.spec(config, rows, columns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"salient": -1}, "salient -1"), ({"iterations": 0}, "iterations 0"), ({"damping": 0.0}, "damping")],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    """The message names the option and its value."""
    with pytest.raises(ConfigError, match=message):
        METHODS["arb"].config.from_dict(settings)

"""BiLLM stores what it says, in the bits it really takes, and its choices rank as measured."""

import pytest
import torch

from onebit_core.errors import ConfigError
from onebit_core.methods import METHODS
from onebit_core.methods.billm import BILLM, BillmConfig, quantize_billm
from onebit_core.methods.second_order import output_error
from tests.support.problems import correlated_problem


def test_a_row_has_four_values_in_salient_columns_and_four_in_the_others():
    """Per block; blocks of 96 where 128 does not divide the row."""
    weight, statistics = correlated_problem(rows=12, columns=288)
    layer = quantize_billm(weight, statistics, BillmConfig(salient=5))
    dense = layer.dequantize()
    first, second = layer.columns()
    assert [int(((first >= start) & (first < start + 96)).sum()) for start in (0, 96, 192)] == [5, 5, 5]
    for columns in (first, second):
        for start in (0, 96, 192):
            block = dense[:, columns[(columns >= start) & (columns < start + 96)]]
            assert max(len(row.unique()) for row in block) <= 4


def test_two_salient_columns_of_a_block_are_exact():
    """A mean and a deviation hold two numbers; the first block has seen no feedback."""
    weight, statistics = correlated_problem(rows=12, columns=256)
    layer = quantize_billm(weight, statistics, BillmConfig(salient=2))
    salient = layer.columns()[0][:2]
    torch.testing.assert_close(layer.dequantize()[:, salient], weight[:, salient], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_feedback_ranks_as_it_should(seed):
    """Inside of blocks too is better than between blocks, and that better than none."""
    weight, statistics = correlated_problem(seed=seed)
    moments = statistics.hessian_II
    uncorrelated = type(statistics)(hessian_II=torch.diag(moments.diagonal()), num_tokens=1)
    none = quantize_billm(weight, uncorrelated, BillmConfig(salient=4)).dequantize()
    block, column = (
        quantize_billm(weight, statistics, BillmConfig(salient=4, feedback=feedback)).dequantize()
        for feedback in ("block", "column")
    )
    errors = [output_error(weight, decided, moments) for decided in (none, block, column)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_chosen_number_is_close_to_the_best(seed):
    """The error seen before feedback says which number is good after it."""
    weight, statistics = correlated_problem(rows=64, columns=256, seed=seed)

    def error(salient: int) -> float:
        decided = quantize_billm(weight, statistics, BillmConfig(salient=salient)).dequantize()
        return output_error(weight, decided, statistics.hessian_II)

    assert error(0) < 1.05 * min(error(count) for count in (1, 2, 3, 4, 6, 8, 16))


def test_bits_are_counted_honestly():
    """Two bits, seven numbers of 16 bits per row and block of 128, an index; not the paper's 1.09."""
    config = BillmConfig(salient=4)
    true_bits = BILLM.true_bits(config, 4096, 4096)
    assert true_bits == 2 + 7 * 16 / 128 + 1 / 4096
    assert BILLM.nominal_bits(config) == 1 + 4 / 128
    assert BILLM.nominal_bits(BillmConfig()) == 1.09


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (3, 48), (7, 288), (16, 256)])
def test_what_is_stored_is_known_before(rows, columns):
    """Where the number of salient columns is given, the spec follows from the settings."""
    weight, statistics = correlated_problem(rows=rows, columns=columns)
    config = BillmConfig(salient=3)
    assert quantize_billm(weight, statistics, config).spec == BILLM.spec(config, rows, columns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"salient": -1}, "salient -1"),
        ({"thresholds": 0}, "thresholds 0"),
        ({"damping": 0.0}, "damping"),
        ({"feedback": "none"}, "not one of 'block', 'column'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    """The message names the option and its value."""
    with pytest.raises(ConfigError, match=message):
        METHODS["billm"].config.from_dict(settings)

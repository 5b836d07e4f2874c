"""Whole columns in codes beside signs: ptq161, and pb_llm with whole columns or as many weights a block."""

import pytest
import torch

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.kernels import unpack_signs
from onebit_core.methods import METHODS
from onebit_core.methods.pb_llm import PB_LLM, PbLlmConfig, quantize_pb_llm
from onebit_core.methods.ptq161 import PTQ161, Ptq161Config, quantize_ptq161
from onebit_core.methods.second_order import inverse_factor, output_error
from onebit_core.methods.sign_columns import fine_columns
from tests.support.problems import correlated_problem


def test_columns_with_the_largest_inputs_get_codes():
    """A fifth of them, in whole groups."""
    weight, statistics = correlated_problem(rows=8, columns=320)
    layer = quantize_ptq161(weight, statistics, Ptq161Config())
    largest = statistics.hessian_II.diagonal().topk(64).indices
    assert layer.columns()[0].tolist() == sorted(largest.tolist())
    assert [part.format for part in layer.spec.parts] == ["grouped_int", "sign"]
    assert layer.spec.parts[0].planes == 4


@pytest.mark.parametrize(
    ("ratio", "group_size", "columns", "count"),
    [(0.2, 64, 576, 128), (0.2, 64, 4096, 832), (0.2, 64, 64, 13), (0.2, 0, 576, 115), (0.001, 64, 64, 1)],
)
def test_the_share_is_rounded_to_whole_groups(ratio, group_size, columns, count):
    """Narrow layers have one smaller group."""
    assert fine_columns(ratio, group_size, columns) == count


def test_a_weight_that_can_be_stored_comes_back():
    """Signs over a rank-one magnitude, and codes on a grid that holds them."""
    rows, columns = 6, 80
    draw = torch.Generator().manual_seed(0)
    statistics = InputStatistics(hessian_II=torch.diag(torch.arange(columns, 0, -1).float()), num_tokens=1)
    weight = torch.outer(torch.rand(rows, generator=draw) + 0.5, torch.rand(columns, generator=draw) + 0.5)
    weight *= torch.where(torch.rand(rows, columns, generator=draw) < 0.5, -1.0, 1.0)
    weight[:, :16] = torch.randint(-8, 8, (rows, 16), generator=draw) / 16
    weight[:, 0], weight[:, 1] = -0.5, 7 / 16
    layer = quantize_ptq161(weight, statistics, Ptq161Config(ratio=0.2, group_size=0))
    torch.testing.assert_close(layer.dequantize(), weight, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("uneven", [0.0, 0.5])
def test_feedback_lowers_the_error(seed, uneven):
    """By half and more where inputs are correlated; without correlation it changes next to nothing."""
    weight, statistics = correlated_problem(seed=seed, uneven=uneven)
    moments = statistics.hessian_II
    with_feedback, without = (
        quantize_ptq161(weight, statistics, Ptq161Config(feedback=feedback)).dequantize() for feedback in (True, False)
    )
    assert output_error(weight, with_feedback, moments) < 0.6 * output_error(weight, without, moments)


def test_no_other_row_scale_or_column_scale_would_be_better():
    """Signs as they are, what codes cannot take over taken off: the error rises whichever scale moves."""
    weight, statistics = correlated_problem(rows=24, columns=128)
    layer = quantize_ptq161(weight, statistics, Ptq161Config(damping=0.01))
    _, coarse = layer.columns()
    signs = layer.parts[1]
    h, g = signs.scale_out[0].double(), signs.scale_in[0].double()
    signs_OC = unpack_signs(signs.signs, len(coarse))[0].double()
    moments = statistics.hessian_II.double()
    inverse = (moments + 0.01 * moments.diagonal().mean() * torch.eye(128)).inverse()
    metric = inverse[coarse][:, coarse].inverse()  # of the coarse columns, if the fine ones are free

    def error(h_O: torch.Tensor, g_C: torch.Tensor) -> float:
        left = weight[:, coarse].double() - signs_OC * torch.outer(h_O, g_C)
        return float(((left @ metric) * left).sum())

    least = error(h, g)
    for factor in (0.97, 1.03):
        for row in range(24):
            moved = h.clone()
            moved[row] *= factor
            assert error(moved, g) > least
        for turn in range(10):
            direction = torch.randn(len(coarse), generator=torch.Generator().manual_seed(turn)).double()
            assert error(h, g * (1 + (factor - 1) * direction)) > least


def test_codes_take_over_what_signs_leave():
    """Against the same layer whose codes are rounded from the weights as they were."""
    weight, statistics = correlated_problem()
    layer = quantize_ptq161(weight, statistics, Ptq161Config(bits=8, ratio=0.5))
    fine, _ = layer.columns()
    moved = layer.dequantize()
    rounded = moved.clone()
    rounded[:, fine] = weight[:, fine]
    moments = statistics.hessian_II
    assert output_error(weight, moved, moments) < 0.5 * output_error(weight, rounded, moments)


def test_bits_are_counted_honestly():
    """4 bits in 832 of 4096 columns, a sign in the others, scales, an index; the paper says 1.6."""
    share = 832 / 4096
    expected = 4 * share + (1 - share) + share * 20 / 64 + (1 - share) * 16 / 4096 + 16 / 4096 + 1 / 4096
    assert PTQ161.true_bits(Ptq161Config(), 4096, 4096) == pytest.approx(expected)
    assert PTQ161.nominal_bits(Ptq161Config()) == pytest.approx(1.6)


@pytest.mark.parametrize("settings", [{}, {"group_size": 0}, {"bits": 8, "ratio": 0.4, "group_size": 16}])
@pytest.mark.parametrize("columns", [48, 100, 320])
def test_what_is_stored_is_known_before(settings, columns):
    """The spec follows from the settings."""
    weight, statistics = correlated_problem(rows=5, columns=columns)
    config = Ptq161Config(**settings)
    assert quantize_ptq161(weight, statistics, config).spec == PTQ161.spec(config, 5, columns)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": 1.0}, "ratio 1.0"),
        ({"bits": 9}, "bits 9"),
        ({"group_size": 1}, "group_size 1"),
        ({"iterations": 0}, "iterations 0"),
        ({"damping": 0.0}, "damping"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    """The message names the option and its value."""
    with pytest.raises(ConfigError, match=message):
        METHODS["ptq161"].config.from_dict(settings)


def test_a_share_that_leaves_no_signs_is_refused():
    """With the numbers that it would give."""
    with pytest.raises(ConfigError, match="4 bits to 128 of 128 columns"):
        PTQ161.check(Ptq161Config(ratio=0.9), 8, 128)


@pytest.mark.parametrize("granularity", ["element", "fixed", "column"])
@pytest.mark.parametrize("base", ["svid", "row"])
@pytest.mark.parametrize("columns", [96, 256, 288])
def test_each_granularity_of_pb_llm_stores_what_it_says(granularity, base, columns):
    """The spec is known before, and the salient share is about the ratio."""
    weight, statistics = correlated_problem(rows=32, columns=columns)
    config = PbLlmConfig(granularity=granularity, base=base)
    layer = quantize_pb_llm(weight, statistics, config)
    assert layer.spec == PB_LLM.spec(config, 32, columns)
    salient = layer.spec.parts[0].in_features * 32 if layer.spec.parts else layer.spec.salient.count
    assert 0.05 < salient / weight.numel() < 0.15 if columns > 96 else salient > 0


def test_fixed_keeps_as_many_weights_in_every_row_and_block_and_needs_no_counts():
    """A byte of index for each salient weight, and nothing else."""
    weight, statistics = correlated_problem(rows=16, columns=288)
    layer = quantize_pb_llm(weight, statistics, PbLlmConfig(granularity="fixed"))
    rows, columns = layer.salient.places()
    counts = torch.zeros(16, 3).index_put_((rows, columns // 96), torch.ones(len(rows)), accumulate=True)
    assert (counts == 10).all()
    index = sum(tensor.nbytes for _, part, tensor in layer.stored_tensors() if part == "index")
    assert index == 16 * 3 * 10
    score = weight.abs() / inverse_factor(statistics.hessian_II, 0.01).diagonal()
    kept = score[rows, columns].view(16, 3, 10)
    torch.testing.assert_close(kept.sum(2), score.view(16, 3, 96).topk(10, dim=2).values.sum(2))


def test_places_cost_less_the_coarser_they_are():
    """At one ratio: weights anywhere lose least and cost most, whole columns the other way round."""
    weight, statistics = correlated_problem(rows=64, columns=1024)
    errors, bits = [], []
    for granularity in ("element", "fixed", "column"):
        layer = quantize_pb_llm(weight, statistics, PbLlmConfig(granularity=granularity, ratio=0.1))
        errors.append(output_error(weight, layer.dequantize(), statistics.hessian_II))
        bits.append(layer.bits_per_weight())
    assert errors == sorted(errors)
    assert bits == sorted(bits, reverse=True)

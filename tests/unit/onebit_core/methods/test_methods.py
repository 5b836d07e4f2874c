"""What every method promises: it stores what it decided, beats what it must beat, and repeats its golden numbers."""

import dataclasses

import pytest
import torch

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, build_layer
from onebit_core.methods import METHODS, method_named
from onebit_core.methods.factors import project
from onebit_core.methods.gptq import GptqConfig, quantize_gptq
from onebit_core.methods.lut2 import Lut2Config, quantize_lut2
from onebit_core.methods.nanoquant import NanoquantConfig, factorize, quantize_nanoquant
from onebit_core.methods.pb_llm import PbLlmConfig, quantize_pb_llm
from onebit_core.methods.rtn import RtnConfig, quantize_rtn
from onebit_core.methods.second_order import output_error, weight_error
from onebit_core.methods.svid import SvidConfig, quantize_svid
from tests.support.golden import golden_cases, golden_file, render_golden


def problem(rows: int = 48, columns: int = 256, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    """A Gaussian weight and correlated inputs with a power-law spectrum."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) * 0.02
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=draw))
    spectrum = torch.arange(1, columns + 1).float() ** -1.0
    hessian = (basis * spectrum) @ basis.T
    return weight, InputStatistics(hessian_II=(hessian + hessian.T) / 2, num_tokens=1000)


def settings_of(name: str):
    small = {
        "rtn": {"group_size": 32},
        "gptq": {"group_size": 32},
        "nanoquant": {"bits": 3.0, "iterations": 20},
        "dbf": {"bits": 3.0, "iterations": 10},
        "omniquant": {"group_size": 32, "steps": 10},
    }.get(name, {})
    return METHODS[name].config.from_dict(small)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_survives_its_tensors(name):
    """Rebuilt from spec and tensors, the layer stands for the same weight."""
    weight, statistics = problem()
    layer = METHODS[name].quantize(weight, statistics, settings_of(name))
    rebuilt = build_layer(LayerSpec.from_dict(layer.spec.to_dict()))
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt.dequantize(), layer.dequantize())
    assert torch.isfinite(layer.dequantize()).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_same_input_gives_the_same_bits(name):
    """No hidden randomness."""
    weight, statistics = problem()
    first, second = (METHODS[name].quantize(weight, statistics, settings_of(name)) for _ in range(2))
    assert all(torch.equal(first.state_dict()[key], value) for key, value in second.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_weight_is_not_modified(name):
    """The caller's tensor stays as it was."""
    weight, statistics = problem()
    before = weight.clone()
    METHODS[name].quantize(weight, statistics, settings_of(name))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["zero", "dead_inputs", "constant_column", "one_row"])
def test_awkward_weights_are_handled(name, kind):
    """All-zero weights, inputs that were never used, constant columns and a single row give finite layers."""
    weight, statistics = problem(rows=1 if kind == "one_row" else 8, columns=64)
    if kind == "zero":
        weight = torch.zeros_like(weight)
    if kind == "constant_column":
        weight[:, 3] = 0.5
    if kind == "dead_inputs":
        hessian = statistics.hessian_II.clone()
        hessian[:, 5] = hessian[5, :] = 0
        statistics = dataclasses.replace(statistics, hessian_II=hessian)
    layer = METHODS[name].quantize(weight, statistics, settings_of(name))
    assert torch.isfinite(layer.dequantize()).all()
    assert (weight - layer.dequantize()).norm() <= max(1.2 * float(weight.norm()), 1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_beats_rounding(bits):
    """GPTQ's output error is below RTN's on the same grid size."""
    weight, statistics = problem()
    rounded = quantize_rtn(weight, None, RtnConfig(bits=bits, group_size=64)).dequantize()
    fed_back = quantize_gptq(weight, statistics, GptqConfig(bits=bits, group_size=64)).dequantize()
    hessian = statistics.hessian_II
    assert output_error(weight, fed_back, hessian) < 0.6 * output_error(weight, rounded, hessian)


@pytest.mark.parametrize("option", ["act_order", "search"])
def test_gptq_options_help_on_average(option):
    """Column order and range search lower the output error, summed over several weights."""
    plain = changed = 0.0
    for seed in range(4):
        weight, statistics = problem(seed=seed)
        for config in (GptqConfig(bits=2), GptqConfig(bits=2, **{option: True})):
            error = output_error(weight, quantize_gptq(weight, statistics, config).dequantize(), statistics.hessian_II)
            plain, changed = (plain + error, changed) if config == GptqConfig(bits=2) else (plain, changed + error)
    assert changed < plain


@pytest.mark.parametrize("group_size", [0, 32, 96, 48, 192])
def test_gptq_takes_any_group_that_divides(group_size):
    """Groups that do not divide 128, and one group per row, still beat rounding."""
    weight, statistics = problem(columns=192)
    fed_back = quantize_gptq(weight, statistics, GptqConfig(bits=4, group_size=group_size)).dequantize()
    rounded = quantize_rtn(weight, None, RtnConfig(bits=4, group_size=group_size)).dequantize()
    assert output_error(weight, fed_back, statistics.hessian_II) < output_error(weight, rounded, statistics.hessian_II)


def test_small_weights_keep_their_levels():
    """Weights of 2e-4 have steps below the smallest normal float16; 8 bits of them are still 8 bits."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 2e-4
    decided = quantize_rtn(weight, None, RtnConfig(bits=8)).dequantize()
    assert weight_error(weight, decided) < 1e-4


def test_svid_is_exact_when_magnitudes_are_rank_one():
    """Signs over a rank-one magnitude come back up to float16 scales."""
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    weight = signs * torch.outer(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 3.0, 0.25]))
    layer = quantize_svid(weight, None, SvidConfig())
    torch.testing.assert_close(layer.dequantize(), weight, rtol=2e-3, atol=0)


def test_svid_error_is_that_of_the_best_rank_one_fit():
    """|W - W_hat| equals the tail of |W|'s singular values."""
    weight, _ = problem()
    error = (weight - quantize_svid(weight, None, SvidConfig(iterations=100)).dequantize()).norm()
    tail = torch.linalg.svdvals(weight.abs())[1:].square().sum().sqrt()
    torch.testing.assert_close(error, tail, rtol=1e-4, atol=0)


def test_svid_on_gaussian_weights_matches_theory():
    """The error of a sign on Gaussian weights is 1 - 2/pi; a second plane leaves about 0.13."""
    weight, _ = problem(rows=512, columns=512)
    one = weight_error(weight, quantize_svid(weight, None, SvidConfig()).dequantize())
    two = weight_error(weight, quantize_svid(weight, None, SvidConfig(planes=2)).dequantize())
    assert abs(one - 0.3634) < 0.005
    assert abs(two - 0.13) < 0.01


def test_svid_importance_lowers_the_error_it_weighs():
    """With importance, columns with large inputs are fitted better."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=draw) * torch.rand(64, 128, generator=draw)
    power = torch.linspace(0.01, 10, 128)
    statistics = InputStatistics(hessian_II=torch.diag(power), num_tokens=1)
    plain = quantize_svid(weight, None, SvidConfig()).dequantize()
    weighted = quantize_svid(weight, statistics, SvidConfig(importance="inputs")).dequantize()
    assert output_error(weight, weighted, statistics.hessian_II) < output_error(weight, plain, statistics.hessian_II)


def test_pb_llm_improves_with_the_ratio_and_costs_what_it_says():
    """More salient weights, less error; 10 % on a large matrix costs 1 + 8r bits plus index and scales."""
    weight, statistics = problem(rows=256, columns=512)
    errors = []
    for ratio in (0.05, 0.1, 0.2, 0.3, 0.5):
        layer = quantize_pb_llm(weight, statistics, PbLlmConfig(ratio=ratio))
        errors.append(output_error(weight, layer.dequantize(), statistics.hessian_II))
        assert layer.spec.salient.count == round(ratio * weight.numel())
    assert errors == sorted(errors, reverse=True)
    assert 2.6 < quantize_pb_llm(weight, statistics, PbLlmConfig(ratio=0.1)).bits_per_weight() < 2.85


def test_pb_llm_choices_rank_as_published():
    """Hessian beats magnitude, feedback beats none, the svid base beats the row base."""
    weight, statistics = problem(rows=128, columns=256)

    def error(**settings) -> float:
        layer = quantize_pb_llm(weight, statistics, PbLlmConfig(ratio=0.2, **settings))
        return output_error(weight, layer.dequantize(), statistics.hessian_II)

    best = error()
    assert best < error(metric="magnitude")
    assert best < error(feedback=False)
    assert best < error(base="row")


def test_pb_llm_keeps_salient_signs():
    """A negative salient weight stays negative (the published 8-bit code flips it)."""
    weight, statistics = problem()
    weight[3, 7] = -5.0
    layer = quantize_pb_llm(weight, statistics, PbLlmConfig(ratio=0.05, metric="magnitude"))
    assert abs(float(layer.dequantize()[3, 7]) + 5.0) < 0.05


def test_lut2_finds_the_levels_of_a_gaussian():
    """Lloyd and Max: a four-level quantizer leaves 0.1175 of a Gaussian's variance; short groups can only do better."""
    weight, _ = problem(rows=64, columns=4096)
    white = InputStatistics(hessian_II=torch.eye(4096), num_tokens=1)
    whole_rows = quantize_lut2(weight, white, Lut2Config(group_size=0, iterations=100)).dequantize()
    groups = quantize_lut2(weight, white, Lut2Config()).dequantize()
    assert abs(weight_error(weight, whole_rows) - 0.1175) < 0.003
    assert weight_error(weight, groups) < weight_error(weight, whole_rows)


def test_lut2_is_exact_on_four_values():
    """A row that holds four numbers is stored as those, wherever they lie."""
    levels = torch.tensor([-1.0, 0.125, 0.25, 4.0])
    places = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)).argsort(1)
    weight = levels[places % 4]
    _, statistics = problem(columns=64)
    assert torch.equal(quantize_lut2(weight, statistics, Lut2Config(iterations=40)).dequantize(), weight)


def test_lut2_beats_evenly_spaced_levels():
    """At fewer bits than gptq with two bits in groups of 64 it loses less."""
    weight, statistics = problem(rows=64, columns=512)
    table = quantize_lut2(weight, statistics, Lut2Config(group_size=256))
    even = quantize_gptq(weight, statistics, GptqConfig(bits=2, group_size=64))
    assert table.bits_per_weight() < even.bits_per_weight()
    errors = [output_error(weight, layer.dequantize(), statistics.hessian_II) for layer in (table, even)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("columns", "wanted", "size"), [(576, 128, 96), (1536, 128, 128), (576, 0, 576), (96, 128, 96)]
)
def test_lut2_cuts_rows_into_equal_groups(columns, wanted, size):
    """The largest group that divides the row and is not above what was asked for."""
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    white = InputStatistics(hessian_II=torch.eye(columns), num_tokens=1)
    assert quantize_lut2(weight, white, Lut2Config(group_size=wanted)).spec.groups == columns // size


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.5, 2.5])
def test_nanoquant_keeps_within_its_bits(bits):
    """True bits, scales and padding included, are at most what was asked for, and close to it."""
    weight, statistics = problem(rows=512, columns=512)
    true_bits = quantize_nanoquant(weight, statistics, NanoquantConfig(bits=bits, iterations=1)).bits_per_weight()
    assert bits - 0.15 < true_bits <= bits


def test_nanoquant_finds_a_spectrum_that_decays():
    """As published: on Gaussian noise a pair of rank 256 is as good as a sign, on a decaying spectrum far better."""
    noise, _ = problem(rows=512, columns=512)
    left, _, right = torch.linalg.svd(noise)
    decaying = left @ torch.diag(torch.arange(1, 513).float() ** -1.0) @ right
    errors = []
    for weight in (noise, decaying):
        scaled = weight / weight.abs().mean()
        up, down = factorize(scaled, 256, iterations=60, seed=0)
        errors.append(weight_error(scaled, project(up) @ project(down)))
    assert 0.32 < errors[0] < 0.37
    assert errors[1] < 0.5 * errors[0]


def test_nanoquant_spends_its_bits_where_inputs_are_large():
    """Without shrinkage the error that the inputs see is lower than with importance switched off."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=draw)
    statistics = InputStatistics(hessian_II=torch.diag(torch.logspace(-2, 2, 256)), num_tokens=1)
    error = {}
    for shrinkage in (0.0, 1.0):
        layer = quantize_nanoquant(weight, statistics, NanoquantConfig(bits=2.0, shrinkage=shrinkage))
        error[shrinkage] = output_error(weight, layer.dequantize(), statistics.hessian_II)
    assert error[0.0] < 0.7 * error[1.0]


ITERATED = ("dbf", "nanoquant")


@pytest.mark.parametrize("case", golden_cases())
def test_golden_numbers(case):
    """The 8x8 result of each method is the committed one.

    Where many iterations follow one another, processors that round otherwise end a thousandth apart.
    """
    found, golden = render_golden(case).splitlines(), golden_file(case).read_text().splitlines()
    assert found[0] == golden[0]
    numbers = [[[float(value) for value in line.split()] for line in lines[1:]] for lines in (found, golden)]
    apart = 3e-3 if case in ITERATED else 1.1e-4
    assert all(row == pytest.approx(wanted, abs=apart) for row, wanted in zip(*numbers, strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rtn", {"bits": 9}, "bits 9"),
        ("rtn", {"bit": 4}, "unknown option 'bit'; known: bits, group_size, search"),
        ("gptq", {"damping": 0.0}, "damping"),
        ("svid", {"planes": 0}, "planes 0"),
        ("svid", {"importance": "hessian"}, "not one of 'none', 'inputs'"),
        ("pb_llm", {"ratio": 0}, "ratio 0"),
        ("pb_llm", {"ratio": 1.0}, "ratio 1.0"),
        ("pb_llm", {"ratio": float("nan")}, "not a finite number"),
        ("pb_llm", {"metric": "random"}, "not one of 'hessian', 'magnitude'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, settings, message):
    """The message names the option and its value."""
    with pytest.raises(ConfigError) as caught:
        METHODS[name].config.from_dict(settings)
    assert message in str(caught.value)


def test_a_group_that_does_not_divide_names_the_nearest():
    """The remedy stands in the message."""
    with pytest.raises(ConfigError, match="nearest that do: 64, 72"):
        METHODS["gptq"].check(GptqConfig(group_size=70), 10, 576)


def test_an_unknown_method_lists_the_known():
    """A typo is answered with the table."""
    with pytest.raises(ConfigError, match="unknown method 'gtpq'; known: rtn, gptq, svid, pb_llm"):
        method_named("gtpq")

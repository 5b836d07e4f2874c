"""Bits go where they save the model most; nothing that was asked for is exceeded, and nothing is left on the table."""

import itertools
from pathlib import Path

import pytest
import torch

from onebit_core.artifact.manifest import Manifest
from onebit_core.artifact.reader import read_manifest, read_report
from onebit_core.errors import ConfigError
from onebit_core.methods import METHODS
from onebit_core.model.blocks import linear_of
from onebit_core.model.loading import load_original, open_original
from onebit_core.pipeline.allocation import Point, allocate
from onebit_core.pipeline.run import quantize_model
from onebit_core.pipeline.sensitivity import measure_sensitivity
from tests.support.quantized import quantize_tiny, tiny_config
from tests.support.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=96, intermediate_size=192)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_within_one_step_of_the_best_of_all_choices(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    points = {}
    for name in "abcde":
        sizes = torch.rand(4, generator=draw).cumsum(0).tolist()
        costs = torch.rand(4, generator=draw).mul(2).exp().sort(descending=True).values.tolist()
        points[name] = [Point(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    low = sum(min(p.size for p in choices) for choices in points.values())
    budget = low + 2.0
    chosen = allocate(points, budget)
    cost = sum(points[name][place].cost for name, place in chosen.items())
    assert sum(points[name][place].size for name, place in chosen.items()) <= budget
    best = min(
        sum(point.cost for point in choice)
        for choice in itertools.product(*points.values())
        if sum(point.size for point in choice) <= budget
    )
    largest_step = max(a.cost - b.cost for choices in points.values() for a, b in itertools.combinations(choices, 2))
    assert best <= cost + 1e-9 <= best + largest_step


def test_a_rung_that_costs_more_bits_and_more_loss_is_never_taken() -> None:
    points = {"a": [Point(1.0, 5.0), Point(2.0, 6.0), Point(3.0, 1.0)], "b": [Point(1.0, 1.0), Point(1.0, 0.5)]}
    assert allocate(points, 4.0) == {"a": 2, "b": 1}
    assert allocate(points, 3.9) == {"a": 0, "b": 1}


def test_sensitivity_predicts_what_a_small_error_costs(model: Path) -> None:
    """Against the divergence itself; a random model is unsure of every label, so its own would do as well as these."""
    original = open_original(str(model))
    draw = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(0, 256, (6, 48), generator=draw)
    original.load_outer("cpu")
    found = {}
    for block in measure_sensitivity(original, lambda _: original.layout.groups, ids_ST, "cpu", 1.0, lambda: None):
        for name in block.importance:
            error_OI = 0.002 * torch.randn(linear_of(block.block, name).weight.shape, generator=draw)
            found[f"model.layers.{block.index}.{name}"] = (error_OI, block.cost(name, error_OI))
    assert len(found) == 14
    whole, _ = load_original(str(model), dtype=torch.float32)
    whole = whole.double()

    @torch.no_grad()
    def log_probabilities() -> torch.Tensor:
        return whole(input_ids=ids_ST).logits[:, :-1].flatten(0, 1).log_softmax(-1)

    before = log_probabilities()
    ratios = []
    for path, (error_OI, predicted) in found.items():
        weight = whole.get_submodule(path).weight.data
        weight += error_OI
        divergence = (before.exp() * (before - log_probabilities())).sum(-1).mean()
        weight -= error_OI
        ratios.append(float(divergence) / predicted)
    # Gradients are of one drawn label a token, not of all, and the two factors are taken as independent.
    assert all(1 / 8 < ratio < 8 for ratio in ratios), ratios
    assert 0.6 < sorted(ratios)[len(ratios) // 2] < 1.7, ratios


@pytest.mark.parametrize(("method", "bits"), [("gptq", 3.9), ("svid", 2.5), ("nanoquant", 2.6), ("pb_llm", 3.0)])
def test_an_average_of_bits_is_kept_and_used(model: Path, tmp_path: Path, method: str, bits: float) -> None:
    settings = {"group_size": 32} if method == "gptq" else {}
    artifact = quantize_tiny(model, tmp_path / "artifact", method, bits=bits, settings=settings)
    manifest = read_manifest(artifact)
    assert bits - 0.35 < manifest.bits.linear_true <= bits
    assert len({layer.bits for layer in read_report(artifact).layers}) > 2
    assert manifest.allocation["expected_loss"] < manifest.allocation["uniform_loss"]
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def test_a_run_that_continues_takes_the_choice_it_made(model: Path, tmp_path: Path) -> None:
    config = tiny_config(model, "gptq", bits=3.9, settings={"group_size": 32})
    first = quantize_model(config, tmp_path / "first", work=tmp_path / "work")
    kept = tmp_path / "work" / "allocation.json"
    before = kept.read_text()
    second = quantize_model(config, tmp_path / "second", work=tmp_path / "work")
    assert kept.read_text() == before
    assert read_manifest(first).sha256 == read_manifest(second).sha256


@pytest.mark.parametrize(
    ("method", "bits", "words"),
    [("gptq", 1.2, "the nearest is 2.5"), ("gptq", 12.0, "the nearest is 8."), ("gptq", 0, "above 0")],
)
def test_bits_that_cannot_be_had_are_refused_with_the_nearest(
    model: Path, tmp_path: Path, method: str, bits: float, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        quantize_tiny(model, tmp_path / "artifact", method, bits=bits, settings={"group_size": 32})
    assert not (tmp_path / "artifact").exists()


COUNTED: dict[str, dict[str, object]] = {"billm": {"salient": 4}, "arb": {"salient": 4}}
"""Settings of methods that otherwise count for themselves how many columns to keep apart."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(128, 128), (96, 192), (192, 96), (40, 256)])
def test_what_will_be_stored_is_known_before_any_work(method: str, shape: tuple[int, int]) -> None:
    from onebit_core.calibration.statistics import StatisticsAccumulator

    _, columns = shape
    draw = torch.Generator().manual_seed(0)
    accumulator = StatisticsAccumulator(columns)
    accumulator.add(torch.randn(2, 64, columns, generator=draw))
    statistics, weight_OI = accumulator.finish(), torch.randn(shape, generator=draw)
    row = METHODS[method]
    tried = 0
    base = row.config.from_dict(COUNTED.get(method, {}))
    for settings in (base, *(rung.trial for rung in row.ladder(base))):
        try:
            row.check(settings, *shape)
        except ConfigError:
            continue
        tried += 1
        layer = row.quantize(weight_OI, statistics, settings)
        assert layer.spec == row.spec(settings, *shape)
        assert layer.bits_per_weight() == pytest.approx(row.true_bits(settings, *shape))
    assert tried or shape != (128, 128)

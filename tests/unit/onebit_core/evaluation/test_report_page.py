"""The page: complete, self-contained, and deaf to whatever names a file may carry."""

import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from onebit_core.artifact.manifest import Accuracy, LayerReport, Report
from onebit_core.evaluation.plots import layer_errors
from onebit_core.evaluation.report_page import layer_notes, parts_of, render_page, worst_layers
from tests.support.sample_report import sample_manifest, sample_report, sample_task


def test_page_needs_nothing_from_outside() -> None:
    """No script, no link, no image, no address to fetch."""
    page = render_page(sample_manifest(), sample_report())

    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)|\bsrc=", page, re.IGNORECASE)
    addresses = set(re.findall(r'href="(?!#)([^"]*)"', page))
    assert addresses == set()


def test_page_escapes_names_from_files() -> None:
    """Neither the artifact's name, nor a layer's, nor a data set's becomes markup."""
    evil = "<script>alert(1)</script>$x_1$"
    report = sample_report()
    layers = tuple(replace(layer, projection=evil, name=evil) for layer in report.layers)
    evaluation = tuple(replace(result, dataset=evil) for result in report.evaluation)
    tasks = (replace(sample_task(evil), versions={"lm_eval": evil}), sample_task())
    manifest = replace(sample_manifest(), name=evil, settings={evil: evil}, bytes_by_part={evil: 7})

    page = render_page(manifest, Report(layers=layers, evaluation=evaluation, tasks=tasks))

    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page


def test_pictures_are_well_formed_and_take_the_pages_colours() -> None:
    """Six pictures; each parses as XML and writes its text in the current colour."""
    page = render_page(sample_manifest(), replace(sample_report(), tasks=(sample_task(),)))
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)

    assert len(pictures) == 6
    for picture in pictures:
        ET.fromstring(picture)
        assert "currentColor" in picture


def test_page_shows_what_was_measured() -> None:
    """Perplexities, bits and the worst layer stand in it."""
    page = render_page(sample_manifest(), sample_report())

    for shown in ("20.85", "24.47", "4.31", "model.layers.1.mlp.down_proj", "wikitext2"):
        assert shown in page


def test_page_shows_zero_shot_results_and_their_mean() -> None:
    """Accuracies with errors, the paired change, and how many of the questions were asked."""
    better = replace(sample_task("piqa"), original=Accuracy(value=0.6, standard_error=0.01), original_norm=None)
    page = render_page(sample_manifest(), Report(tasks=(sample_task(), better)))
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))

    assert "arc_easy 400 of 2376 25 58.2 ± 2.5 55.8 ± 2.5 -2.5 ± 1.1 51.2 → 49.8 87.5 ± 1.7" in text
    assert "piqa 400 of 2376 25 60.0 ± 1.0 55.8 ± 2.5 -4.2 ± 1.1 \u2013 87.5" in text
    assert "mean 59.1 ± 1.3 55.8 ± 1.8 -3.4 ± 0.8" in text
    assert "No text was evaluated" in text


@pytest.mark.parametrize("errors", [[0.0], [0.5, 0.5], [1e-9, 1.0], [0.0, 3.0]])
def test_any_errors_can_be_drawn(errors: list[float]) -> None:
    """None, equal ones, and some far apart; the picture has no image inside."""
    layers = tuple(
        replace(sample_report().layers[0], block=3 * index, output_error=error) for index, error in enumerate(errors)
    )
    page = render_page(sample_manifest(), Report(layers=layers))

    assert "Error by layer" in page
    assert "<image" not in page


def test_experts_share_a_cell() -> None:
    """Layers of one block and projection are averaged: 0.1 and 0.3 are as one layer of 0.2."""
    one, other, alone = (
        replace(sample_report().layers[0], name=f"experts.{index}", output_error=error)
        for index, error in enumerate((0.1, 0.3, 0.2))
    )
    assert layer_errors([one, other]) == layer_errors([alone])


def test_page_of_an_artifact_that_was_not_evaluated_says_so() -> None:
    """No evaluation and no layer figures: still a page."""
    assert "Not evaluated yet" in render_page(sample_manifest(), Report())


def test_parts_are_those_with_bytes_the_largest_first() -> None:
    """Empty parts are left out; shares add up to one."""
    parts = parts_of(sample_manifest())

    assert [part.name for part in parts] == ["embedding", "codes", "scales"]
    assert sum(part.share for part in parts) == pytest.approx(1)


def test_worst_layers_are_ranked_by_output_error() -> None:
    """A layer without an output error is ranked by its weight error."""

    def layer(name: str, weight: float, output: float | None) -> LayerReport:
        return LayerReport(
            name=name,
            block=0,
            projection=name,
            method="rtn",
            bits=4.0,
            weight_error=weight,
            output_error=output,
            seconds=0.0,
        )

    report = Report(layers=(layer("a", 0.9, 0.1), layer("b", 0.2, None), layer("c", 0.1, 0.3)))

    assert [one.name for one in worst_layers(report, 2)] == ["c", "b"]


def mixture_report() -> Report:
    """Return a report of two experts of one block; the second was never reached, the first's down projection rarely."""
    names = [
        f"model.layers.0.mlp.experts.{number}.{linear}" for number in (0, 1) for linear in ("up_proj", "down_proj")
    ]
    notes = [(), ("reached rarely",), ("never reached",), ("never reached",)]
    layers = tuple(
        replace(
            sample_report().layers[0], name=name, projection=name.rpartition(".")[2], notes=note, output_error=error
        )
        for name, note, error in zip(names, notes, (0.1, 0.2, 0.3, 0.6), strict=True)
    )
    return Report(layers=layers)


def test_notes_name_a_whole_module_or_single_layers() -> None:
    """An expert all of whose layers carry a note is named once; otherwise the layers are."""
    assert layer_notes(mixture_report()) == {
        "reached rarely": ("model.layers.0.mlp.experts.0.down_proj",),
        "never reached": ("model.layers.0.mlp.experts.1",),
    }
    assert layer_notes(sample_report()) == {}


def test_page_shows_notes_about_layers() -> None:
    """One sentence a note."""
    page = render_page(sample_manifest(), mixture_report())
    assert "Never reached: model.layers.0.mlp.experts.1</p>" in page
    assert "Reached rarely: model.layers.0.mlp.experts.0.down_proj</p>" in page

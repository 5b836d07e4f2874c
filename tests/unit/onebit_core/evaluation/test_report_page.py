"""The page: complete, self-contained, and deaf to whatever names a file may carry."""

import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from onebit_core.artifact.manifest import LayerReport, Report
from onebit_core.evaluation.report_page import parts_of, render_page, worst_layers
from tests.support.sample_report import sample_manifest, sample_report


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
    manifest = replace(sample_manifest(), name=evil, settings={evil: evil}, bytes_by_part={evil: 7})

    page = render_page(manifest, Report(layers=layers, evaluation=evaluation))

    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page


def test_pictures_are_well_formed_and_take_the_pages_colours() -> None:
    """Four pictures; each parses as XML and writes its text in the current colour."""
    page = render_page(sample_manifest(), sample_report())
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)

    assert len(pictures) == 4
    for picture in pictures:
        ET.fromstring(picture)
        assert "currentColor" in picture


def test_page_shows_what_was_measured() -> None:
    """Perplexities, bits and the worst layer stand in it."""
    page = render_page(sample_manifest(), sample_report())

    for shown in ("20.85", "24.47", "4.31", "model.layers.1.mlp.down_proj", "wikitext2"):
        assert shown in page


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

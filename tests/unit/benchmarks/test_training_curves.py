"""Curves of trainings, from artifacts to a CSV, a table and a picture; and those that are committed belong together."""

import json

import pytest

from benchmarks.quality_table import read_lines
from benchmarks.training_curves import MARKER, PAGE, RESULTS, lines_of, newest_file, picture_of, table, with_table
from onebit_core.pipeline.train_artifact import train_artifact
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model
from tests.support.trained import TEXT, configure


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "text.txt").write_text(TEXT)
    artifact = quantize_tiny(save_tiny_model(folder / "model"), folder / "artifact", "svid")
    return train_artifact(configure(artifact, str(folder / "text.txt")), folder / "trained")


def test_a_curve_has_a_line_for_every_look(trained):
    """With what decides it, and no folder of anybody's machine."""
    lines = lines_of(trained, "a machine")
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    assert (lines[0]["kl"], lines[-1]["device"]) == ("", "a machine")
    assert '"text": ["text.txt"]' in lines[0]["training"]
    assert str(trained.parent) not in str(lines)
    rows = table(lines).splitlines()
    assert len(rows) == 3
    assert f"{lines[0]['held_out_kl']:.3f} | {lines[1]['held_out_kl']:.3f} | {lines[-1]['held_out_kl']:.3f}" in rows[2]


def test_the_table_says_how_signs_or_codes_were_trained(trained):
    """Codes have no signs that Bop could turn: Adam trains them whatever `sign_optimizer` is."""
    lines = lines_of(trained, "a machine")
    signs, codes = (table([{**line, "method": method} for line in lines]) for method in ("svid", "lut2"))
    settings = json.loads(lines[0]["training"])
    assert f"| bop {settings['sign_rate']:g} |" in signs
    assert f"| adam {settings['latent_rate']:g} |" in codes


def test_an_untrained_artifact_has_no_curve(trained):
    """It is named."""
    with pytest.raises(ValueError, match="artifact: not trained"):
        lines_of(trained.parent / "artifact", "a machine")


def test_the_page_and_the_picture_are_those_of_the_newest_file():
    """`python -m benchmarks.training_curves` renews them."""
    if not list(RESULTS.glob("training_*.csv")):
        pytest.skip("no training is measured yet")
    text, file = PAGE.read_text(), newest_file()
    assert MARKER in text
    assert with_table(text, read_lines(file)) == text
    picture = picture_of(file).read_text()
    assert f"../images/{picture_of(file).name}" in text
    assert all(f">{row}</text>" in picture for row in {line["row"] for line in read_lines(file)})

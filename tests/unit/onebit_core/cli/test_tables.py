"""The printed tables: readable at 80 columns, whatever the numbers are."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from onebit_core.artifact.manifest import Perplexity
from onebit_core.cli.tables import bytes_table, evaluation_table, with_error
from tests.support.sample_report import sample_evaluation, sample_manifest


def printed(table: object) -> str:
    screen = io.StringIO()
    Console(file=screen, width=80).print(table)
    return screen.getvalue()


@pytest.mark.parametrize(("value", "error"), [(20.85, 0.614), (13203.1, 1234.5), (3.1e7, 1.9e6)])
def test_an_evaluation_fits_on_one_line(value: float, error: float) -> None:
    """Good and hopeless models alike: nothing is cut or folded."""
    result = replace(sample_evaluation(), compressed=Perplexity(value=value, standard_error=error))

    shown = printed(evaluation_table([result]))

    assert "…" not in shown
    assert with_error(result.compressed) in shown


def test_bytes_end_with_their_sum() -> None:
    """Parts without bytes are left out; the last line is the whole."""
    shown = printed(bytes_table(sample_manifest()))

    assert "113,800,000" in shown
    assert "signs" not in shown

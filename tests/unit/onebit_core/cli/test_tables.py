"""The printed tables: readable at 80 columns, whatever the numbers are."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from onebit_core.artifact.manifest import Accuracy, Perplexity
from onebit_core.cli.tables import bytes_table, evaluation_table, tasks_table, with_error
from tests.support.sample_report import sample_evaluation, sample_manifest, sample_task


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


def test_tasks_fit_on_one_line_each_and_end_with_their_mean() -> None:
    """Percent with standard errors; a task without normalized accuracy has a dash; a single task has no mean."""
    other = replace(
        sample_task("winogrande"),
        original=Accuracy(value=0.5, standard_error=0.0141),
        compressed=Accuracy(value=0.4925, standard_error=0.0141),
        original_norm=None,
        compressed_norm=None,
    )

    lines = [line.split() for line in printed(tasks_table([sample_task(), other])).splitlines()]

    assert ["arc_easy", "400", "25", "58.2±2.5", "55.8±2.5", "-2.5±1.1", "51.2", "49.8", "87.5"] in lines
    assert ["winogrande", "400", "25", "50.0±1.4", "49.2±1.4", "-0.8±1.1", "-", "87.5"] in lines
    assert ["mean", "54.1±1.4", "52.5±1.4", "-1.6±0.8", "87.5"] in lines
    assert "mean" not in printed(tasks_table([sample_task()]))

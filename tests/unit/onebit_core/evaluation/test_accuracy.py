"""Accuracies and their errors, against the statistics module."""

import math
import statistics
from dataclasses import replace

import pytest

from onebit_core.artifact.manifest import Accuracy
from onebit_core.evaluation.accuracy import accuracy, difference, mean_difference, mean_over_tasks
from tests.support.sample_report import sample_task


def test_accuracy_has_the_error_of_a_mean() -> None:
    """Standard deviation over the root of the count; a single question has none."""
    right = [1.0, 0.0, 1.0, 1.0, 0.0]

    measured = accuracy(right)

    assert measured.value == pytest.approx(0.6)
    assert measured.standard_error == pytest.approx(statistics.stdev(right) / math.sqrt(5))
    assert accuracy([1.0]) == Accuracy(value=1.0, standard_error=0.0)


def test_the_mean_counts_tasks_alike() -> None:
    """Errors add up as those of independent measurements."""
    mean = mean_over_tasks([Accuracy(value=0.5, standard_error=0.03), Accuracy(value=0.7, standard_error=0.04)])

    assert mean.value == pytest.approx(0.6)
    assert mean.standard_error == pytest.approx(0.025)


def test_the_difference_has_the_paired_error() -> None:
    """Not that of two independent accuracies."""
    task = replace(
        sample_task(),
        original=Accuracy(value=0.5, standard_error=0.04),
        compressed=Accuracy(value=0.4, standard_error=0.04),
        difference_standard_error=0.01,
    )

    assert difference(task).value == pytest.approx(-0.1)
    assert difference(task).standard_error == 0.01
    assert mean_difference([task, task]).standard_error == pytest.approx(0.01 / math.sqrt(2))

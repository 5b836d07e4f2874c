"""Accuracies with standard errors, and their mean over tasks.

Of n questions answered rightly (1) or wrongly (0), with s the standard deviation of these ones and zeros,

    standard error of the accuracy = s / sqrt(n)

as lm-eval reports it. It is the error of the sample of questions: both models meet the same hard ones, so the
difference of the two accuracies is surer than their errors suggest. Its error is taken from the n differences, which
are 0 wherever both models are right or both are wrong.

The mean over k tasks counts every task alike, however many questions it has; tasks are independent, so its error is
sqrt(sum of squared errors) / k.
"""

import math
from collections.abc import Sequence

import numpy as np

from onebit_core.artifact.manifest import Accuracy, TaskResult


def accuracy(right: Sequence[float]) -> Accuracy:
    """Return the mean of ones and zeros with its standard error; a single question has none."""
    values = np.asarray(right, dtype=np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Accuracy(value=float(values.mean()), standard_error=error)


def mean_over_tasks(accuracies: Sequence[Accuracy]) -> Accuracy:
    """Return the mean of the tasks' accuracies."""
    errors = math.sqrt(sum(one.standard_error**2 for one in accuracies))
    return Accuracy(
        value=sum(one.value for one in accuracies) / len(accuracies), standard_error=errors / len(accuracies)
    )


def difference(result: TaskResult) -> Accuracy:
    """Return compressed minus original."""
    return Accuracy(
        value=result.compressed.value - result.original.value, standard_error=result.difference_standard_error
    )


def mean_difference(results: Sequence[TaskResult]) -> Accuracy:
    """Return the mean over tasks of compressed minus original."""
    return mean_over_tasks([difference(result) for result in results])

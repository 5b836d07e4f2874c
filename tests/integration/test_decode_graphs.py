"""Runs decode_graph_cases.py under Triton's interpreter, in a process of its own; and what needs no kernel."""

from pathlib import Path

import pytest

from service.engine.graphs import key_buckets, row_buckets
from tests.support.interpreted import assert_passes_interpreted


def test_recorded_steps_compute_what_plain_ones_compute():
    """Buckets, spare rows, windows, preemption; see the file."""
    pytest.importorskip("triton")
    assert_passes_interpreted(Path(__file__).with_name("decode_graph_cases.py"))


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 100, 256, 1000])
def test_buckets_end_with_the_most_and_grow(most):
    """Every number of rows fits one, and no more than half of a bucket over eight rows is spare."""
    buckets = row_buckets(most)
    assert buckets[-1] == most
    assert list(buckets) == sorted(set(buckets))
    for rows in range(9, most + 1):
        assert min(bucket for bucket in buckets if bucket >= rows) < 2 * rows


def test_few_keys_have_a_bucket_of_their_own():
    """So that usual contexts do not pay for the longest."""
    assert key_buckets(2048) == (2048,)
    assert key_buckets(131072) == (4096, 131072)

"""Runs the cases of this folder under Triton's interpreter, in processes of their own."""

from pathlib import Path

import pytest

from tests.support.interpreted import assert_passes_interpreted

pytest.importorskip("triton")

CASES = ("interpreter_cases.py", "paged_attention_cases.py")


@pytest.mark.parametrize("cases", CASES)
def test_kernels_compute_what_plain_torch_computes(cases):
    """Every structure, odd shapes, groups, tiles, pages and splits; see the file."""
    assert_passes_interpreted(Path(__file__).with_name(cases))

"""Runs the cases of this folder under Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = ("interpreter_cases.py", "paged_attention_cases.py")
ROOT = Path(__file__).resolve().parents[5]


@pytest.mark.parametrize("cases", CASES)
def test_kernels_compute_what_plain_torch_computes(cases):
    """Every structure, odd shapes, groups, tiles, pages and splits; see the file."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(cases))],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

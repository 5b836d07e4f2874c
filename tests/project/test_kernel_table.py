"""The speeds in the README are those of the committed measurements."""

import re
from pathlib import Path

import pytest

from benchmarks.kernel_bench.results import COLUMNS, markdown, newest_files, read_lines

ROOT = Path(__file__).resolve().parents[2]
MARKER = "<!-- kernels -->"
FILES = sorted((ROOT / "benchmarks" / "results").glob("kernels_*.csv"))


def test_the_kernel_table_is_the_newest_measurement():
    """After the marker stands what `python -m benchmarks.kernels --readme` prints."""
    readme = (ROOT / "README.md").read_text()
    if MARKER in readme:
        assert f"{MARKER}\n{markdown(newest_files())}\n" in readme


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_committed_measurements_are_complete(file):
    """Every line says on what, when and how; nothing wrong was timed."""
    for line in read_lines(file):
        assert line.device
        assert line.date
        assert line.command.startswith("python -m benchmarks.kernels")
        assert line.error <= 0.05


def test_every_instruction_set_is_explained():
    """In docs/kernels.md, by the name that ONEBIT_CPU_ISA takes."""
    sources = (ROOT / "onebit_core" / "kernels" / "cpu" / "src").glob("*.c")
    names = {name for file in sources for name in re.findall(r'\.name = "(\w+)"', file.read_text())}
    assert {"portable", "avx2", "neon"} <= names
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert not [name for name in names if f"| `{name}` |" not in page]


def test_every_column_is_explained():
    """In the benchmarks' README."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert not [column for column in COLUMNS if f"`{column}`" not in text]

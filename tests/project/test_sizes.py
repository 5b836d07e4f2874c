"""Files stay under 400 lines and functions under 60."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path for folder in ("onebit_core", "service", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
C_SOURCES = sorted(path for folder in ("onebit_core", "tests") for path in (ROOT / folder).rglob("*.[ch]"))


def test_no_file_is_over_400_lines():
    """What is longer wants to be two nouns."""
    assert len(SOURCES) > 100
    assert C_SOURCES
    assert not [path.name for path in SOURCES + C_SOURCES if path.read_text().count("\n") > 400]


def test_no_function_is_over_60_lines():
    """What is longer wants a name for its parts."""
    long = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno > 60
    ]
    assert not long


def test_no_c_function_is_over_60_lines():
    """The same in C, where a function ends with a brace in the first column."""
    long = [
        f"{path.name}: {function[0].splitlines()[0]}"
        for path in C_SOURCES
        for function in re.finditer(r"^\w[^;{}=]*\)\s*\{\n.*?^\}", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        if function[0].count("\n") > 60
    ]
    assert not long


def test_only_settings_reads_the_environment():
    """The core reads none but the instruction set of its C library; the server's own are read in one place."""
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.is_relative_to(ROOT / "onebit_core") or path.is_relative_to(ROOT / "service")
        if "os.environ" in path.read_text() or "getenv" in path.read_text()
    ]
    assert set(readers) <= {
        "service/settings.py",
        "onebit_core/kernels/cpu/library.py",
        "service/registry/gpu_memory.py",
    }

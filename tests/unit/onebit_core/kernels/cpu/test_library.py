"""The C library loads once, is what it says it is, and says in one sentence what is missing where it is not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onebit_core.errors import BackendUnavailable, KernelError
from onebit_core.kernels.cpu import library
from tests.support.external_tools import find_tool

HEADER = (Path(library.__file__).parent / "src/onebit_cpu.h").read_text()

needs_library = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(Path(library.__file__).parents[3]), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def compile_library(folder: Path, source: str) -> Path:
    compiler = find_tool("cc", "Debian package gcc")
    (folder / "small.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "small.so"), str(folder / "small.c")]
    subprocess.run(command, check=True)
    return folder / "small.so"


def test_table_binds_every_function_of_the_header() -> None:
    """No function is called with arguments that ctypes would guess."""
    declared = dict(re.findall(r"^OB_API [\w ]+?[ *](ob_\w+)\(([^)]*)\);", HEADER, flags=re.MULTILINE))
    assert set(library.FUNCTIONS) == set(declared)
    for name, (_, arguments) in library.FUNCTIONS.items():
        assert len(arguments) == (0 if declared[name] == "void" else declared[name].count(",") + 1)


@needs_library
def test_library_has_our_version_and_an_instruction_set() -> None:
    """Loading is complete: the version agrees, and one of the machine's instruction sets is chosen."""
    loaded = library.load()
    assert loaded.ob_version() == library.ABI_VERSION
    available = loaded.ob_isa_available().decode().split(",")
    assert available[0] == "portable"
    assert loaded.ob_isa_name().decode() in available
    assert loaded.ob_isa_refused() == b""
    assert library.load() is loaded


@needs_library
def test_library_exports_its_interface_and_nothing_else() -> None:
    """No name of ours can collide with another library's in the same process."""
    listed = subprocess.run(
        [find_tool("nm", "Debian package binutils"), "-D", "--defined-only", str(library.PATH)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == set(library.FUNCTIONS)


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed (Debian package binutils)")
def test_library_needs_only_what_every_torch_machine_has() -> None:
    """It links to the C library and OpenMP's runtime by the name torch brings; neither Python nor C++ is among them."""
    read = subprocess.run(["readelf", "-d", str(library.PATH)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", read.stdout))
    assert "libgomp.so.1" in needed
    assert needed <= {"libgomp.so.1", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


@needs_library
def test_environment_chooses_the_instruction_set() -> None:
    """ONEBIT_CPU_ISA names one; the process uses it."""
    code = "from onebit_core.kernels.cpu import library; print(library.load().ob_isa_name().decode())"
    assert python(code, ONEBIT_CPU_ISA="portable").stdout.strip() == "portable"
    assert python(code).stdout == python(code, ONEBIT_CPU_ISA="auto").stdout


@needs_library
def test_unknown_instruction_set_is_refused_with_those_that_exist() -> None:
    """A misspelt name does not silently mean another instruction set."""
    code = "from onebit_core.kernels.cpu import library; library.why_missing()"
    done = python(code, ONEBIT_CPU_ISA="avx9000")
    assert "WrongInstructionSet: ONEBIT_CPU_ISA='avx9000'" in done.stderr
    assert "portable" in done.stderr


@needs_library
def test_status_is_raised_in_words() -> None:
    """A failed call says what the library says."""
    loaded = library.load()
    library.check(loaded, 0)
    with pytest.raises(KernelError, match=re.escape(loaded.ob_error_text(1).decode())):
        library.check(loaded, 1)


def test_missing_library_is_explained(tmp_path: Path) -> None:
    """What is missing, why, and the remedy, in one sentence."""
    with pytest.raises(
        BackendUnavailable, match=r"was not built, for want of a working C compiler; install onebit again"
    ):
        library.open_library(tmp_path / "_onebit_cpu.so", "")


def test_file_that_is_no_library_is_explained(tmp_path: Path) -> None:
    """The dynamic linker's words are handed on."""
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(BackendUnavailable, match=r"cannot be loaded \(.*broken.so.*\); install onebit again"):
        library.open_library(tmp_path / "broken.so", "")


def test_library_of_another_version_is_refused_before_it_is_used(tmp_path: Path) -> None:
    """An old file beside new code is named with both versions; none of its other functions is touched."""
    path = compile_library(tmp_path, "int ob_version(void) { return 99; }")
    with pytest.raises(BackendUnavailable, match=rf"interface version 99, needed is {library.ABI_VERSION}"):
        library.open_library(path, "")


def test_library_without_our_functions_is_refused(tmp_path: Path) -> None:
    """Another library of this name does not end in an AttributeError."""
    path = compile_library(tmp_path, "int other(void) { return 1; }")
    with pytest.raises(BackendUnavailable, match="interface version none"):
        library.open_library(path, "")
    path = compile_library(tmp_path, f"int ob_version(void) {{ return {library.ABI_VERSION}; }}")
    shutil.copy(path, tmp_path / "other.so")  # another name: the linker keeps what it has loaded under the first
    with pytest.raises(BackendUnavailable, match="has no function ob_"):
        library.open_library(tmp_path / "other.so", "")

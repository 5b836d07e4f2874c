"""The C kernels alone, driven by a C program: under sanitizers, with AMX emulated, and on another processor.

tests/support/cpu_driver.c says what it checks. Every run is skipped where its compiler or emulator is missing.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onebit_core.kernels.cpu import library
from tests.support.external_tools import find_tool

SOURCES = Path(library.__file__).parent / "src"
DRIVER = Path(__file__).parents[4] / "support/cpu_driver.c"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]


def build(compiler: list[str], flags: list[str], program: Path) -> Path:
    """Compile library and driver into one program, all sources at once."""
    sources = [*sorted(SOURCES.glob("*.c")), DRIVER]
    objects = [program.parent / f"{source.stem}.o" for source in sources]
    compile_one = [*compiler, *FLAGS, *flags, "-I", str(SOURCES), "-c"]
    running = [
        subprocess.Popen([*compile_one, str(source), "-o", str(out)], stderr=subprocess.PIPE, text=True)
        for source, out in zip(sources, objects, strict=True)
    ]
    said = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(said)
    linked = [*compiler, *flags, *map(str, objects), "-o", str(program), "-lm"]
    done = subprocess.run(linked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run_driver(command: list[str], **variables: str) -> set[str]:
    """Run to a good end; returns the instruction sets it tried."""
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(done.stdout.split())


def sanitizing_flags(compiler: str, folder: Path) -> list[str]:
    """Flags of both sanitizers, or a skip where the compiler has no runtime for them."""
    flags = ["-O2", "-g", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    command = [compiler, *flags, str(folder / "empty.c"), "-o", str(folder / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no address sanitizer or no OpenMP here (Debian packages gcc and libasan8)")
    return flags


@pytest.mark.parametrize("defines", [[], ["-DOB_EMULATE_AMX"]], ids=["as-built", "emulated-amx"])
def test_no_byte_beyond_a_buffer_and_no_undefined_step(defines: list[str], tmp_path: Path) -> None:
    """Every instruction set of this machine, under the address and undefined behaviour sanitizers."""
    compiler = find_tool("gcc", "Debian package gcc")
    flags = sanitizing_flags(compiler, tmp_path)
    tried = run_driver([str(build([compiler], [*flags, *defines], tmp_path / "driver"))], OMP_NUM_THREADS="2")
    assert "portable" in tried
    if defines and "avx512vbmi" in tried:
        assert "amx" in tried


@pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is itself an ARM: the other tests run there")
def test_arm_computes_the_same_bits(tmp_path: Path) -> None:
    """Cross-compiled and emulated: portable C and NEON agree bit for bit, so ARM serves what x86 was tested with."""
    emulator = find_tool("qemu-aarch64-static", "Debian package qemu-user-static")
    if cross := shutil.which("aarch64-linux-gnu-gcc"):
        compiler, flags = [cross], ["-O2", "-static", "-fopenmp"]
    elif importlib.util.find_spec("ziglang"):
        compiler, flags = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"], ["-O2", "-static"]
    else:
        pytest.skip("no C compiler for aarch64 (Debian package gcc-aarch64-linux-gnu or Python package ziglang)")
    program = build(compiler, flags, tmp_path / "driver")
    assert run_driver([emulator, str(program)], OMP_NUM_THREADS="2") == {"portable", "neon", "neondot"}

"""Builds the C library of the CPU kernels; everything else about the package stands in pyproject.toml.

Promise: `pip install` and `pip wheel` compile onebit_core/kernels/cpu/src/*.c into
onebit_core/kernels/cpu/_onebit_cpu.so. The library has a plain C interface and is loaded by ctypes, so no header of
Python or torch is needed and one wheel, py3-none-PLATFORM, serves every Python. The flags are the same on every machine
and name no instruction set: the sources mark fast functions by themselves and choose among them at run time.

OpenMP's libgomp.so.1 is needed but not put into the wheel, because torch brings one, and a second one in the same
process would keep a second pool of threads. `auditwheel repair --exclude libgomp.so.1` keeps it that way.

Variables: CC, CFLAGS and LDFLAGS as usual. Without a C compiler the package installs without the library, and says so
when the CPU kernels are asked for; REQUIRE_CPU_LIBRARY=1 makes that an error, for builds that are shipped.

After a change of the C sources: python setup.py build_ext --inplace
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

FOLDER = Path("onebit_core/kernels/cpu")
SOURCES = sorted(path.as_posix() for path in (FOLDER / "src").glob("*.c"))
# What the library also depends on; setup.py stands for the flags.
DEPENDS = [*sorted(path.as_posix() for path in (FOLDER / "src").glob("*.h")), "setup.py"]

# Apple's compiler has no OpenMP, and another libomp would quarrel with torch's: one thread there.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# No contraction of a * b + c into one rounding: results are to be the same, bit for bit, on every instruction set.
COMPILE = ["-O3", "-std=c11", "-fPIC", *OPENMP, "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
LINK = ["-shared", *OPENMP]
LIBRARIES = ["-lm"]


def find_compiler() -> list[str]:
    """Return the command of the C compiler: CC, or the first of the usual names that exists."""
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C compiler found (looked for CC, cc, gcc and clang); install gcc or clang")


class BuildLibrary(build_ext):
    """Compiles a plain shared library, without the headers, flags and file name of a Python extension."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Name the file after the extension alone: no Python version, no ABI."""
        return ext_name.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile every source, two at a time or more, and link them."""
        target = Path(self.get_ext_fullpath(ext.name))
        if not (self.force or newer_group([*ext.sources, *ext.depends], str(target), "newer")):
            return
        target.unlink(missing_ok=True)  # if this fails, what was built from older sources is not shipped instead
        if not ext.sources:
            raise CompileError(f"{FOLDER / 'src'} holds no C sources")
        compiler = find_compiler()
        objects = Path(self.build_temp) / "onebit_cpu"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        outputs = [str(objects / f"{Path(source).stem}.o") for source in ext.sources]
        # The caller's flags come first, so that ours win where they disagree.
        compile_one = [*compiler, *shlex.split(os.environ.get("CFLAGS", "")), *COMPILE, "-c"]
        commands = [[*compile_one, source, "-o", out] for source, out in zip(ext.sources, outputs, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.call, commands))
        self.call(
            [*compiler, *outputs, *LINK, *shlex.split(os.environ.get("LDFLAGS", "")), *LIBRARIES, "-o", str(target)]
        )

    def call(self, command: list[str]) -> None:
        """Run the compiler; show what it says, and fail with its words if it fails."""
        self.announce(shlex.join(command), level=2)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise CompileError(f"{command[0]} cannot be run: {error}") from error
        if done.stderr:
            self.warn(done.stderr)
        if done.returncode:
            raise CompileError(f"{shlex.join(command)} failed: {done.stderr.strip()}")


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: machine code, but of no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Keep only the platform of the usual tag."""
        return "py3", "none", super().get_tag()[2]


def library() -> list[Extension]:
    """Return the library as an extension; one that may be missing, unless the caller forbids it."""
    required = os.environ.get("REQUIRE_CPU_LIBRARY", "0") != "0"
    name = f"{FOLDER.as_posix().replace('/', '.')}._onebit_cpu"
    return [Extension(name, sources=SOURCES, depends=DEPENDS, optional=not required)]


setup(ext_modules=library(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel})

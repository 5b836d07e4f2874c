"""What all tests share: markers by folder, seeds, no network, few threads."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other on busy machines
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tests.support.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parent
BY_FOLDER = {"integration": pytest.mark.integration, "acceptance": pytest.mark.acceptance}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flags of `make soak` and `make test-deploy`."""
    parser.addoption("--soak", action="store_true", help="run endurance tests at full length (an hour or two)")
    parser.addoption("--deploy", action="store_true", help="run tests/deploy: build the images and start them")


@pytest.fixture(scope="session")
def is_soak(request: pytest.FixtureRequest) -> bool:
    """Whether this is `make soak`: tests that can take long do."""
    return bool(request.config.getoption("--soak"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder they stand in."""
    for item in items:
        folder = item.path.relative_to(ROOT).parts[0]
        if folder in BY_FOLDER:
            item.add_marker(BY_FOLDER[folder])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tied embedding and its tokenizer, saved as a folder."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")

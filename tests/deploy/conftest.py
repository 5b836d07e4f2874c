"""What the deployment tests share, `make test-deploy`: one engine, the images, the server that compose starts."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.deploy.engine import VERSION, Compose, Engine
from tests.support.tiny_model import save_tiny_model

PROMETHEUS = f"localhost/onebit-prometheus:{VERSION}"
DATABASE = f"localhost/onebit-database:{VERSION}"
SERVER_PORT = 18400
FIRST_START_SECONDS = 1500
READY_SECONDS = 600


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out unless they were asked for: they need root, a container engine and minutes."""
    if config.getoption("--deploy"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="runs in `make test-deploy`"))


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The container engine, with a base image made here."""
    found = Engine(Path(os.environ.get("ONEBIT_DEPLOY_STORE", "/var/tmp/onebit-deploy")))
    found.make_base()
    return found


@pytest.fixture(scope="session")
def images(engine: Engine) -> dict[str, str]:
    """The images of this tree: cpu and demo, and stand-ins of the two that others make.

    ONEBIT_DEPLOY_KEEP=1 takes those of the last run, for work on the tests themselves.
    """
    if os.environ.get("ONEBIT_DEPLOY_KEEP") == "1":
        own = {target: f"localhost/onebit:{VERSION}-{target}" for target in ("cpu", "demo")}
        return {**own, "prometheus": PROMETHEUS, "database": DATABASE}
    index = os.environ.get("TORCH_INDEX_URL")
    torch = ["--build-arg", f"TORCH_INDEX_URL={index}"] if index else []
    own = {
        target: engine.build("docker/Dockerfile", f"localhost/onebit:{VERSION}-{target}", "--target", target, *torch)
        for target in ("cpu", "demo")
    }
    folder = "tests/deploy/images"
    return {
        **own,
        "prometheus": engine.build(f"{folder}/prometheus.Dockerfile", PROMETHEUS),
        "database": engine.build(f"{folder}/database.Dockerfile", DATABASE),
    }


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A server that compose started, as somebody outside sees it."""

    compose: Compose
    url: str
    key: str

    @property
    def client(self) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, timeout=120, max_retries=0)


@pytest.fixture(scope="session")
def deployment(
    engine: Engine, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """`--profile cpu --profile observability`, from nothing: first start, then the server, then Prometheus."""
    sources = tmp_path_factory.mktemp("sources")
    for file in save_tiny_model(sources / "llama").iterdir():
        file.chmod(0o644)  # transformers lets nobody else read weights, and the worker is user 10001
    sources.chmod(0o755)
    variables = {
        "SOURCES": str(sources),
        "SERVER_PORT": str(SERVER_PORT),
        "PROMETHEUS_IMAGE": PROMETHEUS,
        "DATABASE_IMAGE": DATABASE,
    }
    compose = Compose(engine, "onebit-deploy", ("cpu", "observability", "postgres"), **variables)
    compose.down()
    compose.finish("first-start", seconds=FIRST_START_SECONDS)
    compose.start("server", seconds=READY_SECONDS)
    compose.start("prometheus")
    key = compose.run("run", "--rm", "--no-deps", "-T", "first-start", "key").split()[-1]
    yield Deployment(compose=compose, url=f"http://127.0.0.1:{SERVER_PORT}", key=key)
    compose.down()

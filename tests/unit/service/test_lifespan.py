"""What runs beside the requests: a bug in it is told, never waited for."""

import asyncio

from service.lifespan import Lifespan
from service.metrics import Metrics
from service.registry.registry import ModelRegistry
from service.settings import Settings
from tests.support.paper_artifact import write_paper_artifact


def test_a_bug_while_models_load_ends_the_server(tmp_path):
    """An exception nobody expected is a start failure too; otherwise the server would be unready for ever."""
    artifact = write_paper_artifact(tmp_path / "paper")

    async def start_with_a_bug(config):
        raise RuntimeError(f"no such thing as {config.device}")

    async def story():
        settings = Settings(artifacts=[str(artifact)], jobs_enabled=False)
        lifespan = Lifespan(settings, ModelRegistry(settings, Metrics(), start_with_a_bug))
        failures = asyncio.Queue()
        lifespan.on_start_failure = failures.put_nowait
        async with lifespan.run(None), asyncio.timeout(20):
            assert await failures.get() == "load-models failed: RuntimeError: no such thing as auto"

    asyncio.run(story())

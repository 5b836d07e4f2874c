"""The whole application over a scripted engine, in this process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.support.paper_artifact import write_paper_artifact
from tests.support.scripted_engine import ScriptedStarter

LOCAL = "http://127.0.0.1"


@contextmanager
def scripted_server(
    folder: Path, starter: ScriptedStarter | None = None, **settings: Any
) -> Iterator[tuple[TestClient, ScriptedStarter]]:
    """Serve one paper artifact named `paper`; yields a client whose server is ready, and the engines' starter."""
    starter = starter or ScriptedStarter()
    artifact = write_paper_artifact(folder / "paper")
    values = {"artifacts": [str(artifact)], "jobs_enabled": False, **settings}
    app = create_app(Settings(**values), starter)
    with TestClient(app, base_url=LOCAL, raise_server_exceptions=False) as client:
        deadline = time.monotonic() + 30
        while client.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline, "the server did not become ready"
            time.sleep(0.01)
        yield client, starter

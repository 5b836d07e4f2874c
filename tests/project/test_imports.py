"""Importing is free of effects, and the core needs nothing of the server."""

import subprocess
import sys


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_core_imports_no_web_package():
    """Whoever only quantizes needs no server packages."""
    loaded = modules_after("import onebit_core.pipeline.run, onebit_core.cli.main")
    assert not loaded & {"fastapi", "starlette", "uvicorn", "pydantic_settings", "dbos", "service"}


def test_loading_an_artifact_imports_no_method():
    """An artifact does not need what made it."""
    loaded = modules_after("import onebit_core.artifact.reader")
    assert not {name for name in loaded if name.startswith(("onebit_core.methods", "onebit_core.pipeline"))}


def test_importing_the_core_starts_no_gpu():
    """torch.cuda stays uninitialized."""
    code = "import onebit_core.hf, onebit_core.pipeline.run, torch; assert not torch.cuda.is_initialized()"
    assert "onebit_core.hf" in modules_after(code)


def test_the_server_starts_without_torch():
    """The engine imports it in its own process; a server that did too would start it seconds later."""
    loaded = modules_after("import service.app, service.__main__")
    assert "service.registry.registry" in loaded
    assert not loaded & {"torch", "transformers"}

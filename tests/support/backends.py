"""Which backends compute here: a missing one is skipped with its own reason, never silently."""

import pytest
import torch

from onebit_core.errors import BackendUnavailable
from onebit_core.kernels import BACKENDS, resolve_backend


def backends_on(device: str) -> list:
    """Return the backends of a device, cpu or cuda, as pytest parameters.

    One that cannot run here is skipped and says why.
    """
    other = {"cpu": "triton", "cuda": "cpu"}[device]
    return [_parameter(name, device) for name in BACKENDS if name != other]


def _parameter(name: str, device: str):
    if device == "cuda" and not torch.cuda.is_available():
        return pytest.param(name, marks=pytest.mark.skip(reason="this machine has no CUDA device"))
    try:
        resolve_backend(name, device)
    except BackendUnavailable as error:
        return pytest.param(name, marks=pytest.mark.skip(reason=str(error)))
    return pytest.param(name)


CPU_BACKENDS = backends_on("cpu")

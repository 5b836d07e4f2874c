"""Devices are chosen by name."""

import pytest
import torch

from onebit_core.errors import BackendUnavailable
from onebit_core.kernels import resolve_device


def test_auto_is_the_gpu_where_there_is_one():
    """And the CPU elsewhere."""
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "", "cuda:999"])
def test_a_device_that_is_not_there_is_refused(name):
    """The name is in the message."""
    with pytest.raises(BackendUnavailable, match=f"device '{name}'"):
        resolve_device(name)

"""What is freed inside of the block is there at once when it is asked for again, and is given back at its end."""

import ctypes
import resource
import sys

import psutil
import pytest
import torch

from onebit_core.reused_memory import reused_memory

MIB = 1 << 20
LARGE = 64 * MIB
"""More than glibc keeps by itself."""


def faults(times):
    """Count the pages that the kernel has to clear while a large tensor is made and forgotten, again and again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(LARGE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc gives it back that early"
)
def test_freed_memory_is_kept_and_given_back():
    """Pages are cleared once in place of ten times; afterwards the process is as small as before."""
    small = psutil.Process().memory_info().rss
    usual = faults(10)
    with reused_memory():
        kept = faults(10)
        torch.ones(LARGE, dtype=torch.uint8)
    assert kept < usual / 4
    assert faults(10) > usual / 2
    assert psutil.Process().memory_info().rss < small + LARGE / 2


def test_an_error_ends_it_too():
    """Nothing stays as it was set."""
    with pytest.raises(ValueError, match="inside"), reused_memory():
        raise ValueError("inside")
    before = psutil.Process().memory_info().rss
    del [torch.ones(LARGE, dtype=torch.uint8)][:]
    assert psutil.Process().memory_info().rss < before + LARGE / 2

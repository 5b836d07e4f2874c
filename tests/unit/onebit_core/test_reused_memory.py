"""What is freed inside of the block is there at once when it is asked for again, and is given back at its end."""

import ctypes
import json
import subprocess
import sys

import pytest

from onebit_core.reused_memory import LARGEST_KEPT_BYTES, M_MMAP_THRESHOLD, USUAL

MEASURE = """
import json, resource, psutil, torch
from onebit_core.reused_memory import reused_memory

LARGE = 64 << 20  # more than glibc keeps by itself

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(LARGE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
small = psutil.Process().memory_info().rss
found = {"usual": faults()}
try:
    with reused_memory():
        found["kept"] = faults()
        found["held"] = (psutil.Process().memory_info().rss - small) / LARGE
        raise KeyError
except KeyError:
    found["left"] = (psutil.Process().memory_info().rss - small) / LARGE
found["afterwards"] = faults()
print(json.dumps(found))
"""
"""In a process of its own: where others have left holes, a large piece may lie in one of them."""


def can_be_kept():
    """Older releases of glibc refuse to keep more than 32 MiB in one piece, other C libraries know nothing of it."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt") or not library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES):
        return False
    return bool(library.mallopt(M_MMAP_THRESHOLD, USUAL[M_MMAP_THRESHOLD]))


@pytest.mark.skipif(not can_be_kept(), reason="this C library does not keep large pieces")
def test_freed_memory_is_kept_and_given_back():
    """Pages are cleared once in place of ten times; after the block, that an error ended, all is as before."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["kept"] < found["usual"] / 4
    assert found["held"] > 0.5
    assert found["left"] < 0.5
    assert found["afterwards"] > found["usual"] / 2

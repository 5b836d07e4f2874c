"""What a training step frees is kept for the next one.

A step takes and frees tensors of many megabytes, always of the same sizes. glibc hands each of them back to the kernel
at once, which must clear every page again when the next step asks for it: a third of a step's time on a CPU.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of malloc.h: from how much free memory on, and from which size of a request, the kernel has a say."""

USUAL = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
"""Bytes that glibc goes up to by itself once a process has freed large pieces."""

LARGEST_KEPT_BYTES = 1 << 30
"""What is larger is few and lasts: it stays with the kernel, so that its place is not lost to small pieces."""

NEVER = 2**31 - 1


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keep freed memory until the end of the block, then give it back; where glibc is not, nothing changes."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    assert library is not None
    library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    library.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        for name, size in USUAL.items():
            library.mallopt(name, size)
        library.malloc_trim(0)

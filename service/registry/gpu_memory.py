"""Free memory of a GPU, without importing torch or touching the device: NVML, the library below nvidia-smi, by ctypes.

    libnvidia-ml.so.1: nvmlInit_v2 -> nvmlDeviceGetHandleByIndex_v2 | ...ByUUID -> nvmlDeviceGetMemoryInfo

CUDA numbers the devices that CUDA_VISIBLE_DEVICES leaves, NVML all of them; the variable is followed here. A GPU that
is cut into slices (MIG) is asked about only by the slice's own UUID, since the whole card's memory says nothing of it.
Whatever is not certain is None, and then the engine finds out.
"""

import ctypes
import importlib.metadata
import os
from functools import cache

from service.settings import Settings

LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def choose_device(settings: Settings) -> str:
    """Say where engines will run, "cpu" or "cuda:N": `auto` is CUDA where there is a GPU that PyTorch was built for."""
    if settings.device != "auto":
        return "cuda:0" if settings.device == "cuda" else settings.device
    try:
        is_cpu_build = "+cpu" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        is_cpu_build = True
    return "cpu" if is_cpu_build or gpu_free_bytes(0) is None else "cuda:0"


def gpu_free_bytes(index: int, library: str = LIBRARY) -> int | None:
    """Return the free bytes of CUDA device `index`; None where nobody can tell."""
    nvml = _open(library)
    if nvml is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else None
    if names is not None and not index < len(names):
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    name = names[index].strip() if names is not None else str(index)
    if name.isdigit():
        found = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
        if found == 0 and _is_sliced(nvml, handle):
            return None
    else:
        found = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
    if found != 0 or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return int(memory.free)


def _is_sliced(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> bool:
    """Whether the card is in MIG mode; older drivers and smaller cards do not know the question."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    try:
        code = nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending))
    except AttributeError:
        return False
    return bool(code == 0 and current.value)


@cache
def _open(library: str) -> ctypes.CDLL | None:
    """Load NVML once; None where there is none, or no driver behind it."""
    try:
        nvml = ctypes.CDLL(library)
        return nvml if nvml.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None

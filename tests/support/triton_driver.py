"""A CUDA driver for Triton that compiles for an architecture and launches nothing.

Everything up to the device is real: argument binding, specialization, compilation, limits of shared memory and grids.
"""

# ruff: noqa: ARG002  (the signatures are Triton's)

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

MOST_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
_devices = itertools.count(1000)  # a number of its own for every driver: Triton keeps what it compiled by device
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)


class _Utils:
    """What Triton asks of a loaded driver."""

    def __init__(self, architecture: int) -> None:
        self._shared = MOST_SHARED_BYTES[architecture]

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared, "multiprocessor_count": 100, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return (1, 1, 0, 0, 1024)

    def unload_module(self, module: int) -> None:
        pass


class RecordingDriver(DriverBase):
    """See the module text; `launches` holds the names of the kernels."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self._device = next(_devices)
        self.utils = _Utils(architecture)
        self.launches: list[str] = []
        self.launcher_cls = self._launcher

    def _launcher(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            assert all(1 <= size <= most for size, most in zip(arguments[:3], MOST_PROGRAMS, strict=True))
            self.launches.append(metadata.name)

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass


@contextmanager
def recording(architecture: int) -> Iterator[RecordingDriver]:
    """Make a recording driver Triton's, for as long as the context is open."""
    recorder = RecordingDriver(architecture)
    previous = driver._active
    driver.set_active(recorder)
    try:
        yield recorder
    finally:
        driver._active = previous

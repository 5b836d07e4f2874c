"""Who computes the products of a quantized layer.

    reference   unpacks at every call, plain PyTorch, float32 accumulation: the truth, slow, smallest memory
    dense       unpacks once at the first call and multiplies densely: as fast as the original, memory of the original
    cpu         C kernels on packed bits (AVX-512, AVX2, NEON or portable, chosen by the processor): fast and small
    triton      Triton kernels on packed bits, on a CUDA device: fast and small
    auto        cpu or triton, by the device; dense where that one is missing, which is logged with the reason

A layer holds the name of its backend; `use_backend` sets it for a whole model. A backend asked for by name that cannot
run here is an error that says why.
"""

import importlib
import logging
import re
from collections.abc import Sequence
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from onebit_core.errors import BackendUnavailable
from onebit_core.kernels.planes import LinearOperands, Packed

Backend = Literal["reference", "dense", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_PACKED_MODULES = {"cpu": "onebit_core.kernels.cpu", "triton": "onebit_core.kernels.triton"}
_DEVICES = {"cpu": "cpu", "triton": "cuda"}

_log = logging.getLogger(__name__)


class PackedBackend(Protocol):
    """What a module of packed kernels offers."""

    def why_unavailable(self) -> str | None:
        """Return one sentence with the remedy, or None where the backend runs."""

    def pack(self, operands: LinearOperands) -> Packed:
        """Bring a weight into the backend's layout, on the operands' device."""

    def matmul(self, x: Tensor, parts: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
        """Multiply: x [T, I] to [T, O]."""

    def describe(self) -> str:
        """Say what runs, such as the instruction set, in one line."""


def packed_backend(name: str) -> PackedBackend:
    """Return the module of packed kernels of a backend, imported at first use."""
    return cast(PackedBackend, importlib.import_module(_PACKED_MODULES[name]))


def packs(backend: str) -> bool:
    """Return whether a backend multiplies packed weights that it laid out itself."""
    return backend in _PACKED_MODULES


def describe_backend(backend: str) -> str:
    """Say who computes, in one line: the name, and for packed kernels what they run on."""
    return packed_backend(backend).describe() if packs(backend) else backend


def resolve_backend(name: str, device: str = "cpu") -> Backend:
    """Turn a user's choice into a backend of this machine.

    Args:
        name: auto or one of BACKENDS.
        device: where the model runs: cpu, cuda or cuda:N.

    Raises:
        BackendUnavailable: no such backend, or it cannot run here or on that device.
    """
    kind = device.partition(":")[0]
    if name == "auto":
        return _best_backend(kind)
    for backend in BACKENDS:
        if name == backend:
            break
    else:
        raise BackendUnavailable(f"backend {name!r} does not exist; available here: auto, {', '.join(BACKENDS)}")
    if packs(backend):
        if _DEVICES[backend] != kind:
            raise BackendUnavailable(
                f"backend {backend!r} computes on {_DEVICES[backend]}, the device is {device}; "
                "use auto or another device"
            )
        reason = packed_backend(backend).why_unavailable()
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r} cannot run here: {reason}")
    return backend


def _best_backend(kind: str) -> Backend:
    """Return the packed backend of a device, or dense with a warning."""
    backend: Backend = "triton" if kind == "cuda" else "cpu"
    reason = packed_backend(backend).why_unavailable()
    if reason is None:
        return backend
    _log.warning(
        "packed kernels (backend %s) cannot run here, layers are unpacked to dense weights: %s", backend, reason
    )
    return "dense"


def resolve_device(name: str) -> str:
    """Return the device of a user's choice; auto is the first GPU, or the CPU where there is none.

    Args:
        name: auto, cpu, cuda or cuda:N.

    Raises:
        BackendUnavailable: another name, or a GPU that this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise BackendUnavailable(f"device {name!r} does not exist; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"device {name!r}: this machine has no CUDA device; use cpu")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(f"device {name!r}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return name

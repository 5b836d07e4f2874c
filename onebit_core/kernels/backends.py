"""Who computes the products of a quantized layer.

    reference   unpacks at every call, plain PyTorch, float32 accumulation: the truth, slow, smallest memory
    dense       unpacks once at the first call and multiplies densely: as fast as the original, memory of the original
    auto        dense

A layer holds the name of its backend; `use_backend` sets it for a whole model. Nothing falls back in silence: a name
that does not exist here is an error.
"""

import re
from typing import Literal, get_args

import torch

from onebit_core.errors import BackendUnavailable

Backend = Literal["reference", "dense"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def resolve_backend(name: str) -> Backend:
    """Turn a user's choice into a backend of this machine.

    Raises:
        BackendUnavailable: no such backend.
    """
    if name == "auto":
        return "dense"
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise BackendUnavailable(f"backend {name!r} does not exist; available here: auto, {', '.join(BACKENDS)}")


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

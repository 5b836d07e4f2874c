"""Who computes the products of a quantized layer.

    reference   unpacks at every call, plain PyTorch, float32 accumulation: the truth, slow, smallest memory
    dense       unpacks once at the first call and multiplies densely: as fast as the original, memory of the original
    auto        dense

A layer holds the name of its backend; `use_backend` sets it for a whole model. Nothing falls back in silence: a name
that does not exist here is an error.
"""

from typing import Literal, get_args

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

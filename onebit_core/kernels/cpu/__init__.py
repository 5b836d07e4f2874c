"""Packed kernels for CPUs: C with tables in vector registers, chosen by CPU features when the library is loaded.

    pack(operands) -> Packed            once per layer
    matmul(x, parts, layout) -> y       y = x @ W.T + bias

Activations become integers of 14 bits per segment of a row, products are exact, and float sums have one order, so
that every instruction set, batch size and thread count gives the same bits. src/tier.h has the formulas.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels.cpu.library import check, load, why_missing
from onebit_core.kernels.cpu.pack import aligned, pack

__all__ = ["describe", "matmul", "pack", "why_unavailable"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_unavailable() -> str | None:
    """Return one sentence on why the backend cannot run here, with the remedy; None if it can."""
    return why_missing()


def describe() -> str:
    """Return one line for logs and metrics.

    Raises:
        BackendUnavailable: the library is missing.
    """
    library = load()
    refused = library.ob_isa_refused().decode()
    note = f", refused after self-test: {refused}" if refused else ""
    return f"cpu {library.ob_isa_name().decode()} (libonebit_cpu {library.ob_version()}{note})"


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library without asking `load` again at every product."""
    return load()


def matmul(x: Tensor, parts: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    """Multiply by a packed weight.

    Args:
        x: float32, bfloat16 or float16 [T, I], last dimension contiguous; T may be 0.
        parts: of `Packed`.
        layout: of `Packed`.

    Returns:
        [T, O] in x's dtype.

    Raises:
        BackendUnavailable: the library is missing.
        KernelError: x does not fit, or the parts are not a weight packed for the chosen instruction set.
    """
    library = _library()
    num_tokens, columns = x.shape
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or not x.is_cpu or columns != layout[1] or (x.stride(1) != 1 and columns > 1):
        raise KernelError(
            f"cpu kernels: x is {x.dtype} {tuple(x.shape)} on {x.device}, strides {x.stride()}; needed is float32, "
            f"bfloat16 or float16 [T, {layout[1]}] on the CPU, last dimension contiguous"
        )
    y = torch.empty((num_tokens, layout[0]), dtype=x.dtype, device=x.device)
    blob = aligned(parts[0])
    status = library.ob_matmul(
        blob.data_ptr(),
        blob.numel(),
        layout[0],
        layout[1],
        x.data_ptr(),
        dtype,
        num_tokens,
        x.stride(0),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        check(library, status)
    return y

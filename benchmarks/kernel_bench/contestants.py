"""Who multiplies: one class for our backends and for the rivals, so that both are treated alike.

Ours are the packed backends of onebit_core.kernels, the C one once for every instruction set that this processor has,
and the reference. The dense backend is `torch bf16` or `torch fp32` among the rivals: it is the same call.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_bench.timing import Player
from benchmarks.kernel_bench.weights import stored_bytes
from onebit_core.kernels import packed_backend, packed_matmul
from onebit_core.kernels.cpu import library
from onebit_core.kernels.planes import LinearOperands, Packed, dense_weight

INT8_TOLERANCE = 0.05
"""For activations of 8 bits a token."""


def _nothing() -> None:
    """Do nothing, before most turns."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A weight in one contestant's layout, and how it multiplies.

    Attributes:
        name: shown and written down, such as "cpu avx512vbmi" or "torch bf16".
        weight: in the contestant's own layout.
        multiply: weight and x [T, I] to [T, O].
        copy: another copy of the weight, elsewhere in memory.
        weight_bytes: read for one product.
        dtype: of x.
        before: chooses the instruction set, ahead of a turn.
        tolerance: largest error over largest output that passes; None for that of the dtype.
    """

    name: str
    weight: Any
    multiply: Callable[[Any, Tensor], Tensor]
    copy: Callable[[Any], Any]
    weight_bytes: int
    dtype: torch.dtype
    before: Callable[[], None] = _nothing
    tolerance: float | None = None
    _copies: list[Any] = field(default_factory=list)

    def player(self, x_TI: Tensor, copies: int) -> Player:
        """Return the product with each of so many copies of the weight; the copies are kept for the next x."""
        self.before()
        while len(self._copies) < copies - 1:
            self._copies.append(self.copy(self.weight))
        weights = [self.weight, *self._copies[: copies - 1]]
        return Player([partial(self.multiply, weight, x_TI) for weight in weights], self.before)


Maker = Callable[[LinearOperands, torch.dtype], Contestant]
"""Brings a weight into one contestant's layout; raises where it cannot."""


def makers(device: str) -> dict[str, Maker]:
    """Return our backends on a device, by name, first the one that `auto` takes."""
    found: dict[str, Maker] = {}
    if device == "cpu":
        if packed_backend("cpu").why_unavailable() is None:
            found = {f"cpu {isa}": partial(_on_isa, isa) for isa in instruction_sets()}
    elif packed_backend("triton").why_unavailable() is None:
        found = {"triton": partial(_packed, "triton", "triton", _nothing), "triton int8": _triton_int8}
    found["reference"] = _reference
    return found


def missing_backend(device: str) -> str | None:
    """Return why the packed backend of a device cannot run, or None."""
    return packed_backend("cpu" if device == "cpu" else "triton").why_unavailable()


def instruction_sets() -> list[str]:
    """Return the instruction sets that the C library can use here, the fastest first."""
    return list(reversed(library.load().ob_isa_available().decode().split(",")))


def _select(isa: str) -> None:
    library.check(library.load(), library.load().ob_select_isa(isa.encode()))


def _on_isa(isa: str, operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Pack for one instruction set: the layout differs, so a weight packed for one may be refused by another."""
    before = partial(_select, isa)
    before()
    return _packed("cpu", f"cpu {isa}", before, operands, dtype)


def _packed(
    backend: str, name: str, before: Callable[[], None], operands: LinearOperands, dtype: torch.dtype
) -> Contestant:
    packed = packed_backend(backend).pack(operands)
    return Contestant(
        name=name,
        weight=packed,
        multiply=_multiply_packed,
        copy=_copy_packed,
        weight_bytes=packed.num_bytes,
        dtype=dtype,
        before=before,
    )


def _triton_int8(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Activations rounded to 8 bits a token, which is asked for and never chosen: faster from 64 tokens on."""
    from onebit_core.kernels import triton

    packed = triton.pack(operands, act="int8")
    usual = triton.pack(operands)
    if packed.layout == usual.layout:
        raise ValueError("has no 8-bit activations for this format")
    base = _packed("triton", "triton int8", _nothing, operands, dtype)
    weight_bytes = packed.num_bytes
    return dataclasses.replace(base, weight=packed, weight_bytes=weight_bytes, tolerance=INT8_TOLERANCE)


def _multiply_packed(packed: Packed, x_TI: Tensor) -> Tensor:
    return packed_matmul(x_TI, packed)


def _copy_packed(packed: Packed) -> Packed:
    return Packed(parts=tuple(part.clone() for part in packed.parts), layout=packed.layout)


def _reference(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Unpack at every call, multiply in float32."""
    return Contestant(
        name="reference",
        weight=operands,
        multiply=_multiply_reference,
        copy=lambda weight: weight,
        weight_bytes=stored_bytes(operands),
        dtype=dtype,
    )


def _multiply_reference(operands: LinearOperands, x_TI: Tensor) -> Tensor:
    return (x_TI.float() @ dense_weight(operands).T).to(x_TI.dtype)

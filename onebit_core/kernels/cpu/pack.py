"""LinearOperands to a blob of the C library: addresses in, one tensor of bytes out.

The C side reads `ob_operands` and `ob_term` (src/onebit_cpu.h) as one run of int64: sizes, and addresses of contiguous
tensors, 0 where a part is missing. The tensors whose addresses are taken stay alive in a list until the call returns.
"""

import ctypes

import torch
from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels.cpu.library import check, load
from onebit_core.kernels.packing import num_words
from onebit_core.kernels.planes import CPU_CODE, LinearOperands, Packed, PlaneTerm

ALIGNMENT = 64
"""Bytes; the kernels load whole cache lines."""


class _Addresses:
    """Hands out addresses of tensors and keeps the tensors alive."""

    def __init__(self) -> None:
        """Begin with none."""
        self._kept: list[Tensor] = []

    def __call__(self, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int:
        """Return the address of a tensor in CPU memory; 0 for none.

        Raises:
            KernelError: the tensor has another shape, or is not in CPU memory.
        """
        if tensor is None:
            return 0
        if tensor.shape != shape:
            raise KernelError(f"cpu kernels: a part of the weight has shape {tuple(tensor.shape)}, not {shape}")
        if tensor.device.type != "cpu":
            raise KernelError(f"cpu kernels: a part of the weight is on {tensor.device}, not on the CPU")
        self._kept.append(tensor.detach().to(dtype).contiguous())
        return self._kept[-1].data_ptr()


def empty_bytes(size: int) -> Tensor:
    """Return `size` uninitialized bytes, aligned for the kernels, as a tensor of their own."""
    room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    return room.narrow(0, -room.data_ptr() % ALIGNMENT, size)


def aligned(blob: Tensor) -> Tensor:
    """Return the blob where the kernels can read it: a copy that torch made elsewhere may have lost its alignment."""
    if blob.data_ptr() % ALIGNMENT == 0:
        return blob
    copy = empty_bytes(blob.numel())
    copy.copy_(blob)
    return copy


def _term_fields(term: PlaneTerm, address: _Addresses, rows: int, columns: int) -> list[int]:
    num_planes = term.words_QOW.shape[0]
    num_rows, _, num_groups = term.coefficient_COG.shape
    expected = 1 if term.binary_code else num_planes
    if num_rows != expected:
        raise KernelError(f"cpu kernels: {num_rows} coefficients for {num_planes} planes, not {expected}")
    return [
        address(term.words_QOW, torch.int32, num_planes, rows, num_words(columns)) if num_planes else 0,
        address(term.coefficient_COG, torch.float32, num_rows, rows, num_groups) if num_rows else 0,
        address(term.offset_OG, torch.float32, rows, num_groups),
        address(term.scale_in_I, torch.float32, columns),
        num_planes,
        num_groups,
        int(term.binary_code),
    ]


def _fields(operands: LinearOperands, address: _Addresses) -> list[int]:
    """Return ob_operands and its ob_terms."""
    rows, columns = operands.out_features, operands.in_features
    sparse, dense = operands.sparse, operands.bytes_
    num_sparse = 0 if sparse is None else sparse.codes_N.numel()
    fields = [
        rows,
        columns,
        len(operands.planes),
        address(operands.bias_O, torch.float32, rows),
        0 if sparse is None else address(sparse.bitmap_OW, torch.int32, rows, num_words(columns)),
        0 if sparse is None else address(sparse.codes_N, torch.uint8, num_sparse),
        0 if sparse is None else address(sparse.scale_O, torch.float32, rows),
        0 if sparse is None else address(sparse.zero_O, torch.uint8, rows),
        num_sparse,
        0 if dense is None else address(dense.codes_OI, torch.int8, rows, columns),
        0 if dense is None else address(dense.scale_O, torch.float32, rows),
    ]
    for term in operands.planes:
        fields += _term_fields(term, address, rows, columns)
    return fields


def pack(operands: LinearOperands) -> Packed:
    """Pack a weight for the chosen instruction set.

    Raises:
        BackendUnavailable: the library is missing.
        KernelError: the operands contradict themselves.
    """
    library = load()
    address = _Addresses()
    fields = _fields(operands, address)
    array = (ctypes.c_int64 * len(fields))(*fields)
    size = library.ob_pack_size(array, len(fields))
    check(library, -size if size < 0 else 0)
    blob = empty_bytes(size)
    check(library, library.ob_pack(array, len(fields), blob.data_ptr(), size, torch.get_num_threads()))
    return Packed(parts=(blob,), layout=(operands.out_features, operands.in_features, CPU_CODE))

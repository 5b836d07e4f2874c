"""The ops and the bit layout; the only kernel module other packages import from."""

from onebit_core.kernels.backends import BACKENDS, Backend, resolve_backend, resolve_device
from onebit_core.kernels.ops import int_matmul, salient_matmul, sign_matmul
from onebit_core.kernels.packing import (
    num_words,
    pack_bits,
    pack_codes,
    pack_signs,
    unpack_bits,
    unpack_codes,
    unpack_signs,
)
from onebit_core.kernels.reference import expand_groups, int_dequantize, sign_dequantize

__all__ = [
    "BACKENDS",
    "Backend",
    "expand_groups",
    "int_dequantize",
    "int_matmul",
    "num_words",
    "pack_bits",
    "pack_codes",
    "pack_signs",
    "resolve_backend",
    "resolve_device",
    "salient_matmul",
    "sign_dequantize",
    "sign_matmul",
    "unpack_bits",
    "unpack_codes",
    "unpack_signs",
]

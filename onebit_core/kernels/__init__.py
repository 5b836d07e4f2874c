"""The ops and the bit layout: what other packages import of the kernels.

The server's engine besides takes what works on its pages from where it is: `cpu.decoder`, `triton.paged_attention`.
"""

from onebit_core.kernels.backends import (
    BACKENDS,
    Backend,
    PackedBackend,
    describe_backend,
    packed_backend,
    packs,
    resolve_backend,
    resolve_device,
)
from onebit_core.kernels.operands import (
    byte_operands,
    code_terms,
    concatenate,
    factor_operands,
    level_terms,
    sign_terms,
)
from onebit_core.kernels.ops import (
    factor_matmul,
    int_matmul,
    lut_matmul,
    packed_matmul,
    salient_matmul,
    sign_matmul,
)
from onebit_core.kernels.packing import (
    num_words,
    pack_bits,
    pack_codes,
    pack_signs,
    unpack_bits,
    unpack_codes,
    unpack_signs,
)
from onebit_core.kernels.planes import ByteTerm, LinearOperands, Packed, PlaneTerm, SparseTerm, dense_weight
from onebit_core.kernels.reference import expand_groups, int_dequantize, lut_dequantize, sign_dequantize

__all__ = [
    "BACKENDS",
    "Backend",
    "ByteTerm",
    "LinearOperands",
    "Packed",
    "PackedBackend",
    "PlaneTerm",
    "SparseTerm",
    "byte_operands",
    "code_terms",
    "concatenate",
    "dense_weight",
    "describe_backend",
    "expand_groups",
    "factor_matmul",
    "factor_operands",
    "int_dequantize",
    "int_matmul",
    "level_terms",
    "lut_dequantize",
    "lut_matmul",
    "num_words",
    "pack_bits",
    "pack_codes",
    "pack_signs",
    "packed_backend",
    "packed_matmul",
    "packs",
    "resolve_backend",
    "resolve_device",
    "salient_matmul",
    "sign_dequantize",
    "sign_matmul",
    "sign_terms",
    "unpack_bits",
    "unpack_codes",
    "unpack_signs",
]

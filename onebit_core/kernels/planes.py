"""LinearOperands: the one form that every packed backend computes, whatever format a layer is stored in.

    W_oi = sum_t  g_ti * (sum_q a_tqog * B_tqoi + b_tog)            bits B as independent planes
    W_oi = sum_t  g_ti * (a_tog * sum_q 2^q * B_tqoi + b_tog)       bits B as the digits of an integer code

with g the group of column i. Sign planes are bit planes (S = 1 - 2B, so c*S = c - 2c*B); an integer grid s*(q - z) is a
code with a = s, b = -s*z; four free levels per group are the two bits of an index and their product, three planes:
l0 + (l1-l0)*B0 + (l2-l0)*B1 + (l3-l2-l1+l0)*B0*B1. A sparse part replaces the sum at its places, like a layer's salient
weights; a dense 8-bit matrix, the output head, stands alone.

Shape suffixes: Q = planes, O = output features, I = input features, W = words = ceil(I / 32), G = column groups, C = Q
or, for codes, 1; N = sparse weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.kernels.packing import unpack_bits, unpack_codes
from onebit_core.kernels.reference import expand_groups

CPU_CODE = 0
"""Packed.layout[2] of weights packed for the C backend."""

TRITON_CODE = 1
"""Packed.layout[2] of weights packed for the Triton backend."""


@dataclass(frozen=True, kw_only=True)
class PlaneTerm:
    """A sum of bit planes with coefficients.

    Attributes:
        words_QOW: int32 [Q, O, W], layout of `packing`; Q may be 0 (a term of shifts only).
        coefficient_COG: float32 [C, O, G]; C = Q for independent planes, 1 for a binary code.
        offset_OG: float32 [O, G], or None for zero.
        scale_in_I: float32 [I], or None for ones; multiplies x before everything else.
        binary_code: whether plane q counts 2**q inside of one integer code.
    """

    words_QOW: Tensor
    coefficient_COG: Tensor
    offset_OG: Tensor | None = None
    scale_in_I: Tensor | None = None
    binary_code: bool = False


@dataclass(frozen=True, kw_only=True)
class SparseTerm:
    """8-bit weights that replace the planes' sum where the bitmap is set: scale_o * (code - zero_o).

    Attributes:
        bitmap_OW: int32 [O, W].
        codes_N: uint8 [N], row-major, columns ascending; N = set bits of the bitmap.
        scale_O: float32 [O].
        zero_O: uint8 [O].
    """

    bitmap_OW: Tensor
    codes_N: Tensor
    scale_O: Tensor
    zero_O: Tensor


@dataclass(frozen=True, kw_only=True)
class ByteTerm:
    """A dense 8-bit matrix: scale_o * code_oi.

    Attributes:
        codes_OI: int8 [O, I].
        scale_O: float32 [O].
    """

    codes_OI: Tensor
    scale_O: Tensor


@dataclass(frozen=True, kw_only=True)
class LinearOperands:
    """Everything a backend needs to multiply by one weight.

    Attributes:
        out_features: O.
        in_features: I.
        planes: the terms that are summed.
        sparse: what replaces their sum in places, or None.
        bytes_: the dense 8-bit matrix, or None; it comes without planes and sparse part.
        bias_O: float32 [O], or None.
    """

    out_features: int
    in_features: int
    planes: tuple[PlaneTerm, ...] = ()
    sparse: SparseTerm | None = None
    bytes_: ByteTerm | None = None
    bias_O: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in the layout of one backend.

    Attributes:
        parts: the tensors the backend reads.
        layout: out_features, in_features, backend code, then whatever the backend wrote.
    """

    parts: tuple[Tensor, ...]
    layout: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def dense_term(term: PlaneTerm, num_columns: int) -> Tensor:
    """Return the dense weight of one term, float32 [O, I]."""
    if term.binary_code:
        bits_COI = unpack_codes(term.words_QOW, num_columns).float().unsqueeze(0)
    else:
        bits_COI = unpack_bits(term.words_QOW, num_columns).float()
    weight_OI = (bits_COI * expand_groups(term.coefficient_COG, num_columns)).sum(0)
    if term.offset_OG is not None:
        weight_OI = weight_OI + expand_groups(term.offset_OG, num_columns)
    return weight_OI if term.scale_in_I is None else weight_OI * term.scale_in_I


def dense_weight(operands: LinearOperands) -> Tensor:
    """Return the dense weight that the operands stand for, float32 [O, I]: the truth for every backend."""
    if operands.bytes_ is not None:
        return operands.bytes_.codes_OI.float() * operands.bytes_.scale_O[:, None]
    weight_OI = torch.stack([dense_term(term, operands.in_features) for term in operands.planes]).sum(0)
    if operands.sparse is not None:
        sparse = operands.sparse
        rows, columns = unpack_bits(sparse.bitmap_OW, operands.in_features).nonzero(as_tuple=True)
        weight_OI[rows, columns] = sparse.scale_O[rows] * (sparse.codes_N.float() - sparse.zero_O.float()[rows])
    return weight_OI

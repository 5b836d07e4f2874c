"""Salient weights on the GPU: compressed rows of 8-bit codes, 24 bits an entry (40 above 65536 columns).

A salient weight replaces what the planes give at its place. The packed planes have zero bits there, and a zero bit
gives exactly sum_t gain_ti * offset_tog, which is known per row (and group and column). So nothing but code and column
is stored:

    y_o += sum_n (scale_o * (code_n - zero_o)  -  sum_t gain_t,i(n) * offset_t,o,g(n)) * x_i(n)      exact in float32

    row_starts int32 [O + 1], columns uint16 bits in int16 (or int32) [N], codes uint8 [N], scale, zero float32 [O],
    offset float32 [T, O, G], gain float32 [T, I]

The kernel gives a program one row and eight tokens; for many tokens the dense path writes the values into the unpacked
matrix instead (`scatter_rows`).
"""

# ruff: noqa: ANN001, ANN201, ANN202, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebit_core.kernels.packing import unpack_bits
from onebit_core.kernels.planes import LinearOperands, SparseTerm

NARROW_COLUMNS = 1 << 16


@triton.jit
def _entries(columns_ptr, codes_ptr, place, inside, scale, zero):
    """Return columns (int32) and values (float32) of entries."""
    columns = tl.load(columns_ptr + place, mask=inside, other=0).to(tl.int32)
    if columns_ptr.dtype.element_ty == tl.int16:
        columns = columns & 0xFFFF
    return columns, (tl.load(codes_ptr + place, mask=inside, other=0).to(tl.float32) - zero) * scale


@triton.jit(do_not_specialize=["M", "num_groups", "group_size"])
def sparse_rows(
    x_ptr, starts_ptr, columns_ptr, codes_ptr, scale_ptr, zero_ptr, offset_ptr, gain_ptr, y_ptr,
    M, N, K, stride_m, num_groups, group_size,
    BM: tl.constexpr, CHUNK: tl.constexpr, TERMS: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Write float32 y[m, n]. Program (row, tile of M)."""
    row = tl.program_id(0)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    scale, zero = tl.load(scale_ptr + row), tl.load(zero_ptr + row)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * stride_m
    acc = tl.zeros((BM, CHUNK), tl.float32)
    for start in range(first, last, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < last
        columns, value = _entries(columns_ptr, codes_ptr, place, inside, scale, zero)
        for term in tl.static_range(TERMS):
            at = (term * N + row).to(tl.int64) * num_groups + columns // group_size
            base = tl.load(offset_ptr + at, mask=inside, other=0.0)
            if HAS_GAIN:
                base *= tl.load(gain_ptr + term * K + columns, mask=inside, other=0.0)
            value -= base
        x = tl.load(x_rows + columns[None, :], mask=(rm < M)[:, None] & inside[None, :], other=0.0)
        # Lanes past the row's end hold a value of no entry; x is zero there and the value finite.
        acc += x.to(tl.float32) * value[None, :]
    tl.store(y_ptr + rm.to(tl.int64) * N + row, tl.sum(acc, 1), mask=rm < M)


@triton.jit(do_not_specialize=["first_row"])
def scatter_rows(
    dense_ptr, starts_ptr, columns_ptr, codes_ptr, scale_ptr, zero_ptr, first_row, K, CHUNK: tl.constexpr
):  # fmt: skip
    """Write the values over dense rows, the first of which is row `first_row`. Program (row)."""
    row = first_row + tl.program_id(0)
    scale, zero = tl.load(scale_ptr + row), tl.load(zero_ptr + row)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    dense = dense_ptr + tl.program_id(0).to(tl.int64) * K
    for start in range(first, last, CHUNK):
        place = start + tl.arange(0, CHUNK)
        columns, value = _entries(columns_ptr, codes_ptr, place, place < last, scale, zero)
        tl.store(dense + columns, value.to(dense_ptr.dtype.element_ty), mask=place < last)


def pack_sparse(operands: LinearOperands, sparse: SparseTerm) -> tuple[tuple[int, int, int], list[Tensor]]:
    """Return (terms, groups, whether gains exist) and the tensors of the module text, absent ones left out."""
    counts_O, columns = _compressed_rows(sparse, operands.in_features)
    starts = torch.nn.functional.pad(counts_O.cumsum(0, dtype=torch.int32), (1, 0)).to(torch.int32)
    tensors = [starts, columns, sparse.codes_N.contiguous(), sparse.scale_O.float(), sparse.zero_O.float()]
    offsets = [(term.offset_OG, term.scale_in_I) for term in operands.planes if term.offset_OG is not None]
    if not offsets:
        return (0, 1, 0), tensors
    groups = math.lcm(*(offset_OG.shape[-1] for offset_OG, _ in offsets))
    tensors.append(torch.stack([_spread(offset_OG.float(), groups) for offset_OG, _ in offsets]))
    gains = [gain_I for _, gain_I in offsets if gain_I is not None]
    if gains:
        ones = torch.ones_like(gains[0], dtype=torch.float32)
        tensors.append(torch.stack([ones if gain_I is None else gain_I.float() for _, gain_I in offsets]))
    return (len(offsets), groups, int(bool(gains))), tensors


def _compressed_rows(sparse: SparseTerm, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return the entries of every row, int64 [O], and all columns, a few rows of the bitmap at a time."""
    counts, columns = [], []
    step = max(1, (1 << 24) // num_columns)
    for start in range(0, sparse.bitmap_OW.shape[0], step):
        bits_OI = unpack_bits(sparse.bitmap_OW[start : start + step], num_columns)
        counts.append(bits_OI.sum(-1))
        found = bits_OI.nonzero()[:, 1]
        # int16 keeps the low 16 bits of an unsigned column.
        columns.append(found.to(torch.int16 if num_columns <= NARROW_COLUMNS else torch.int32))
    return torch.cat(counts), torch.cat(columns)


def _spread(values_OG: Tensor, groups: int) -> Tensor:
    """Repeat groups until there are `groups` of them."""
    return values_OG.repeat_interleave(groups // values_OG.shape[-1], dim=-1)

"""Many tokens: unpack the weight, a few rows at a time, and let the vendor's matrix product do the rest.

Unpacking writes what the product then reads, 4 bytes a weight of traffic; that pays once a dense product, which needs
one pass where P planes need P, has enough tokens to share it (`tiles.dense_from`). A chunk of rows bounds the scratch
memory, which comes from PyTorch's allocator: it is reused from layer to layer, per stream, and valid inside a CUDA
graph.
"""

# ruff: noqa: ANN001, ANN201, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_blocks", "num_groups", "group_size"])
def dequantize_planes(
    w_ptr, c_ptr, b_ptr, gain_ptr, dense_ptr, first_row, num_rows, N, K, num_blocks, num_groups, group_size,
    BN: tl.constexpr, TERMS: tl.constexpr, PLANES: tl.constexpr, CODE: tl.constexpr, SHIFT: tl.constexpr,
    HAS_GAIN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Write (or add to) dense[row - first_row, k]. Program (block of 128 columns, tile of rows)."""
    kb = tl.program_id(0)
    local = tl.program_id(1) * BN + tl.arange(0, BN)
    k = kb * 128 + tl.arange(0, 128)
    rows = tl.minimum(first_row + local, N - 1)[:, None]
    in_block = k % 128
    # Column 8 j + e is bit j of half e, which is bit 16 (e % 2) + j of word e // 2.
    word = ((in_block % 8) // 2)[None, :]
    bit = ((in_block % 2) * 16 + in_block // 8)[None, :]
    table = rows + (k // group_size)[None, :] * N  # entries of the tables, [groups, N]
    inside = ((local < num_rows)[:, None]) & ((k < K)[None, :])
    plane_words = num_blocks.to(tl.int64) * N * 4
    COEFFICIENTS: tl.constexpr = 1 if CODE else PLANES
    total = tl.zeros((BN, 128), tl.float32)
    for term in range(TERMS):
        start = w_ptr + term * PLANES * plane_words + kb.to(tl.int64) * N * 4
        value = tl.zeros((BN, 128), tl.float32)
        for plane in tl.static_range(PLANES):
            bits = (tl.load(start + plane * plane_words + rows * 4 + word) >> bit) & 1
            signs = (1 - 2 * bits).to(tl.float32)
            if CODE:
                value += signs * (1 << plane)
            else:
                c = c_ptr + (term * COEFFICIENTS + plane) * num_groups * N
                value += signs * tl.load(c + table, mask=inside, other=0.0).to(tl.float32)
        if CODE:
            value *= tl.load(c_ptr + term * num_groups * N + table, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            value += tl.load(b_ptr + term * num_groups * N + table, mask=inside, other=0.0)
        if HAS_GAIN:
            value *= tl.load(gain_ptr + term * num_blocks * 128 + k)[None, :]
        total += value
    dense = dense_ptr + local.to(tl.int64)[:, None] * K + k[None, :]
    if ADD:
        total += tl.load(dense, mask=inside, other=0.0).to(tl.float32)
    tl.store(dense, total.to(dense_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def dequantize_bytes(w_ptr, scale_ptr, dense_ptr, first_row, K, BK: tl.constexpr):
    """Write dense[row - first_row, k] = scale * code. Program (row, BK columns)."""
    row = (first_row + tl.program_id(0)).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    value = tl.load(w_ptr + row * K + k, mask=k < K, other=0).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(dense_ptr + tl.program_id(0).to(tl.int64) * K + k, value.to(dense_ptr.dtype.element_ty), mask=k < K)


@triton.jit(do_not_specialize=["M"])
def scale_tokens(x_ptr, gain_ptr, out_ptr, M, K, K_padded, stride_m, BK: tl.constexpr):
    """Write out[term, m, k] = gain[term, k] * x[m, k], zero from column K on. Program (token, BK columns, term)."""
    m, term = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    gain = tl.load(gain_ptr + term * K_padded + k, mask=k < K_padded, other=0.0)
    value = tl.load(x_ptr + m * stride_m + k, mask=k < K, other=0.0).to(tl.float32) * gain
    tl.store(out_ptr + (term * M + m) * K_padded + k, value.to(out_ptr.dtype.element_ty), mask=k < K_padded)

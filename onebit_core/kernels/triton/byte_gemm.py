"""y = x @ (scale * codes).T for int8 codes, such as an output head: the codes become bfloat16 or float16 in registers.

Every int8 is exact in both types, so rounding happens in x and in nothing else. Tiles, split-K and epilogue are those
of `sign_gemm`. The codes are read where they lie, row-major: a tile's row is 128 bytes.
"""

# ruff: noqa: ANN001, ANN201, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from onebit_core.kernels.triton.sign_gemm import finish, load_tokens, product


@triton.jit(do_not_specialize=["M", "num_blocks", "blocks_per_split", "splits"])
def byte_gemm(
    x_ptr, w_ptr, c_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, num_blocks, stride_m, blocks_per_split, splits,
    BN: tl.constexpr, BM: tl.constexpr, NUM_STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Multiply. Program (tile of N, tile of M, split of K)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty if EMULATE or x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    # Rows past the last read it again; their results are never stored.
    row_ptr = w_ptr + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    acc = tl.zeros((BN, BM), tl.float32)
    for kb in tl.range(first, last, 1, num_stages=NUM_STAGES):
        x = load_tokens(x_ptr, x_ptr, rm, kb * 128, M, K, stride_m, 128, 0, EVEN_K)
        rk = kb * 128 + tl.arange(0, 128)
        if EVEN_K:
            codes = tl.load(row_ptr + rk[None, :])
        else:
            codes = tl.load(row_ptr + rk[None, :], mask=(rk < K)[None, :], other=0)
        acc = product(codes.to(dtype), x, acc, EMULATE)
    total = acc * tl.load(c_ptr + rn, mask=rn < N, other=0.0)[:, None]
    finish(
        y_ptr, total, x_ptr, bias_ptr, partial_ptr, counter_ptr, rn, rm, M, N, splits, SPLIT, 0, HAS_BIAS
    )  # fmt: skip

"""y = x @ W.T for packed bit planes: one tensor-core kernel for one to a few hundred tokens.

    y[m, n] = sum_t sum_group  c_t[n, group] * dot(S_t[n, :], g_t * x[m, :])  +  b_t[n, group] * sum(g_t * x[m, :])

The weights are the left operand (16 rows of an instruction are 16 output features) and the tokens the right one, so
eight tokens fill an instruction that would want sixteen rows of activations. What varies at compile time:

    GROUPED   0  one coefficient a row: everything accumulates in the tensor core, scaled once at the end
              1  a fresh product per part of a 128-column block, scaled in float32
    PLANES    planes of a term; with CODE they are digits of an integer and share a coefficient (+-2^q)
    SHIFT     sums of x are one more product, with a left operand of ones: same layout as the result, no reduction

float32 activations are split into three bfloat16 parts, high to low, whose three products are exact: weights are powers
of two. Split-K is deterministic and needs one launch: every program stores its partial sum, the last to arrive at a
tile's counter adds all of them in order and sets the counter back to zero.
"""

# ruff: noqa: ANN001, ANN201, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

from onebit_core.kernels.triton.expand import fragment_rows, fragments


@triton.jit
def load_tokens(x_ptr, gain_ptr, rm, k, M, K, stride_m, BK: tl.constexpr, HAS_GAIN: tl.constexpr, EVEN_K: tl.constexpr):
    """Return x [BK, tokens] from column k on, times its gains; zero past the last token and column."""
    rk = k + tl.arange(0, BK)
    mask = (rm < M)[None, :]
    if not EVEN_K:
        mask = mask & (rk < K)[:, None]
    x = tl.load(x_ptr + rm.to(tl.int64)[None, :] * stride_m + rk[:, None], mask=mask, other=0.0)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + rk)
        x = (x.to(tl.float32) * gain[:, None]).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def product(left, x, acc, EMULATE: tl.constexpr):
    """Return acc + left @ x; float32 x in three exact bfloat16 parts."""
    if EMULATE or x.dtype != tl.float32:
        acc = tl.dot(left, x, acc, input_precision="ieee")
    else:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(left, high, tl.dot(left, middle, tl.dot(left, low, acc)))
    return acc


@triton.jit
def load_halves(w_ptr, rows, kb, N, block_words, BN: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the int16 halves [BN, 8 * BLOCKS] of the rows, from 128-column block kb on."""
    word = tl.arange(0, 4 * BLOCKS)
    start = w_ptr + kb * block_words
    offset = rows[:, None] * 4 + (word % 4)[None, :]
    if BLOCKS > 1:
        offset += (word // 4)[None, :] * (N * 4)
    words = tl.load(start + offset)
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).reshape(BN, 8 * BLOCKS)


@triton.jit
def load_coefficient(c_ptr, group, rn, N, num_groups):
    """Return float32 [rows] of one group; past the last group x is zero, so that any coefficient will do."""
    group = tl.minimum(group, num_groups - 1)
    return tl.load(c_ptr + group * N + rn, mask=rn < N, other=0.0).to(tl.float32)


@triton.jit
def row_scaled_term(
    x_ptr, w_ptr, c_ptr, b_ptr, gain_ptr, rows, rn, rm, M, N, K, stride_m, num_blocks, block_words, first, last,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NUM_WARPS: tl.constexpr, NUM_STAGES: tl.constexpr,
    PLANES: tl.constexpr, SHIFT: tl.constexpr, HAS_GAIN: tl.constexpr, EVEN_K: tl.constexpr,
    dtype: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Return one term's sum over blocks first..last with a coefficient a row: float32 [BN, BM]."""
    acc = tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((BN, BM), tl.float32)
    for kb in tl.range(first, last, BK // 128, num_stages=NUM_STAGES):
        x = load_tokens(x_ptr, gain_ptr, rm, kb * 128, M, K, stride_m, BK, HAS_GAIN, EVEN_K)
        for plane in tl.static_range(PLANES):
            halves = load_halves(w_ptr + plane * num_blocks * block_words, rows, kb, N, block_words, BN, BK // 128)
            acc = product(fragments(halves, plane, 1, 0, dtype, NUM_WARPS, EMULATE), x, acc, EMULATE)
        if SHIFT:
            sums = product(tl.full((BN, BK), 1.0, dtype), x, sums, EMULATE)
    inside = rn < N
    acc = acc * tl.load(c_ptr + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
    if SHIFT:
        acc += sums * tl.load(b_ptr + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def group_scaled_term(
    x_ptr, w_ptr, c_ptr, b_ptr, gain_ptr, rows, rn, rm, M, N, K, stride_m, num_blocks, block_words, first, last,
    num_groups, group_size, BN: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, NUM_WARPS: tl.constexpr,
    NUM_STAGES: tl.constexpr, PLANES: tl.constexpr, CODE: tl.constexpr, SHIFT: tl.constexpr,
    HAS_GAIN: tl.constexpr, EVEN_K: tl.constexpr, dtype: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Return one term's sum over blocks first..last with coefficients a plane, row and group: float32 [BN, BM]."""
    PART_K: tl.constexpr = 128 // PARTS
    total = tl.zeros((BN, BM), tl.float32)
    for kb in tl.range(first, last, 1, num_stages=NUM_STAGES):
        for part in tl.static_range(PARTS):
            k = kb * 128 + part * PART_K
            group = k // group_size
            x = load_tokens(x_ptr, gain_ptr, rm, k, M, K, stride_m, PART_K, HAS_GAIN, EVEN_K)
            acc = tl.zeros((BN, BM), tl.float32)
            for plane in tl.static_range(PLANES):
                halves = load_halves(w_ptr + plane * num_blocks * block_words, rows, kb, N, block_words, BN, 1)
                if CODE:
                    left = fragments(halves, plane, PARTS, part, dtype, NUM_WARPS, EMULATE)
                    acc = product(left, x, acc, EMULATE)
                else:
                    left = fragments(halves, 0, PARTS, part, dtype, NUM_WARPS, EMULATE)
                    scale = load_coefficient(c_ptr + plane * num_groups * N, group, rn, N, num_groups)
                    total += product(left, x, tl.zeros((BN, BM), tl.float32), EMULATE) * scale[:, None]
            if CODE:
                total += acc * load_coefficient(c_ptr, group, rn, N, num_groups)[:, None]
            if SHIFT:
                sums = product(tl.full((BN, PART_K), 1.0, dtype), x, tl.zeros((BN, BM), tl.float32), EMULATE)
                total += sums * load_coefficient(b_ptr, group, rn, N, num_groups)[:, None]
    return total


@triton.jit
def store_result(y_ptr, total, add_ptr, bias_ptr, rn, rm, M, N, HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Add what other kernels computed and the bias, convert, store."""
    mask = (rm < M)[None, :] & (rn < N)[:, None]
    offset = rm.to(tl.int64)[None, :] * N + rn[:, None]
    if HAS_ADD:
        total += tl.load(add_ptr + offset, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0)[:, None]
    tl.store(y_ptr + offset, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    y_ptr, total, add_ptr, bias_ptr, partial_ptr, counter_ptr, rn, rm, M, N, splits,
    SPLIT: tl.constexpr, HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Store the tile, or its partial sum; the last program of a tile adds the partial sums in order."""
    if SPLIT:
        BN: tl.constexpr = total.shape[0]
        BM: tl.constexpr = total.shape[1]
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        # Partial sums lie tile by tile, rows fastest.
        place = tl.arange(0, BN)[:, None] + BN * tl.arange(0, BM)[None, :]
        start = partial_ptr + tile.to(tl.int64) * splits * (BN * BM)
        used = (rm < M)[None, :]
        tl.store(start + tl.program_id(2) * (BN * BM) + place, total, mask=used)
        tl.debug_barrier()  # every thread's part is written before one thread announces it
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == splits - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for split in range(splits):
                total += tl.load(start + split * (BN * BM) + place, mask=used, other=0.0, cache_modifier=".cg")
            store_result(y_ptr, total, add_ptr, bias_ptr, rn, rm, M, N, HAS_ADD, HAS_BIAS)
            tl.atomic_xchg(counter_ptr + tile, 0)
    else:
        store_result(y_ptr, total, add_ptr, bias_ptr, rn, rm, M, N, HAS_ADD, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "num_blocks", "num_groups", "group_size", "blocks_per_split", "splits"])
def sign_gemm(
    x_ptr, w_ptr, c_ptr, b_ptr, gain_ptr, add_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, K, num_blocks, stride_m, stride_term, num_groups, group_size, blocks_per_split, splits,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NUM_WARPS: tl.constexpr, NUM_STAGES: tl.constexpr,
    TERMS: tl.constexpr, PLANES: tl.constexpr, CODE: tl.constexpr, GROUPED: tl.constexpr, PARTS: tl.constexpr,
    SHIFT: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Multiply; see the module text. Program (tile of N, tile of M, split of K)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty if EMULATE or x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    # Rows past the last read it again; their results are never stored.
    rows = tl.minimum(tl.program_id(0) * BN + fragment_rows(BN, NUM_WARPS), N - 1)
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    block_words = tl.full((), 4, tl.int64) * N  # words of a block; 64 bits: a large matrix has many
    total = tl.zeros((BN, BM), tl.float32)
    for term in range(TERMS):
        w = w_ptr + term * PLANES * num_blocks * block_words
        gain = gain_ptr + term * num_blocks * 128
        x = x_ptr + term * stride_term
        if GROUPED:
            c = c_ptr + term * (1 if CODE else PLANES) * num_groups * N
            total += group_scaled_term(
                x, w, c, b_ptr + term * num_groups * N, gain, rows, rn, rm, M, N, K, stride_m, num_blocks, block_words,
                first, last, num_groups, group_size, BN, BM, PARTS, NUM_WARPS, NUM_STAGES, PLANES, CODE, SHIFT,
                HAS_GAIN, EVEN_K, dtype, EMULATE,
            )  # fmt: skip
        else:
            total += row_scaled_term(
                x, w, c_ptr + term * N, b_ptr + term * N, gain, rows, rn, rm, M, N, K, stride_m, num_blocks,
                block_words, first, last, BN, BM, BK, NUM_WARPS, NUM_STAGES, PLANES, SHIFT, HAS_GAIN, EVEN_K, dtype,
                EMULATE,
            )  # fmt: skip
    finish(
        y_ptr, total, add_ptr, bias_ptr, partial_ptr, counter_ptr, rn, rm, M, N, splits, SPLIT, HAS_ADD, HAS_BIAS
    )  # fmt: skip

"""Opt-in: activations rounded to 8 bits per token, products in the integer tensor cores.

    step_m = max |x_m| / 127,   q_mi = round(x_mi / step_m)
    y_mn = step_m * (a_n * sum_i code_ni q_mi + b_n * sum_i q_mi)

Bits become bytes 0 and 2^q with a shift and a mask for four weights, and the products are exact; what is lost is lost
in q, about 1 % of a typical output. For rows with one coefficient and codes of at most seven bits (2^7 does not fit
int8).

Inside of a 128-column block, column k = 16 j + e is bit j of byte e, which is the integer instruction's fragment.
"""

# ruff: noqa: ANN001, ANN201, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from onebit_core.kernels.planes import LinearOperands
from onebit_core.kernels.triton import tiles
from onebit_core.kernels.triton.expand import fragment_rows, outputs
from onebit_core.kernels.triton.layout import Parts, Plan
from onebit_core.kernels.triton.prepack import BLOCK, Stack, merge_shifts, num_blocks, pack_fragments
from onebit_core.kernels.triton.sign_gemm import finish

MAX_BITS = 7


@triton.constexpr_function
def assembly(exponent):
    """Write the instructions that turn eight bits of four bytes into eight registers of four bytes 0 or 2^exponent."""
    mask = 0x01010101 << exponent
    lines = []
    for bit in range(8):
        shift = f"shr.u32 t, $8, {bit - exponent};" if bit >= exponent else f"shl.b32 t, $8, {exponent - bit};"
        lines.append(f"{shift} and.b32 ${bit}, t, {mask:#x};")
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


@triton.jit
def byte_fragments(words, EXPONENT: tl.constexpr, NUM_WARPS: tl.constexpr, EMULATE: tl.constexpr):
    """Return int8 [rows, columns] of 0 and 2^EXPONENT from int32 [rows in fragment order, 4 * blocks]."""
    BN: tl.constexpr = words.shape[0]
    BLOCKS: tl.constexpr = words.shape[1] // 4
    low = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    high = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    halves = tl.join(low, high).reshape(BN, 16 * BLOCKS)
    if EMULATE:
        bits = (halves.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        values = (bits << EXPONENT).to(tl.int8)
    else:
        ASM: tl.constexpr = assembly(EXPONENT)
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [halves], dtype=outputs(8, tl.int8), is_pure=True, pack=4
        )
        a0, a1, a2, a3 = tl.join(o0, o4), tl.join(o1, o5), tl.join(o2, o6), tl.join(o3, o7)
        values = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(BN, 16 * BLOCKS, 8)
    values = values.reshape(BN // (16 * NUM_WARPS), 2, NUM_WARPS, 8, BLOCKS, 16, 8)
    return values.permute(0, 2, 1, 3, 4, 6, 5).reshape(BN, BLOCKS * 128)


@triton.jit
def quantize_tokens(x_ptr, q_ptr, step_ptr, sum_ptr, K, K_padded, stride_m, BK: tl.constexpr):
    """Write int8 q[m, k] (zero from column K on), step[m] and step[m] * sum of q[m]. Program (token)."""
    m = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.abs(tl.load(x_ptr + m * stride_m + k, mask=k < K, other=0.0).to(tl.float32))
        # A NaN must not be lost in the maximum: it becomes infinity, and infinity times zero is NaN again.
        largest = tl.maximum(largest, tl.where(x == x, x, float("inf")))
    step = tl.max(largest, 0) / 127.0
    inverse = tl.where(step > 0.0, 1.0 / tl.where(step > 0.0, step, 1.0), 0.0)
    total = tl.zeros((BK,), tl.int32)
    for start in range(0, K_padded, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + m * stride_m + k, mask=k < K, other=0.0).to(tl.float32)
        scaled = tl.where(inverse > 0.0, x * inverse, 0.0)
        q = tl.floor(scaled + 0.5).to(tl.int32)
        tl.store(q_ptr + m * K_padded + k, q.to(tl.int8), mask=k < K_padded)
        total += q
    step = tl.where(step < float("inf"), step, float("nan"))
    tl.store(step_ptr + m, step)
    tl.store(sum_ptr + m, step * tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["M", "num_blocks", "blocks_per_split", "splits"])
def int8_gemm(
    q_ptr, step_ptr, sum_ptr, w_ptr, a_ptr, b_ptr, add_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr,
    M, N, num_blocks, blocks_per_split, splits,
    BN: tl.constexpr, BM: tl.constexpr, NUM_WARPS: tl.constexpr, NUM_STAGES: tl.constexpr, PLANES: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Multiply. Program (tile of N, tile of M, split of K)."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rows = tl.minimum(tl.program_id(0) * BN + fragment_rows(BN, NUM_WARPS), N - 1)
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    block_words = tl.full((), 4, tl.int64) * N
    inside = rm < M
    x_rows = q_ptr + rm.to(tl.int64)[None, :] * (num_blocks * 128)
    acc = tl.zeros((BN, BM), tl.int32)
    for kb in tl.range(first, last, 1, num_stages=NUM_STAGES):
        q = tl.load(x_rows + kb * 128 + tl.arange(0, 128)[:, None], mask=inside[None, :], other=0)
        for plane in tl.static_range(PLANES):
            start = w_ptr + (plane * num_blocks + kb) * block_words
            words = tl.load(start + rows[:, None] * 4 + tl.arange(0, 4)[None, :])
            acc = tl.dot(byte_fragments(words, plane, NUM_WARPS, EMULATE), q, acc, out_dtype=tl.int32)
    a = tl.load(a_ptr + rn, mask=rn < N, other=0.0)
    total = acc.to(tl.float32) * a[:, None] * tl.load(step_ptr + rm, mask=inside, other=0.0)[None, :]
    if tl.program_id(2) == 0:
        b = tl.load(b_ptr + rn, mask=rn < N, other=0.0)
        total += b[:, None] * tl.load(sum_ptr + rm, mask=inside, other=0.0)[None, :]
    finish(
        y_ptr, total, add_ptr, bias_ptr, partial_ptr, counter_ptr, rn, rm, M, N, splits, SPLIT, HAS_ADD, HAS_BIAS
    )  # fmt: skip


def pack_int8(operands: LinearOperands) -> tuple[Stack, list[Tensor]] | None:
    """Return the planes in byte order with a and b, or None where only float activations will do."""
    terms = merge_shifts(operands.planes)
    if len(terms) != 1:
        return None
    (term,) = terms
    planes, rows = term.words_QOW.shape[:2]
    is_code = term.binary_code or planes == 1
    if not is_code or term.scale_in_I is not None or term.coefficient_COG.shape[-1] != 1 or not 1 <= planes <= MAX_BITS:
        return None
    kept = term.words_QOW if operands.sparse is None else term.words_QOW & ~operands.sparse.bitmap_OW
    words = torch.stack([pack_fragments(words_OW, operands.in_features, half_bits=8) for words_OW in kept])
    offset_O = words.new_zeros(rows, dtype=torch.float32) if term.offset_OG is None else term.offset_OG[:, 0].float()
    return Stack(1, planes, 1, 1, operands.in_features, 1, 0), [
        words.unsqueeze(0),
        term.coefficient_COG[0, :, 0].float().contiguous(),
        offset_O.contiguous(),
    ]


def int8_matmul(x: Tensor, parts: Parts, plan: Plan, tile: tiles.Tile, add: Tensor | None) -> Tensor:
    """Round x to 8 bits per token and multiply; `add` is float32 [T, O]."""
    from onebit_core.kernels.triton.launch import EMULATE, OPTIONS, split_plan

    (stack,), (tensors,) = plan.stacks, parts.stacks
    tokens, blocks = x.shape[0], num_blocks(plan.in_features)
    q = x.new_empty(tokens, blocks * BLOCK, dtype=torch.int8)
    step, total = x.new_empty(2, tokens, dtype=torch.float32)
    quantize_tokens[(tokens,)](x, q, step, total, x.shape[1], blocks * BLOCK, x.stride(0), BK=1024, **OPTIONS)
    y = x.new_empty(tokens, plan.out_features)
    grid, per_split, partial, counter = split_plan(x, plan.out_features, blocks, tile, 1)
    int8_gemm[grid](
        q, step, total, tensors.words, tensors.coefficient, tensors.shift, step if add is None else add,
        step if parts.bias is None else parts.bias, y, partial, counter,
        tokens, plan.out_features, blocks, per_split, grid[2],
        BN=tile.rows, BM=tile.tokens, NUM_WARPS=tile.warps, NUM_STAGES=tile.stages, PLANES=stack.planes,
        HAS_ADD=int(add is not None), HAS_BIAS=int(parts.bias is not None), SPLIT=int(grid[2] > 1),
        EMULATE=int(EMULATE), num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
    return y

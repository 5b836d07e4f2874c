"""`matmul`: from a plan to launches.

    few tokens    salient rows (float32) -> every stack adds to it -> bias, conversion to x's dtype: one rounding
    many tokens   unpack a chunk of rows -> write salient values over it -> dense product

Everything is decided from shapes; nothing waits for the device, so a call can be captured into a CUDA graph once it has
run before (compilation, counters). Temporary tensors come from PyTorch's allocator, which is safe per stream and in
graphs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from onebit_core.kernels.triton import tiles
from onebit_core.kernels.triton.byte_gemm import byte_gemm
from onebit_core.kernels.triton.dequantize import dequantize_bytes, dequantize_planes, scale_tokens
from onebit_core.kernels.triton.int8_gemm import int8_matmul
from onebit_core.kernels.triton.layout import (
    BYTES_KIND,
    INT8_KIND,
    KIND_NAMES,
    Parts,
    Plan,
    StackParts,
    parts_of,
    plan_of,
)
from onebit_core.kernels.triton.prepack import BLOCK, Stack, num_blocks
from onebit_core.kernels.triton.sign_gemm import sign_gemm
from onebit_core.kernels.triton.sparse import scatter_rows, sparse_rows
from onebit_core.kernels.triton.workspace import counters

EMULATE = not isinstance(sign_gemm, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on CPU tensors."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
GAIN_IN_KERNEL_TOKENS = 16
DENSE_CHUNK_WEIGHTS = 1 << 26
SPARSE_TOKENS, SPARSE_CHUNK = 8, 128
ROW_TILE = 16

observers: list[Callable[[Sequence[Tensor], Sequence[int]], None]] = []
"""Called with the parts and layout of every product; `onebit tune` looks at a model's products this way."""

OPTIONS = {"enable_fp_fusion": True}
"""Triton 3.9 warns where this is left open; sums are float32 either way."""


def matmul(x: Tensor, parts: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    """Multiply packed weights, see the module text.

    Args:
        x: float32, bfloat16 or float16 [T, I], contiguous last dimension.
        parts: Packed.parts.
        layout: Packed.layout.

    Returns:
        [T, O] in x's dtype.
    """
    key = tuple(layout)
    plan = plan_of(key)
    for observe in observers:
        observe(parts, layout)
    if x.shape[0] == 0:
        return x.new_empty(0, plan.out_features)
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if EMULATE and x.dtype == torch.bfloat16:  # the interpreter has no bfloat16 arithmetic
        return matmul(x.float(), parts, layout).to(x.dtype)
    named, tile = parts_of(plan, parts), choose(key, x.dtype, x.device, x.shape[0])
    with _on_device(x):
        if tile is None:
            return dense_matmul(x, named, plan)
        return packed_matmul(x, named, plan, tile)


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it x's."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def product_of(plan: Plan, dtype: torch.dtype) -> tiles.Product:
    """Describe a plan to the tile tables."""
    kind = KIND_NAMES[plan.kind]
    return tiles.Product(kind, plan.out_features, plan.in_features, plan.products, plan.group_size, DTYPES[dtype])


@lru_cache(maxsize=1 << 14)
def choose(layout: tuple[int, ...], dtype: torch.dtype, device: torch.device, tokens: int) -> tiles.Tile | None:
    """Return the tile for a product, or None where the dense path is faster or the only one."""
    plan = plan_of(layout)
    gpu, product = tiles.gpu_of(device), product_of(plan, dtype)
    impossible = any(stack.parts == 0 for stack in plan.stacks)
    dense_from = tiles.dense_from(gpu, product, has_sparse=plan.sparse is not None)
    if plan.kind != INT8_KIND and (impossible or tokens >= dense_from):
        return None
    return tiles.choose_tile(gpu, product, tokens)


def packed_matmul(x: Tensor, parts: Parts, plan: Plan, tile: tiles.Tile) -> Tensor:
    """Multiply without unpacking to memory."""
    y = x.new_empty(x.shape[0], plan.out_features)
    if plan.kind == BYTES_KIND:
        return _byte_product(x, parts, y, tile)
    add = None if plan.sparse is None else sparse_product(x, parts.sparse, plan)
    if plan.kind == INT8_KIND:
        return int8_matmul(x, parts, plan, tile, add)
    for index, (stack, tensors) in enumerate(zip(plan.stacks, parts.stacks, strict=True)):
        is_last = index == len(plan.stacks) - 1
        out = y if is_last else torch.empty_like(y, dtype=torch.float32)
        stack_product(x, stack, tensors, out, add, parts.bias if is_last else None, tile)
        add = out
    return y


def stack_product(
    x: Tensor, stack: Stack, tensors: StackParts, y: Tensor, add: Tensor | None, bias: Tensor | None, tile: tiles.Tile
) -> None:
    """Write y = add + this stack's product + bias."""
    tokens, columns, rows = x.shape[0], x.shape[1], y.shape[1]
    blocks, stride_term, has_gain = num_blocks(columns), 0, bool(stack.has_gain)
    if has_gain and tokens > GAIN_IN_KERNEL_TOKENS:
        scaled = scaled_tokens(x, tensors.gain)
        x, columns, stride_term, has_gain = scaled[0], blocks * BLOCK, scaled.stride(0), False
    step = 1 if stack.is_grouped or blocks % (tile.columns // BLOCK) else tile.columns // BLOCK
    grid, per_split, partial, counter = split_plan(x, rows, blocks, tile, step)
    sign_gemm[grid](
        x, tensors.words, tensors.coefficient, tensors.shift, tensors.gain, x if add is None else add,
        x if bias is None else bias, y, partial, counter,
        tokens, rows, columns, blocks, x.stride(0), stride_term, stack.groups, stack.group_size, per_split, grid[2],
        BN=tile.rows, BM=tile.tokens, BK=step * BLOCK, NUM_WARPS=tile.warps, NUM_STAGES=tile.stages,
        TERMS=stack.terms, PLANES=stack.planes, CODE=stack.is_code, GROUPED=int(stack.is_grouped), PARTS=stack.parts,
        SHIFT=stack.has_shift, HAS_GAIN=int(has_gain), HAS_ADD=int(add is not None), HAS_BIAS=int(bias is not None),
        SPLIT=int(grid[2] > 1), EVEN_K=int(columns % (step * BLOCK) == 0), EMULATE=int(EMULATE),
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip


def split_plan(
    x: Tensor, rows: int, blocks: int, tile: tiles.Tile, step: int
) -> tuple[tuple[int, int, int], int, Tensor, Tensor]:
    """Return the grid, the blocks of a split, memory for partial sums, and counters."""
    tiles_n, tiles_m = -(-rows // tile.rows), -(-x.shape[0] // tile.tokens)
    splits = tile.splits if tiles_n * tiles_m <= tiles.MAX_TILES else 1
    per_split = tiles.blocks_per_split(blocks, splits, step)
    splits = -(-blocks // per_split)
    grid = (tiles_n, tiles_m, splits)
    if splits == 1:
        return grid, per_split, x, x
    partial = x.new_empty(tiles_n * tiles_m * splits * tile.rows * tile.tokens, dtype=torch.float32)
    return grid, per_split, partial, counters(x.device)


def scaled_tokens(x: Tensor, gain_TK: Tensor) -> Tensor:
    """Return x times every term's gains, [terms, tokens, padded columns] in x's dtype."""
    terms, padded = gain_TK.shape
    scaled = x.new_empty(terms, x.shape[0], padded)
    grid = (x.shape[0], -(-padded // 1024), terms)
    scale_tokens[grid](x, gain_TK, scaled, *x.shape, padded, x.stride(0), BK=1024, **OPTIONS)
    return scaled


def _byte_product(x: Tensor, parts: Parts, y: Tensor, tile: tiles.Tile) -> Tensor:
    """Multiply by a matrix of bytes."""
    codes, scale = parts.bytes_
    rows, columns = codes.shape
    grid, per_split, partial, counter = split_plan(x, rows, num_blocks(columns), tile, 1)
    byte_gemm[grid](
        x, codes, scale, x if parts.bias is None else parts.bias, y, partial, counter,
        x.shape[0], rows, columns, num_blocks(columns), x.stride(0), per_split, grid[2],
        BN=tile.rows, BM=tile.tokens, NUM_STAGES=tile.stages, HAS_BIAS=int(parts.bias is not None),
        SPLIT=int(grid[2] > 1), EVEN_K=int(columns % BLOCK == 0), EMULATE=int(EMULATE),
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
    return y


def sparse_product(x: Tensor, tensors: tuple[Tensor, ...], plan: Plan) -> Tensor:
    """Return the salient part's contribution, float32 [T, O]."""
    assert plan.sparse is not None
    terms, groups, has_gain = plan.sparse
    starts, columns, codes, scale, zero = tensors[:5]
    y = x.new_empty(x.shape[0], plan.out_features, dtype=torch.float32)
    sparse_rows[(plan.out_features, -(-x.shape[0] // SPARSE_TOKENS))](
        x, starts, columns, codes, scale, zero, tensors[5] if terms else scale, tensors[6] if has_gain else scale, y,
        x.shape[0], plan.out_features, plan.in_features, x.stride(0), groups, plan.in_features // groups,
        BM=SPARSE_TOKENS, CHUNK=SPARSE_CHUNK, TERMS=terms, HAS_GAIN=has_gain, num_warps=1, **OPTIONS,
    )  # fmt: skip
    return y


def dense_matmul(x: Tensor, parts: Parts, plan: Plan) -> Tensor:
    """Unpack a chunk of rows at a time and multiply it densely."""
    y = x.new_empty(x.shape[0], plan.out_features)
    step = max(1, DENSE_CHUNK_WEIGHTS // plan.in_features)
    for start in range(0, plan.out_features, step):
        stop = min(start + step, plan.out_features)
        weight = dense_rows(x, parts, plan, start, stop)
        if step >= plan.out_features:
            torch.mm(x, weight.T, out=y)
        else:
            y[:, start:stop] = x @ weight.T
    return y if parts.bias is None else y.add_(parts.bias)


def dense_rows(like: Tensor, parts: Parts, plan: Plan, start: int, stop: int) -> Tensor:
    """Return rows start..stop of the weight in the dtype and on the device of `like`."""
    columns, rows = plan.in_features, stop - start
    dense = like.new_empty(rows, columns)
    if plan.kind == BYTES_KIND:
        dequantize_bytes[(rows, -(-columns // 1024))](*parts.bytes_, dense, start, columns, BK=1024, **OPTIONS)
        return dense
    for index, (stack, tensors) in enumerate(zip(plan.stacks, parts.stacks, strict=True)):
        dequantize_planes[(num_blocks(columns), -(-rows // ROW_TILE))](
            tensors.words, tensors.coefficient, tensors.shift, tensors.gain, dense, start, rows, plan.out_features,
            columns, num_blocks(columns), stack.groups, stack.group_size, BN=ROW_TILE, TERMS=stack.terms,
            PLANES=stack.planes, CODE=stack.is_code, SHIFT=stack.has_shift, HAS_GAIN=stack.has_gain,
            ADD=int(index > 0), **OPTIONS,
        )  # fmt: skip
    if plan.sparse is not None:
        scatter_rows[(rows,)](dense, *parts.sparse[:5], start, columns, CHUNK=SPARSE_CHUNK, num_warps=1, **OPTIONS)
    return dense

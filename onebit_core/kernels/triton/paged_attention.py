"""Attention of one new token a sequence over its pages, without gathering them first.

    s_k = cap(scale * q . K_k)     k from `first` to the token's own position       cap(s) = c tanh(s / c), or s
    y   = sum_k exp(s_k) V_k / sum_k exp(s_k)

The query heads that share a key head are the rows of one matrix, so a page is read once for all of them. A sequence's
keys are cut into splits of KEYS_OF_SPLIT, a program each, so that one long sequence fills the GPU; every split leaves
its largest score, its sum and its weighted values, and a second kernel joins them. The cut depends on nothing but the
sequence's own length: a token's result is the same alone and in a batch, and under the grid of a CUDA graph made for
longer sequences, whose spare programs find nothing to do.

Source: splitting over keys: FlashDecoding (arXiv:2311.01282, section 2); pages: PagedAttention (arXiv:2309.06180,
section 4.1).

Legend: B sequences, H query heads, K key heads, G = H / K, D head size, P pages, C splits.
"""

# ruff: noqa: ANN001, ANN201, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_OF_SPLIT = 256
KEYS_AT_ONCE = {2: 64, 4: 16}
"""By bytes of an element: float32 products run outside of the tensor core, whose operands fill the registers sooner."""
SMALLEST_DOT = 16


@triton.jit
def attend_split(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, top_ptr, sum_ptr, part_ptr,
    q_stride, table_stride, page_stride, key_stride, head_stride, num_splits, scale, cap,
    window, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    PAGE: tl.constexpr, AT_ONCE: tl.constexpr, SPLIT: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and key head: its largest score, sum of exponentials and weighted values."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(length_ptr + sequence)
    first = tl.maximum(length - window, 0)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < GROUP)[:, None] & (column < DIM)[None, :]
    q = tl.load(
        q_ptr + sequence * q_stride + (head * GROUP + row)[:, None] * DIM + column[None, :], mask=inside, other=0.0
    )
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    part = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    if end > first:
        for at in range(begin, end, AT_ONCE):
            key = at + tl.arange(0, AT_ONCE)
            seen = (key < end) & (key >= first)
            page = tl.load(table_ptr + sequence * table_stride + key // PAGE, mask=key < end, other=0)
            offset = page * page_stride + (key % PAGE) * key_stride + head * head_stride
            loaded = seen[:, None] & (column < DIM)[None, :]
            keys = tl.load(k_ptr + offset[:, None] + column[None, :], mask=loaded, other=0.0)
            score = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            if HAS_CAP:
                bent = 2.0 / (1.0 + tl.exp(-2.0 * score / cap)) - 1.0
                score = cap * bent
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp(score - safe[:, None])
            shrink = tl.exp(top - safe)
            values = tl.load(v_ptr + offset[:, None] + column[None, :], mask=loaded, other=0.0)
            part = part * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            top = higher
    place = (sequence * KEY_HEADS + head) * num_splits + split
    tl.store(top_ptr + place * ROWS + row, top)
    tl.store(sum_ptr + place * ROWS + row, total)
    tl.store(part_ptr + (place * ROWS + row)[:, None] * COLUMNS + column[None, :], part)


@triton.jit
def join_splits(
    top_ptr, sum_ptr, part_ptr, y_ptr, length_ptr, num_splits, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Join the splits of one sequence and query head, in their order."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    first = (sequence * KEY_HEADS + head // GROUP) * num_splits
    row = head % GROUP
    splits = tl.cdiv(tl.load(length_ptr + sequence), SPLIT)
    top = tl.full((), float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(top_ptr + (first + split) * ROWS + row))
    total = tl.zeros((), tl.float32)
    y = tl.zeros((COLUMNS,), tl.float32)
    for split in range(splits):
        at = (first + split) * ROWS + row
        weight = tl.exp(tl.load(top_ptr + at) - top)
        total += weight * tl.load(sum_ptr + at)
        y += weight * tl.load(part_ptr + at * COLUMNS + column)
    y = y / total
    place = (sequence * KEY_HEADS * GROUP + head) * DIM
    tl.store(y_ptr + place + column, y.to(y_ptr.dtype.element_ty), mask=column < DIM)


def _tile(group: int, dim: int) -> tuple[int, int]:
    """Return rows and columns of what a program computes."""
    return max(SMALLEST_DOT, triton.next_power_of_2(group)), triton.next_power_of_2(dim)


def part_bytes(heads: int, key_heads: int, dim: int) -> int:
    """Return how many bytes the splits of KEYS_OF_SPLIT keys of one sequence leave in memory until they are joined."""
    rows, columns = _tile(heads // key_heads, dim)
    return 4 * key_heads * rows * (columns + 2)


def paged_decode(
    query_BHD: Tensor,
    keys: Tensor,
    values: Tensor,
    pages_BP: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    most_keys: int,
) -> Tensor:
    """Attend one query a sequence over its pages.

    Args:
        query_BHD: float32, bfloat16 or float16, positions applied.
        keys: of one layer, [pages, tokens of a page, K, D], the query's dtype; last dimension contiguous.
        values: likewise, with the strides of keys.
        pages_BP: int64 page tables; what lies behind a sequence's last page is not read.
        lengths_B: int32, keys that each query may look at, at least 1.
        scale: of the scores.
        softcap: no score goes beyond it; None for no cap.
        window: how many tokens back a query looks, its own included; None for all.
        most_keys: no length is above it; known without asking the device.

    Returns:
        [B, H, D] in the query's dtype.
    """
    sequences, heads, dim = query_BHD.shape
    key_heads = keys.shape[2]
    group = heads // key_heads
    rows, columns = _tile(group, dim)
    splits = triton.cdiv(most_keys, KEYS_OF_SPLIT)
    query_BHD = query_BHD.contiguous()
    parts = (sequences, key_heads, splits, rows)
    top, total = (torch.empty(parts, dtype=torch.float32, device=keys.device) for _ in range(2))
    part = torch.empty((*parts, columns), dtype=torch.float32, device=keys.device)
    result = torch.empty_like(query_BHD)
    shape = {"KEY_HEADS": key_heads, "GROUP": group, "ROWS": rows, "DIM": dim, "COLUMNS": columns}
    attend_split[(sequences, key_heads, splits)](
        query_BHD, keys, values, pages_BP, lengths_B, top, total, part,
        query_BHD.stride(0), pages_BP.stride(0), keys.stride(0), keys.stride(1), keys.stride(2), splits, scale,
        softcap or 1.0, most_keys if window is None else window,
        PAGE=keys.shape[1], AT_ONCE=KEYS_AT_ONCE[keys.element_size()], SPLIT=KEYS_OF_SPLIT,
        HAS_CAP=softcap is not None, **shape,
    )  # fmt: skip
    join_splits[(sequences, heads)](top, total, part, result, lengths_B, splits, SPLIT=KEYS_OF_SPLIT, **shape)
    return result

"""From the scheduler's chunks to the tensors of one step. Everything attention needs is built here, once per step.

All tokens of the step lie in one row of T. Chunks of one token come first, sorted by how many pages they read, then the
longer chunks:

    | one token each: DecodeGroup | DecodeGroup | PrefillPart ......... | PrefillPart .... |

A DecodeGroup is attended in one call, its page tables padded with the null page to the widest; a group holds no
sequence less than half as wide as its widest, so at most half of what is gathered is padding. A PrefillPart is attended
by itself. Masks are additive and already in the model's dtype, because scaled_dot_product_attention would otherwise
convert a boolean mask again in every layer.

Legend: T tokens of the step, R rows that draw, B rows of a group, P pages, S = P * page_size keys.
"""

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from service.engine.page_allocator import NULL_PAGE
from service.engine.scheduler import Chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """Rows first..last, one token each.

    Attributes:
        first: first row of the step's T.
        last: one past the last.
        pages_BP: int64 page tables, padded with the null page.
        mask_B11S: 0 where the row may look, -inf elsewhere; the model's dtype.
    """

    first: int
    last: int
    pages_BP: Tensor
    mask_B11S: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillPart:
    """Rows first..last, consecutive tokens of one sequence.

    Attributes:
        first: first row of the step's T.
        last: one past the last.
        pages_P: int64 page table.
        num_keys: keys to look at, those of this chunk included.
        mask_TS: additive causal mask over num_keys; None when the chunk begins the sequence (plain causal).
    """

    first: int
    last: int
    pages_P: Tensor
    num_keys: int
    mask_TS: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's tensors.

    Attributes:
        input_ids_1T: int64.
        position_ids_1T: int64.
        slots_T: int64, where the tokens' keys and values go.
        fresh_pages_P: int64, pages this step begins but does not fill; None when there are none.
        decode_groups: the first rows.
        prefill_parts: the rows after them.
        drawing: the chunks that draw a token, in order of their rows.
        drawing_rows_R: int64, the rows of their last tokens.
    """

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    slots_T: Tensor
    fresh_pages_P: Tensor | None
    decode_groups: tuple[DecodeGroup, ...]
    prefill_parts: tuple[PrefillPart, ...]
    drawing: tuple[Chunk, ...]
    drawing_rows_R: Tensor


def build_batch(chunks: ListOf[Chunk], *, page_size: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """Build the tensors of one step; `chunks` is not empty and every page it needs is in the page tables."""
    singles = sorted((chunk for chunk in chunks if chunk.length == 1), key=_pages_read, reverse=True)
    longer = [chunk for chunk in chunks if chunk.length > 1]
    ordered = [*singles, *longer]
    ends = np.cumsum([chunk.length for chunk in ordered])
    positions = np.concatenate([np.arange(chunk.start, chunk.start + chunk.length) for chunk in ordered])
    tokens = [token for chunk in ordered for token in chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]]
    pages = np.concatenate([_page_of_each_token(chunk, page_size) for chunk in ordered])
    fresh = [page for chunk in ordered if (page := _fresh_page(chunk, page_size)) != NULL_PAGE]

    def on_device(numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> Tensor:
        return torch.from_numpy(numbers).to(device, non_blocking=True)

    return Batch(
        input_ids_1T=on_device(np.array([tokens], dtype=np.int64)),
        position_ids_1T=on_device(positions[None]),
        slots_T=on_device(pages * page_size + positions % page_size),
        fresh_pages_P=on_device(np.array(fresh, dtype=np.int64)) if fresh else None,
        decode_groups=_decode_groups(singles, page_size=page_size, dtype=dtype, device=device),
        prefill_parts=tuple(
            _prefill_part(chunk, last=int(end), dtype=dtype, device=device)
            for chunk, end in zip(longer, ends[len(singles) :], strict=True)
        ),
        drawing=tuple(chunk for chunk in ordered if chunk.draws),
        drawing_rows_R=on_device(
            np.array([end - 1 for chunk, end in zip(ordered, ends, strict=True) if chunk.draws], np.int64)
        ),
    )


def _pages_read(chunk: Chunk) -> int:
    return len(chunk.sequence.page_table)


def _page_table(chunk: Chunk) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """View the page table as an array; the view must be gone before the table grows."""
    return np.frombuffer(chunk.sequence.page_table, dtype=np.int64)


def _page_of_each_token(chunk: Chunk, page_size: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return _page_table(chunk)[np.arange(chunk.start, chunk.start + chunk.length) // page_size]


def _fresh_page(chunk: Chunk, page_size: int) -> int:
    """Return the page that this chunk begins but does not fill, or the null page."""
    end = chunk.start + chunk.length
    begun = (end - 1) // page_size
    is_fresh = chunk.start <= begun * page_size and end % page_size != 0
    return chunk.sequence.page_table[begun] if is_fresh else NULL_PAGE


def _decode_groups(
    singles: list[Chunk], *, page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[DecodeGroup, ...]:
    """Cut the sorted one-token chunks where they become less than half as wide as their group's widest."""
    groups = []
    first = 0
    for _, members in groupby(singles, key=lambda chunk: _pages_read(chunk).bit_length()):
        rows = list(members)
        width = _pages_read(rows[0])
        table = np.full((len(rows), width), NULL_PAGE, dtype=np.int64)
        for row, chunk in zip(table, rows, strict=True):
            row[: _pages_read(chunk)] = _page_table(chunk)
        num_keys_B = np.array([chunk.start + 1 for chunk in rows])
        hidden_BS = np.arange(width * page_size)[None] >= num_keys_B[:, None]
        mask_BS = np.where(hidden_BS, np.float32("-inf"), np.float32(0))
        groups.append(
            DecodeGroup(
                first=first,
                last=first + len(rows),
                pages_BP=torch.from_numpy(table).to(device, non_blocking=True),
                mask_B11S=torch.from_numpy(mask_BS)[:, None, None].to(device, dtype, non_blocking=True),
            )
        )
        first += len(rows)
    return tuple(groups)


def _prefill_part(chunk: Chunk, *, last: int, dtype: torch.dtype, device: torch.device) -> PrefillPart:
    num_keys = chunk.start + chunk.length
    mask = None
    if chunk.start > 0:
        visible = torch.ones(chunk.length, num_keys, dtype=torch.bool, device=device).tril(chunk.start)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    return PrefillPart(
        first=last - chunk.length,
        last=last,
        pages_P=torch.from_numpy(_page_table(chunk).copy()).to(device, non_blocking=True),
        num_keys=num_keys,
        mask_TS=mask,
    )

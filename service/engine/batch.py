"""From the scheduler's chunks to the tensors of one step. Everything attention needs is built here, once per step.

All tokens of the step lie in one row of T. Chunks of one token come first, sorted by how many pages they read, then the
longer chunks:

    | one token each: DecodeGroup | DecodeGroup | PrefillPart ......... | PrefillPart .... |

A DecodeGroup is attended in one call, its page tables padded with the null page to the widest; a group holds no
sequence less than half as wide as its widest, so at most half of what is gathered is padding. A PrefillPart is attended
by itself. Masks are additive and already in the model's dtype, because scaled_dot_product_attention would otherwise
convert a boolean mask again in every layer. Where a kernel reads the pages where they lie, one group holds all rows: it
needs no mask, looks at no padding, and finds a window by itself.

Layers with a sliding window of W tokens look at the positions from q - W + 1 to q only. For every window that the model
has, groups and parts are built a second time, over the pages that reach into it and no others (`Reach`); as long as
every sequence of the step is within the window, the plain ones serve.

    page          0       1       2            W = 5, pages of 4, q = 10:
    position   0 1 2 3|4 5 6 7|8 9 q           page 0 is not read, and of page 1 two keys are hidden
                       x x o o o o o

Legend: T tokens of the step, R rows that draw, B rows of a group, P pages, S = P * page_size keys.
"""

from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from service.engine.page_allocator import NULL_PAGE
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """Rows first..last, one token each.

    Attributes:
        first: first row of the step's T.
        last: one past the last.
        pages_BP: int64 page tables, padded with the null page.
        mask_B11S: 0 where the row may look, -inf elsewhere; the model's dtype. None for a kernel that needs none.
        lengths_B: int32, keys in the table's pages up to the row's own.
        most_keys: the largest of the lengths.
    """

    first: int
    last: int
    pages_BP: Tensor
    mask_B11S: Tensor | None
    lengths_B: Tensor
    most_keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillPart:
    """Rows first..last, consecutive tokens of one sequence.

    Attributes:
        first: first row of the step's T.
        last: one past the last.
        pages_P: int64 page table, from the first page that is looked at.
        num_keys: keys to look at from there, those of this chunk included.
        mask_TS: additive mask over num_keys; None when it would be plainly causal from the first key on.
    """

    first: int
    last: int
    pages_P: Tensor
    num_keys: int
    mask_TS: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """What the rows of a step look at, in layers of one sliding window."""

    decode_groups: tuple[DecodeGroup, ...]
    prefill_parts: tuple[PrefillPart, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """What the fused blocks need in place of groups, parts and masks: who follows whom, and where their pages are.

    Attributes:
        runs_N4: int64, a chunk each: first row, rows, position of the first, place of its page table in pages_P.
        pages_P: int64, the page tables one after the other.
    """

    runs_N4: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"
    pages_P: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"


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
        scored: sequences whose prompt is scored in this step, with the positions whose logits are needed for it.
        scored_rows_R: int64, the rows of those positions; None when there are none.
        windowed: sliding window to what layers of that window look at; decode_groups and prefill_parts are for layers
            without one.
        runs: in place of groups and parts, where blocks are fused.
        adapters_T: int64, whose scales the rows take (AdapterSwitch.rows); None where no row takes any.
    """

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    slots_T: Tensor
    fresh_pages_P: Tensor | None
    decode_groups: tuple[DecodeGroup, ...]
    prefill_parts: tuple[PrefillPart, ...]
    drawing: tuple[Chunk, ...]
    drawing_rows_R: Tensor
    scored: tuple[tuple[Sequence, range], ...] = ()
    scored_rows_R: Tensor | None = None
    windowed: Mapping[int, Reach] = field(default_factory=dict)
    runs: Runs | None = None
    adapters_T: Tensor | None = None

    @property
    def logits_rows_R(self) -> Tensor:
        """The rows whose logits are needed: those that draw, then those that are scored."""
        if self.scored_rows_R is None:
            return self.drawing_rows_R
        return torch.cat([self.drawing_rows_R, self.scored_rows_R])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Making:
    """How masks and page tables are made: sizes, where they go, and how far back they look (None: to the start)."""

    page_size: int
    dtype: torch.dtype
    device: torch.device
    reads_pages: bool
    window: int | None = None

    def first_page(self, chunk: Chunk) -> int:
        """Return the first page the chunk looks at.

        A window reaches into at most one page more than it could fill; taking always so many keeps rows of equal
        windows equally wide, and so in one group.
        """
        if self.window is None:
            return 0
        if chunk.length == 1:
            return max(0, _pages_filled(chunk, self.page_size) - (-(-(self.window - 1) // self.page_size) + 1))
        return max(0, chunk.start - self.window + 1) // self.page_size

    def within(self, chunk: Chunk) -> bool:
        """Whether the window hides nothing from the chunk."""
        return self.window is None or chunk.start + chunk.length <= self.window


def build_batch(
    chunks: ListOf[Chunk],
    *,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    windows: ListOf[int] = (),
    fused: bool = False,
    reads_pages: bool = False,
) -> Batch:
    """Build the tensors of one step.

    Args:
        chunks: what is computed, not empty; every page it needs is in the page tables.
        page_size: tokens in a page.
        dtype: of the masks, the model's.
        device: where the tensors go.
        windows: the model's sliding windows, each once.
        fused: whether the blocks are fused, which need no masks.
        reads_pages: whether a kernel reads the pages of rows with one token.
    """
    ordered = _ordered(chunks)
    singles = [chunk for chunk in ordered if chunk.length == 1]
    longer = ordered[len(singles) :]
    ends = np.cumsum([chunk.length for chunk in ordered])
    positions = np.concatenate([np.arange(chunk.start, chunk.start + chunk.length) for chunk in ordered])
    tokens = [token for chunk in ordered for token in chunk.sequence.tokens[chunk.start : chunk.start + chunk.length]]
    pages = np.concatenate([_page_of_each_token(chunk, page_size) for chunk in ordered])
    fresh = [page for chunk in ordered if (page := _fresh_page(chunk, page_size)) != NULL_PAGE]

    def on_device(numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> Tensor:
        return torch.from_numpy(numbers).to(device, non_blocking=True)

    scored = [(chunk, end, scores) for chunk, end in zip(ordered, ends, strict=True) if (scores := _to_score(chunk))]
    scored_rows = [np.array(scores) - chunk.start + (end - chunk.length) for chunk, end, scores in scored]
    making = _Making(page_size=page_size, dtype=dtype, device=device, reads_pages=reads_pages)
    plain = Reach(
        decode_groups=() if fused else _decode_groups(singles, making),
        prefill_parts=() if fused else _prefill_parts(longer, len(singles), making),
    )
    return Batch(
        input_ids_1T=on_device(np.array([tokens], dtype=np.int64)),
        position_ids_1T=on_device(positions[None]),
        slots_T=on_device(pages * page_size + positions % page_size),
        fresh_pages_P=on_device(np.array(fresh, dtype=np.int64)) if fresh else None,
        decode_groups=plain.decode_groups,
        prefill_parts=plain.prefill_parts,
        drawing=tuple(chunk for chunk in ordered if chunk.draws),
        drawing_rows_R=on_device(
            np.array([end - 1 for chunk, end in zip(ordered, ends, strict=True) if chunk.draws], np.int64)
        ),
        scored=tuple((chunk.sequence, scores) for chunk, _, scores in scored),
        scored_rows_R=on_device(np.concatenate(scored_rows)) if scored else None,
        runs=_runs(ordered) if fused else None,
        windowed={
            window: _windowed(singles, longer, replace(making, window=window), plain) for window in windows if not fused
        },
    )


def adapted(chunks: ListOf[Chunk]) -> bool:
    """Say whether any of a step's sequences takes an adapter."""
    return any(chunk.sequence.request.adapter for chunk in chunks)


def with_adapters(batch: Batch, chunks: ListOf[Chunk], numbers: Mapping[str, int]) -> Batch:
    """Return a batch whose rows know their adapters.

    Args:
        batch: built from the chunks.
        chunks: of the step.
        numbers: of the adapters, by name (AdapterSwitch.index).
    """
    of_chunks = [(numbers[name] if (name := chunk.sequence.request.adapter) else 0) for chunk in _ordered(chunks)]
    rows = np.repeat(np.array(of_chunks, np.int64), [chunk.length for chunk in _ordered(chunks)])
    return replace(batch, adapters_T=torch.from_numpy(rows).to(batch.slots_T.device, non_blocking=True))


def _ordered(chunks: ListOf[Chunk]) -> list[Chunk]:
    """Return the chunks in the order of their rows: single tokens, those with the longest past first, then the rest."""
    singles = sorted((chunk for chunk in chunks if chunk.length == 1), key=lambda chunk: chunk.start, reverse=True)
    return [*singles, *(chunk for chunk in chunks if chunk.length > 1)]


def _runs(ordered: list[Chunk]) -> Runs:
    """Return the runs of a step, rows and page tables in the order of the chunks."""
    lengths = [chunk.length for chunk in ordered]
    tables = [_page_table(chunk) for chunk in ordered]
    firsts, places = (np.cumsum([0, *sizes[:-1]]) for sizes in (lengths, [len(table) for table in tables]))
    runs_N4 = np.stack((firsts, lengths, [chunk.start for chunk in ordered], places), axis=1)
    return Runs(runs_N4=runs_N4, pages_P=np.concatenate(tables))


def _to_score(chunk: Chunk) -> range:
    """Return the positions of a chunk whose logits say how probable the prompt's next tokens were."""
    sequence = chunk.sequence
    if sequence.request.sampling.prompt_logprobs is None:
        return range(0)
    first = max(chunk.start, len(sequence.prompt_scores))  # those before are scored, if the sequence was preempted
    return range(first, min(chunk.start + chunk.length, sequence.num_prompt_tokens - 1))


def _prefill_parts(longer: list[Chunk], first: int, making: _Making) -> tuple[PrefillPart, ...]:
    """Return the parts, whose rows begin at `first`."""
    ends = first + np.cumsum([chunk.length for chunk in longer])
    return tuple(_prefill_part(chunk, last=int(end), making=making) for chunk, end in zip(longer, ends, strict=True))


def _windowed(singles: list[Chunk], longer: list[Chunk], making: _Making, plain: Reach) -> Reach:
    """Return what layers of one window look at: the same as the plain ones, while no sequence is past the window."""
    if all(making.within(chunk) for chunk in (*singles, *longer)):
        return plain
    groups = plain.decode_groups if making.reads_pages else _decode_groups(singles, making)
    return Reach(decode_groups=groups, prefill_parts=_prefill_parts(longer, len(singles), making))


def _pages_filled(chunk: Chunk, page_size: int) -> int:
    """Return how many pages hold the sequence up to the chunk's end."""
    return -(-(chunk.start + chunk.length) // page_size)


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


def _decode_groups(singles: list[Chunk], making: _Making) -> tuple[DecodeGroup, ...]:
    """Cut the sorted one-token chunks where they become less than half as wide as their group's widest."""
    groups = []
    first = 0
    page_size = making.page_size
    for _, members in groupby(singles, key=lambda chunk: making.reads_pages or _width(chunk, making).bit_length()):
        rows = list(members)
        first_pages = [making.first_page(chunk) for chunk in rows]
        width = _width(rows[0], making)
        table = np.full((len(rows), width), NULL_PAGE, dtype=np.int64)
        for row, chunk, first_page in zip(table, rows, first_pages, strict=True):
            pages = _page_table(chunk)[first_page : _pages_filled(chunk, page_size)]
            row[: len(pages)] = pages
        lengths_B = np.array([chunk.start + 1 for chunk in rows]) - np.array(first_pages) * page_size
        groups.append(
            DecodeGroup(
                first=first,
                last=first + len(rows),
                pages_BP=torch.from_numpy(table).to(making.device, non_blocking=True),
                mask_B11S=None if making.reads_pages else _decode_mask(lengths_B, width * page_size, making),
                lengths_B=torch.from_numpy(lengths_B.astype(np.int32)).to(making.device, non_blocking=True),
                most_keys=int(lengths_B.max()),
            )
        )
        first += len(rows)
    return tuple(groups)


def _decode_mask(
    lengths_B: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", num_keys: int, making: _Making
) -> Tensor:
    """Return the additive mask [B, 1, 1, S] of rows that look at their own last key and back."""
    keys_1S, lengths_B1 = np.arange(num_keys)[None], lengths_B[:, None]
    hidden_BS = keys_1S >= lengths_B1
    if making.window is not None:
        hidden_BS |= keys_1S < lengths_B1 - making.window
    mask_BS = np.where(hidden_BS, np.float32("-inf"), np.float32(0))
    return torch.from_numpy(mask_BS)[:, None, None].to(making.device, making.dtype, non_blocking=True)


def _width(chunk: Chunk, making: _Making) -> int:
    """Return how many pages a one-token chunk reads."""
    return _pages_filled(chunk, making.page_size) - making.first_page(chunk)


def _prefill_part(chunk: Chunk, *, last: int, making: _Making) -> PrefillPart:
    first_page = making.first_page(chunk)
    start = chunk.start - first_page * making.page_size  # counted from the first key looked at
    num_keys = start + chunk.length
    mask = None
    if start > 0 or not making.within(chunk):
        visible = torch.ones(chunk.length, num_keys, dtype=torch.bool, device=making.device).tril(start)
        if making.window is not None:
            visible = visible.triu(start - making.window + 1)
        mask = torch.zeros(visible.shape, dtype=making.dtype, device=making.device)
        mask.masked_fill_(~visible, float("-inf"))
    pages = _page_table(chunk)[first_page : _pages_filled(chunk, making.page_size)]
    return PrefillPart(
        first=last - chunk.length,
        last=last,
        pages_P=torch.from_numpy(pages.copy()).to(making.device, non_blocking=True),
        num_keys=num_keys,
        mask_TS=mask,
    )

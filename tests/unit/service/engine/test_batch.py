"""The tensors of a step say where every token stands, where its keys go and what it may see."""

from array import array

import pytest
import torch

from service.engine.batch import build_batch
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.types import GenerationRequest, SamplingParams

PAGE_SIZE = 4


def make_chunk(tokens, *, start, length, pages):
    request = GenerationRequest(request_id="r", prompt_token_ids=tuple(tokens), sampling=SamplingParams(max_tokens=1))
    sequence = Sequence(request=request, seed=0, tokens=list(tokens), num_computed=start)
    sequence.page_table = array("q", pages)
    return Chunk(sequence=sequence, start=start, length=length, draws=start + length == len(tokens))


def build(*chunks, windows=()):
    return build_batch(chunks, page_size=PAGE_SIZE, dtype=torch.float32, device=torch.device("cpu"), windows=windows)


def test_single_tokens_come_first_and_chunks_after_them():
    """One row of tokens: the short sequence's last token, then the long one's chunk, each at its position."""
    prompt = make_chunk(range(10, 20), start=0, length=6, pages=[5, 2])
    decode = make_chunk([7, 8, 9], start=2, length=1, pages=[3])
    batch = build(prompt, decode)
    assert batch.input_ids_1T.tolist() == [[9, 10, 11, 12, 13, 14, 15]]
    assert batch.position_ids_1T.tolist() == [[2, 0, 1, 2, 3, 4, 5]]
    assert batch.slots_T.tolist() == [3 * 4 + 2, 20, 21, 22, 23, 8, 9]
    assert (batch.drawing, batch.drawing_rows_R.tolist()) == ((decode,), [0])
    assert [(part.first, part.last, part.num_keys) for part in batch.prefill_parts] == [(1, 7, 6)]


def test_a_row_sees_its_own_tokens_and_no_padding():
    """The mask ends behind the row's own position; the narrower table is padded with the null page."""
    wide = make_chunk(range(20), start=10, length=1, pages=[1, 2, 3])
    narrow = make_chunk(range(9), start=5, length=1, pages=[4, 5])
    (group,) = build(narrow, wide).decode_groups
    assert group.pages_BP.tolist() == [[1, 2, 3], [4, 5, 0]]
    visible = group.mask_B11S[:, 0, 0] == 0
    assert visible.sum(-1).tolist() == [11, 6]
    assert visible[1, :6].all()
    assert group.mask_B11S[~visible[:, None, None]].eq(float("-inf")).all()


def test_a_long_sequence_does_not_widen_the_short_ones():
    """Rows less than half as wide as the widest are attended in a group of their own."""
    long = make_chunk(range(64), start=63, length=1, pages=range(1, 17))
    short = [make_chunk([1, 2], start=1, length=1, pages=[page]) for page in (20, 21, 22)]
    groups = build(*short, long).decode_groups
    assert [(group.first, group.last, group.pages_BP.shape[1]) for group in groups] == [(0, 1, 16), (1, 4, 1)]


def test_a_later_chunk_sees_everything_before_it():
    """The first chunk is plainly causal; the next one sees the computed tokens and its own up to each row."""
    first = make_chunk(range(9), start=0, length=5, pages=[1, 2])
    later = make_chunk(range(9), start=5, length=3, pages=[3, 4])
    parts = build(first, later).prefill_parts
    assert parts[0].mask_TS is None
    visible = parts[1].mask_TS == 0
    assert visible.tolist() == [[key <= 5 + row for key in range(8)] for row in range(3)]


def test_only_pages_begun_and_not_filled_are_cleared():
    """A page that the step fills, or that was begun before, keeps what it holds."""
    begins = make_chunk(range(9), start=0, length=6, pages=[11, 12])
    fills = make_chunk(range(9), start=0, length=8, pages=[13, 14])
    continues = make_chunk(range(9), start=5, length=2, pages=[15, 16])
    starts_one = make_chunk(range(9), start=8, length=1, pages=[17, 18, 19])
    fresh = build(begins, fills, continues, starts_one).fresh_pages_P
    assert sorted(fresh.tolist()) == [12, 19]
    assert build(fills).fresh_pages_P is None


def seen_by(pages, mask, page_table):
    """Return the positions that a row's mask shows in the pages it gathers."""
    positions = [page_table.index(page) * PAGE_SIZE + place for page in pages for place in range(PAGE_SIZE)]
    return [position for position, value in zip(positions, mask, strict=True) if value == 0]


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9])
def test_a_window_shows_the_latest_positions_and_gathers_little_else(window):
    """Of each row's own pages, exactly the last `window` positions are seen, whatever stands beside it in the group."""
    starts = (2, 6, 11, 12, 13, 15)
    tables = [list(range(10 * row + 1, 10 * row + 6)) for row in range(len(starts))]
    chunks = [
        make_chunk(range(start + 1), start=start, length=1, pages=table[: start // PAGE_SIZE + 1])
        for start, table in zip(starts, tables, strict=True)
    ]
    groups = build(*chunks, windows=(window,)).windowed[window].decode_groups
    rows = [(pages, mask) for group in groups for pages, mask in zip(group.pages_BP, group.mask_B11S, strict=True)]
    assert [(group.first, group.last) for group in groups][-1][1] == len(rows) == len(starts)
    for (pages, mask), start, table in zip(rows, sorted(starts, reverse=True), reversed(tables), strict=True):
        own = [page for page in pages.tolist() if page]
        assert seen_by(own, mask[0, 0, : len(own) * PAGE_SIZE], table) == list(
            range(max(0, start - window + 1), start + 1)
        )
        assert mask[0, 0, len(own) * PAGE_SIZE :].eq(float("-inf")).all()
        assert len(pages) <= (window - 1) // PAGE_SIZE + 2


def test_a_chunk_sees_its_window_from_the_first_page_that_reaches_into_it():
    """Positions 9 to 11 with a window of 3: pages 1 and 2 hold what they see, and page 0 is not read."""
    chunk = make_chunk(range(12), start=9, length=3, pages=[7, 8, 9])
    (part,) = build(chunk, windows=(3,)).windowed[3].prefill_parts
    assert (part.pages_P.tolist(), part.num_keys) == ([8, 9], 8)
    visible = part.mask_TS == 0
    assert visible.tolist() == [[row + 3 <= key <= row + 5 for key in range(8)] for row in range(3)]


def test_a_first_chunk_longer_than_the_window_is_not_plainly_causal():
    """Its later rows no longer see the first keys."""
    chunk = make_chunk(range(7), start=0, length=7, pages=[1, 2])
    (part,) = build(chunk, windows=(4,)).windowed[4].prefill_parts
    visible = part.mask_TS == 0
    assert visible.tolist() == [[row - 4 < key <= row for key in range(7)] for row in range(7)]


def test_within_the_window_layers_share_what_plain_ones_look_at():
    """Nothing is built twice while every sequence is short; one that is longer makes a view of its own."""
    short = make_chunk(range(5), start=0, length=5, pages=[1, 2])
    token = make_chunk(range(8), start=7, length=1, pages=[3, 4])
    batch = build(short, token, windows=(8, 7))
    assert batch.windowed[8].prefill_parts is batch.prefill_parts
    assert batch.windowed[8].decode_groups is batch.decode_groups
    assert (batch.windowed[7].decode_groups[0].mask_B11S == 0).sum() == 7

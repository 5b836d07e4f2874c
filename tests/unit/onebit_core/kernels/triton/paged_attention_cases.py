"""Paged decode attention under Triton's interpreter; `test_interpreter.py` starts this file in its own process."""

import pytest
import torch

from onebit_core.kernels.triton.paged_attention import KEYS_OF_SPLIT, paged_decode

PAGE = 16
LENGTHS = [1, 16, 17, 100, KEYS_OF_SPLIT + 1, 520]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(heads, key_heads, dim):
    """Return queries, pages scattered over a pool whose unused slots are NaN, tables and lengths."""
    counts = [-(-length // PAGE) for length in LENGTHS]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1
    keys, values = (torch.full((sum(counts) + 1, PAGE, key_heads, dim), torch.nan) for _ in range(2))
    pages_BP = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int64)
    plain = []
    for row, (table, length) in enumerate(zip(order.split(counts), LENGTHS, strict=True)):
        pages_BP[row, : len(table)] = table
        k, v = (draw(length, key_heads, dim, seed=seed + row) for seed in (100, 200))
        position = torch.arange(length)
        keys[table[position // PAGE], position % PAGE] = k
        values[table[position // PAGE], position % PAGE] = v
        plain.append((k, v))
    return draw(len(LENGTHS), heads, dim, seed=1), keys, values, pages_BP, plain


def expected(query_HD, keys_SKD, values_SKD, *, scale, softcap, window):
    """Return attention of one query in float64."""
    group = query_HD.shape[0] // keys_SKD.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1)[-(window or len(x)) :] for x in (keys_SKD, values_SKD))
    scores_HS = torch.einsum("hd,shd->hs", query_HD.double(), keys) * scale
    if softcap is not None:
        scores_HS = torch.tanh(scores_HS / softcap) * softcap
    return torch.einsum("hs,shd->hd", scores_HS.softmax(-1), values)


@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(9, 3, 64), (2, 2, 80), (20, 1, 16)])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, None), (None, 33), (2.0, 300)])
def test_equals_attention_over_the_gathered_keys(heads, key_heads, dim, softcap, window):
    """Lengths around pages and splits; what lies behind a sequence's end is NaN and is not read."""
    query_BHD, keys, values, pages_BP, plain = case(heads, key_heads, dim)
    options = {"scale": dim**-0.5, "softcap": softcap, "window": window}
    lengths_B = torch.tensor(LENGTHS, dtype=torch.int32)
    found_BHD = paged_decode(query_BHD, keys, values, pages_BP, lengths_B, most_keys=max(LENGTHS), **options)
    for query_HD, found_HD, (k, v) in zip(query_BHD, found_BHD, plain, strict=True):
        torch.testing.assert_close(found_HD.double(), expected(query_HD, k, v, **options), rtol=1e-4, atol=1e-5)


def test_a_row_is_the_same_alone_and_under_a_larger_grid():
    """Bit for bit: the cut of the keys depends on the sequence's own length."""
    query_BHD, keys, values, pages_BP, _ = case(6, 2, 32)
    lengths_B = torch.tensor(LENGTHS, dtype=torch.int32)
    together_BHD = paged_decode(query_BHD, keys, values, pages_BP, lengths_B, scale=0.2, most_keys=2000)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone_BHD = paged_decode(
            query_BHD[one], keys, values, pages_BP[one], lengths_B[one], scale=0.2, most_keys=length
        )
        assert torch.equal(alone_BHD, together_BHD[one])


def test_half_precision():
    """float16 keys and queries; sums are float32."""
    query_BHD, keys, values, pages_BP, plain = case(6, 2, 64)
    half = [x.half() for x in (query_BHD, keys, values)]
    lengths_B = torch.tensor(LENGTHS, dtype=torch.int32)
    found_BHD = paged_decode(*half, pages_BP, lengths_B, scale=0.125, most_keys=max(LENGTHS))
    assert found_BHD.dtype == torch.float16
    for query_HD, found_HD, (k, v) in zip(query_BHD, found_BHD, plain, strict=True):
        reference = expected(query_HD, k, v, scale=0.125, softcap=None, window=None)
        torch.testing.assert_close(found_HD.double(), reference, rtol=1e-2, atol=5e-3)

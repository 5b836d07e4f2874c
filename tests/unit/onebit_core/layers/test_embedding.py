"""Embedding and head of few bits: what is stored means what the format says, and every backend multiplies by it."""

import numpy
import pytest
import torch

from onebit_core.layers import EMBEDDINGS, GroupedIntLinear, TiedHead, packed_bytes, quantize_table, use_backend
from onebit_core.layers.embedding import groups_of_row
from tests.support.backends import CPU_BACKENDS

SHRINKS = [1 - 0.04 * step for step in range(13)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(bits: int, table: torch.Tensor):
    embedding = EMBEDDINGS[bits](*table.shape)
    embedding.fill(table)
    return embedding


def bit_of(words, place: int) -> int:
    """Bit `place` of a run of words, least significant first, by the page on the artifact's format."""
    return (int(words[place // 32]) & 0xFFFFFFFF) >> (place % 32) & 1


@pytest.mark.parametrize("columns", [64, 48, 100])
def test_a_4_bit_table_is_what_its_bits_say(columns):
    """Decoded bit by bit in plain Python: scale * (code - zero), zero points of all rows in one run."""
    embedding = filled(4, draw(7, columns))
    groups, planes = embedding.groups, embedding.planes.numpy()
    size = columns // groups
    for row in range(7):
        for column in range(columns):
            code = sum(bit_of(planes[bit, row], column) << bit for bit in range(4))
            place = row * groups + column // size
            zero = sum(bit_of(embedding.zero[bit].numpy(), place) << bit for bit in range(4))
            expected = float(embedding.scale[row, column // size]) * (code - zero)
            assert float(embedding.dequantize()[row, column]) == pytest.approx(expected, rel=1e-6)


def test_a_4_bit_range_is_the_best_of_those_tried():
    """Each group's squared error is the least that NumPy finds by trying every range in float64."""
    table = draw(5, 128)
    table[0, 3] = 40.0  # an outlier that a min-max range would stretch to
    decided = filled(4, table).dequantize().double().numpy()
    for row, column in numpy.ndindex(5, 2):
        span = slice(64 * column, 64 * column + 64)
        weights = table[row, span].double().numpy()
        errors = []
        for shrink in SHRINKS:
            low, high = shrink * min(weights.min(), 0), shrink * max(weights.max(), 0)
            scale = float(numpy.float16((high - low) / 15))
            zero = numpy.clip(numpy.round(-low / scale), 0, 15)
            codes = numpy.clip(numpy.round(weights / scale) + zero, 0, 15)
            errors.append(numpy.square((codes - zero) * scale - weights).sum())
        assert numpy.square(decided[row, span] - weights).sum() == pytest.approx(min(errors), rel=1e-3)


@pytest.mark.parametrize(("columns", "groups"), [(576, 9), (64, 1), (48, 1), (8192, 128), (100, 2), (72, 1), (53, 1)])
def test_groups_divide_a_row_and_are_about_64_wide(columns, groups):
    """By ratio: 100 columns are two groups of 50; a prime width is one group."""
    assert groups_of_row(columns) == groups


@pytest.mark.parametrize(("bits", "expected"), [(8, 8 + 16 / 576), (4, 4 + 20 / 64)])
def test_bits_of_a_table(bits, expected):
    """Codes, a float16 scale and, at 4 bit, a 4-bit zero point for every group of 64; nothing else."""
    embedding = filled(bits, draw(32, 576))
    stored = sum(tensor.nbytes for tensor in embedding.state_dict().values())
    assert 8 * stored / (32 * 576) == expected


@pytest.mark.parametrize("bits", EMBEDDINGS)
def test_a_lookup_gives_the_rows_of_the_table(bits):
    """Any shape of ids, repeated or none; in the dtype of the model."""
    embedding = filled(bits, draw(50, 48))
    table = embedding.dequantize()
    for ids in (torch.tensor(49), torch.tensor([[3, 3, 0], [49, 7, 3]]), torch.empty(1, 0, dtype=torch.int64)):
        assert torch.equal(embedding(ids), table[ids])
    assert embedding.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", EMBEDDINGS)
def test_a_table_is_within_half_a_step(bits):
    """No weight inside of the stored range of its row is farther from its own than half a step."""
    table = draw(50, 64)
    embedding = filled(bits, table)
    step = embedding.scale.float().view(50, 1)
    codes = (embedding.dequantize() / step).round()
    low, high = (codes.amin(1, keepdim=True) * step, codes.amax(1, keepdim=True) * step)
    inside = (low <= table) & (table <= high)
    assert inside.float().mean() > 0.9
    assert ((embedding.dequantize() - table).abs() <= 0.501 * step)[inside].all()


@pytest.mark.parametrize("bits", EMBEDDINGS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_tied_head_multiplies_by_the_embedding(backend, bits):
    """The same table on every backend, no tensors of its own; packed, it is counted."""
    embedding = filled(bits, draw(50, 48))
    head = TiedHead(embedding)
    x = draw(3, 48, seed=1)
    use_backend(head, backend)
    tolerance = 5e-3 if backend == "cpu" else 1e-5  # packed kernels round x to 14 bits
    torch.testing.assert_close(head(x), x @ embedding.dequantize().T, rtol=tolerance, atol=tolerance)
    assert list(head.state_dict()) == []
    assert (packed_bytes(head) > 0) == (backend == "cpu")


@pytest.mark.parametrize("bits", EMBEDDINGS)
def test_a_large_table_is_quantized_in_parts(bits, monkeypatch):
    """Parts of a few rows give the same tensors as the whole at once; an untied head likewise."""
    table = draw(101, 64)
    at_once, head_at_once = filled(bits, table).state_dict(), quantize_table(table, bits).state_dict()
    monkeypatch.setattr("onebit_core.layers.embedding.WEIGHTS_AT_ONCE", 3 * 64)
    for whole, parts in ((at_once, filled(bits, table).state_dict()), (head_at_once, quantize_table(table, bits))):
        parts = parts.state_dict() if isinstance(parts, GroupedIntLinear) else parts
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_untied_head_of_4_bits_is_the_same_table():
    """A layer of its own, with the codes an embedding would have."""
    table = draw(40, 128)
    layer = quantize_table(table, 4)
    assert (layer.spec.format, layer.spec.planes, layer.spec.groups) == ("grouped_int", 4, 2)
    assert torch.equal(layer.dequantize(), filled(4, table).dequantize())

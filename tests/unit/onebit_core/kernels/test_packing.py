"""The bit layout: what goes in comes out, and lies where the docstring draws it."""

import pytest
import torch

from onebit_core.kernels import num_words, pack_bits, pack_codes, pack_signs, unpack_bits, unpack_codes, unpack_signs

COLUMNS = [1, 7, 8, 31, 32, 33, 64, 100, 127, 128, 129, 576]


def random_bits(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.5


@pytest.mark.parametrize("columns", COLUMNS)
def test_bits_survive_packing(columns):
    """Pack and unpack are inverse for any number of columns."""
    bits_OI = random_bits(5, columns)
    words_OW = pack_bits(bits_OI)
    assert words_OW.dtype == torch.int32
    assert words_OW.shape == (5, num_words(columns))
    assert torch.equal(unpack_bits(words_OW, columns), bits_OI)


@pytest.mark.parametrize("column", [0, 1, 30, 31, 32, 50])
def test_a_bit_lies_where_the_format_says(column):
    """Column i is bit i % 32 of word i // 32; bit 31 is the sign of the int32."""
    bits_OI = torch.zeros(1, 64, dtype=torch.bool)
    bits_OI[0, column] = True
    expected = [0, 0]
    expected[column // 32] = 1 << (column % 32)
    assert [word % 2**32 for word in pack_bits(bits_OI)[0].tolist()] == expected


def test_padding_bits_are_zero():
    """Bits beyond the last column are 0 on disk."""
    assert pack_bits(torch.ones(1, 33, dtype=torch.bool))[0].tolist() == [-1, 1]


def test_one_means_negative_and_zero_counts_as_positive():
    """The sign bit follows IEEE, and sgn(0) = +1, for both zeros."""
    weight_OI = torch.tensor([[-1.5, 0.0, -0.0, 2.0]])
    assert pack_signs(weight_OI)[0].tolist() == [1]
    assert unpack_signs(pack_signs(weight_OI), 4)[0].tolist() == [-1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 33, 100])
def test_codes_survive_packing_at_their_exact_cost(bits, columns):
    """A code of b bits costs b planes, and comes back."""
    generator = torch.Generator().manual_seed(bits)
    codes_OI = torch.randint(0, 2**bits, (3, columns), generator=generator)
    planes_BOW = pack_codes(codes_OI, bits)
    assert planes_BOW.shape == (bits, 3, num_words(columns))
    assert torch.equal(unpack_codes(planes_BOW, columns).long(), codes_OI)

"""The largest entries found by columns are those that a sort finds."""

import pytest
import torch

from service.engine.ranking import BLOCK, largest, most

SIZES = [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 2999]


def rows_of(size, count=7):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", SIZES)
def test_largest_is_max_and_argmax(size):
    """Value and index, for rows that are no whole number of blocks too."""
    values = rows_of(size)
    value, index = largest(values)
    assert value.equal(values.amax(-1))
    assert index.equal(values.argmax(-1))


@pytest.mark.parametrize("size", SIZES)
def test_of_equal_entries_the_first_is_largest(size):
    """So that equal logits give the token that transformers gives."""
    values = torch.zeros(3, size)
    values[1, size // 2 :] = 1.0
    assert largest(values)[1].tolist() == [0, size // 2, 0]


def test_a_nan_is_the_largest():
    """A row that holds one is seen not to be finite."""
    values = rows_of(600)
    values[2, 599] = float("nan")
    assert largest(values)[0].isnan().tolist() == [row == 2 for row in range(7)]


def test_no_rows_have_no_largest():
    """A step that draws nothing."""
    assert [len(each) for each in largest(torch.empty(0, 10))] == [0, 0]


@pytest.mark.parametrize("number", [1, 2, 20, 64, 500])
@pytest.mark.parametrize("size", [500, 1000, 2999, 49_152])
def test_most_is_the_head_of_a_sort(size, number):
    """In order, with the right indices, wherever they stand."""
    values = rows_of(size, count=3)
    values[1] = values[1].sort().values  # all of them at the end, in the rest of the table
    values[2] = values[2].sort(descending=True).values
    expected = values.sort(dim=-1, descending=True)
    value, index = most(values, number)
    assert value.equal(expected.values[:, :number])
    assert values.gather(-1, index).equal(value)

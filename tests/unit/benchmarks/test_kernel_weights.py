"""Random weights of every format, and the check that no wrong kernel passes."""

import pytest
import torch

from benchmarks.kernel_bench import check
from benchmarks.kernel_bench.rivals import as_grid
from benchmarks.kernel_bench.shapes import FORMATS
from benchmarks.kernel_bench.weights import group_size, make_inputs, make_operands, stored_bytes
from onebit_core.kernels import unpack_bits
from onebit_core.kernels.planes import dense_weight
from onebit_core.kernels.reference import expand_groups


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_makes_outputs_of_usual_size(name):
    """Weights are finite, differ from row to row, and are the same each time."""
    weight = dense_weight(make_operands(name, 40, 576))
    assert weight.shape == (40, 576)
    assert 0.1 < (torch.randn(64, 576) @ weight.T).std() < 10
    assert not torch.equal(weight[0], weight[1])
    torch.testing.assert_close(dense_weight(make_operands(name, 40, 576)), weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bytes-8"])
def test_bits_are_as_mixed_as_in_real_weights(name):
    """About half of the bits are set, a quarter in a product of two; those of the pad are not."""
    operands = make_operands(name, 64, 100)
    for words in operands.planes[0].words_QOW:
        assert 0.2 < unpack_bits(words, 100).float().mean() < 0.56
        assert not unpack_bits(words, 128)[:, 100:].any()


def test_sparse_places_are_as_many_as_named():
    """Within the error of a sample."""
    sparse = make_operands("sparse-20", 128, 512).sparse
    assert sparse.codes_N.numel() == unpack_bits(sparse.bitmap_OW, 512).sum()
    assert sparse.codes_N.numel() / (128 * 512) == pytest.approx(0.2, abs=0.01)


def test_groups_divide_the_row():
    """128 columns, or as many as fit."""
    assert [group_size(columns) for columns in (4096, 576, 96, 100)] == [128, 64, 32, 100]


def test_an_unknown_format_is_refused():
    """By name."""
    with pytest.raises(ValueError, match="nothing-7"):
        make_operands("nothing-7", 8, 32)


def test_stored_bytes_count_every_tensor():
    """One plane of 64 x 128 bits, its coefficients and offsets, and the input scales."""
    assert stored_bytes(make_operands("sign", 64, 128)) == 64 * 128 // 8 + 2 * 64 * 4 + 128 * 4


@pytest.mark.parametrize("name", ["sign", "sign-1", "codes-2", "codes-4"])
def test_rivals_get_the_same_weight_as_a_grid(name):
    """Scale * (code - zero) is the dense weight, input scales apart."""
    operands = make_operands(name, 24, 256)
    codes, scale, zero, bits = as_grid(operands)
    weight = (codes - expand_groups(zero, 256)) * expand_groups(scale, 256)
    if operands.planes[0].scale_in_I is not None:
        weight = weight * operands.planes[0].scale_in_I
    assert int(codes.max()) < 2**bits
    torch.testing.assert_close(weight, dense_weight(operands), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sign-2", "levels-4", "sparse-10"])
def test_what_is_no_grid_is_not_given_to_rivals(name):
    """They would compute something else."""
    with pytest.raises(ValueError, match="grid"):
        as_grid(make_operands(name, 24, 256))


def test_one_wrong_output_among_many_is_found():
    """The largest error counts, so one bad row of 4000 is as bad as all."""
    weight, x = torch.randn(4000, 64), torch.randn(3, 64)
    rows = check.compared_rows(4000, 64, 3)
    exact = check.exact_product(weight, x, rows)
    assert check.largest_error(x @ weight.T, exact, rows) < 1e-5
    wrong = x @ weight.T
    wrong[1, 3999] += 1
    assert check.largest_error(wrong, exact, rows) > check.TOLERANCE[torch.float32]
    wrong[0, 0] = float("nan")
    assert check.largest_error(wrong, exact, rows) == float("inf")
    assert check.largest_error(wrong[:2], exact, rows) == float("inf")


def test_large_products_are_compared_on_a_sample_with_both_ends():
    """First and last rows are where tails go wrong."""
    rows = check.compared_rows(50_000, 8192, 256)
    assert check.SAMPLED_ROWS <= len(rows) < 3000
    assert {0, 63, 49_999 - 63, 49_999} <= set(rows.tolist())
    assert len(check.compared_rows(4096, 4096, 16)) == 4096


def test_inputs_have_the_large_channels_of_real_ones():
    """A few columns are several times larger, which is what quantizing activations finds hard."""
    x = make_inputs(200, 512, torch.float32, "cpu")
    spread = x.std(0)
    assert (spread > 4).sum() == 8
    assert make_inputs(2, 64, torch.bfloat16, "cpu").dtype == torch.bfloat16

"""The ops against dense float64 products, on odd shapes; and the rules torch.library sets for ops."""

import pytest
import torch

from onebit_core.kernels import int_matmul, num_words, pack_codes, pack_signs, salient_matmul, sign_matmul

EMPTY = torch.empty(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sign_operands(planes: int, rows: int, columns: int, groups: int = 0, shift_groups: int = 0):
    draw = generator(planes + rows + columns)
    signs = torch.randn(planes, rows, columns, generator=draw)
    scale_in = torch.rand(planes, columns, generator=draw).half()
    scale_out = torch.rand(planes, rows, generator=draw).half()
    group_scale = torch.rand(planes, rows, groups, generator=draw).half() if groups else EMPTY
    shift = torch.randn(rows, shift_groups, generator=draw).half() if shift_groups else EMPTY
    return signs, scale_in, scale_out, group_scale, shift


def dense_sign_weight(signs, scale_in, scale_out, group_scale, shift):
    """The formula of the op's docstring, entry by entry in float64."""
    planes, rows, columns = signs.shape
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for plane in range(planes):
                value = scale_out[plane, row].double() * scale_in[plane, column].double()
                if group_scale.numel():
                    group = column * group_scale.shape[2] // columns
                    value = value * group_scale[plane, row, group].double()
                weight[row, column] += -value if signs[plane, row, column] < 0 else value
            if shift.numel():
                weight[row, column] += shift[row, column * shift.shape[1] // columns].double()
    return weight


@pytest.mark.parametrize(
    ("planes", "rows", "columns", "groups", "shift_groups"),
    [(1, 1, 1, 0, 0), (1, 3, 33, 0, 0), (2, 5, 40, 4, 0), (1, 4, 36, 0, 1), (3, 2, 48, 3, 2), (1, 7, 31, 0, 1)],
)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_sign_matmul_is_its_formula(planes, rows, columns, groups, shift_groups, tokens):
    """Y = sum of scaled sign planes plus shift, to float32 accuracy."""
    signs, *scales = sign_operands(planes, rows, columns, groups, shift_groups)
    x = torch.randn(tokens, columns, generator=generator())
    expected = x.double() @ dense_sign_weight(signs, *scales).T
    actual = sign_matmul(x, pack_signs(signs), *scales)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_sign_matmul_is_exact_on_integers():
    """Integer inputs and unit scales give integers, bit for bit."""
    signs = torch.randn(1, 6, 100, generator=generator())
    x = torch.randint(-8, 8, (9, 100), generator=generator()).float()
    ones = torch.ones(1, 100), torch.ones(1, 6), EMPTY, EMPTY
    expected = x @ torch.where(signs[0] < 0, -1.0, 1.0).T
    assert torch.equal(sign_matmul(x, pack_signs(signs), *ones), expected)


def test_large_float16_inputs_do_not_overflow():
    """|x| of 1e3 over many columns would overflow a float16 sum; the op accumulates in float32."""
    signs = torch.ones(1, 2, 4096)
    x = torch.full((1, 4096), 1000.0, dtype=torch.float16)
    scales = torch.full((1, 4096), 1 / 1024).half(), torch.ones(1, 2).half(), EMPTY, EMPTY
    expected = torch.full((1, 2), 4000.0, dtype=torch.float16)
    assert torch.equal(sign_matmul(x, pack_signs(signs), *scales), expected)


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (3, 33, 3), (5, 64, 2)])
def test_int_matmul_is_its_formula(bits, rows, columns, groups):
    """Y = scale * (code - zero) summed over the row, group by group."""
    draw = generator(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=draw)
    zero = torch.randint(0, 2**bits, (rows, groups), generator=draw)
    scale = torch.rand(rows, groups, generator=draw).half()
    x = torch.randn(4, columns, generator=draw)
    group = torch.arange(columns) * groups // columns
    weight = (codes - zero[:, group]).double() * scale.double()[:, group]
    packed_zero = pack_codes(zero.reshape(1, -1), bits)[:, 0]
    assert packed_zero.shape == (bits, num_words(rows * groups))
    actual = int_matmul(x, pack_codes(codes, bits), scale, packed_zero)
    torch.testing.assert_close(actual.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-4)


def test_salient_matmul_adds_single_entries():
    """Each entry contributes delta * x[column] to its row."""
    x = torch.tensor([[1.0, 2.0, 3.0]])
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])
    actual = salient_matmul(x, rows, columns, torch.tensor([10.0, 1.0, -1.0]), 3)
    assert actual.tolist() == [[30.0, -2.0, 0.0]]


def test_leading_dimensions_are_kept():
    """X may have any leading shape."""
    signs, *scales = sign_operands(1, 3, 32)
    x = torch.randn(2, 4, 32, generator=generator())
    flat = sign_matmul(x.view(8, 32), pack_signs(signs), *scales)
    torch.testing.assert_close(sign_matmul(x, pack_signs(signs), *scales), flat.view(2, 4, 3))
    torch.testing.assert_close(sign_matmul(x[0, 0], pack_signs(signs), *scales), flat[0])


def test_wrong_width_is_refused():
    """An x of another width is an error with both numbers in it."""
    signs, *scales = sign_operands(1, 3, 32)
    with pytest.raises(ValueError, match="31 input features, the weight has 32"):
        sign_matmul(torch.zeros(1, 31), pack_signs(signs), *scales)


def test_ops_keep_the_rules_of_torch_library():
    """Schema, fake implementation and real one agree, so torch.compile may trace them."""
    signs, *scales = sign_operands(2, 3, 64, 2, 1)
    x = torch.randn(5, 64)
    tests = ("test_schema", "test_faketensor")
    results = [
        torch.library.opcheck(torch.ops.onebit.sign_matmul.default, (x, pack_signs(signs), *scales), test_utils=tests),
        torch.library.opcheck(
            torch.ops.onebit.int_matmul.default,
            (x, pack_codes(torch.zeros(3, 64, dtype=torch.int32), 2), torch.ones(3, 1), torch.zeros(2, 1).int()),
            test_utils=tests,
        ),
        torch.library.opcheck(
            torch.ops.onebit.salient_matmul.default,
            (x, torch.tensor([0]), torch.tensor([1]), torch.tensor([2.0]), 3),
            test_utils=tests,
        ),
    ]
    assert all(outcome == "SUCCESS" for result in results for outcome in result.values())

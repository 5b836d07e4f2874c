"""The ops against dense float64 products, on odd shapes; and the rules torch.library sets for ops."""

import pytest
import torch

from onebit_core.errors import BackendUnavailable, KernelError
from onebit_core.kernels import (
    LinearOperands,
    Packed,
    code_terms,
    dense_weight,
    factor_matmul,
    int_matmul,
    lut_matmul,
    num_words,
    pack_codes,
    pack_signs,
    packed_backend,
    packed_matmul,
    resolve_backend,
    salient_matmul,
    sign_matmul,
    unpack_signs,
)

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


@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (3, 33, 3), (5, 64, 2)])
def test_lut_matmul_is_its_formula(rows, columns, groups):
    """Every weight is one of the four levels of its group."""
    draw = generator(rows)
    index = torch.randint(0, 4, (rows, columns), generator=draw)
    levels = torch.randn(rows, groups, 4, generator=draw)
    x = torch.randn(4, columns, generator=draw)
    weight = torch.tensor(
        [[levels[o, i * groups // columns, index[o, i]].item() for i in range(columns)] for o in range(rows)]
    )
    actual = lut_matmul(x, pack_codes(index, 2), levels)
    torch.testing.assert_close(actual.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (7, 40, 33)])
def test_factor_matmul_is_its_formula(rows, columns, rank):
    """Y = u * (U (v * (V (g * x)))), in float64."""
    draw = generator(rank)
    down, up = torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)
    scales = [torch.rand(size, generator=draw) for size in (columns, rank, rows)]
    x = torch.randn(4, columns, generator=draw)
    scale_in, scale_mid, scale_out = (scale.double() for scale in scales)
    v, u = (unpack_signs(pack_signs(factor), factor.shape[1]).double() for factor in (down, up))
    expected = (((x.double() * scale_in) @ v.T * scale_mid) @ u.T) * scale_out
    actual = factor_matmul(x, pack_signs(down), pack_signs(up), *scales)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def packed_on_cpu() -> tuple[LinearOperands, Packed]:
    """A weight of 3-bit codes in groups, packed for the C backend; skips where that one cannot run."""
    try:
        resolve_backend("cpu")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    draw = generator()
    codes, zero = torch.randint(0, 8, (6, 64), generator=draw), torch.randint(0, 8, (1, 12), generator=draw)
    terms = code_terms(pack_codes(codes, 3), torch.rand(6, 2, generator=draw), pack_codes(zero, 3)[:, 0])
    operands = LinearOperands(out_features=6, in_features=64, planes=terms, bias_O=torch.randn(6, generator=draw))
    return operands, packed_backend("cpu").pack(operands)


def test_packed_matmul_takes_any_leading_shape():
    """Also none at all, no tokens, and an x whose columns are not contiguous."""
    operands, packed = packed_on_cpu()
    weight, bias = dense_weight(operands).double(), operands.bias_O.double()
    for shape in ((64,), (0, 64), (2, 3, 64), (2, 0, 64)):
        x = torch.randn(*shape, generator=generator())
        torch.testing.assert_close(
            packed_matmul(x, packed).double(), x.double() @ weight.T + bias, rtol=1e-3, atol=1e-3
        )
    row = torch.randn(1, 64, generator=generator())
    for x in (torch.randn(64, 5, generator=generator()).T, row.expand(4, 64), row[0].repeat(3).unfold(0, 64, 8)):
        torch.testing.assert_close(packed_matmul(x, packed), packed_matmul(x.contiguous(), packed), rtol=0, atol=0)
    assert packed_matmul(row.double(), packed).dtype == torch.float64


def test_packed_matmul_refuses_a_layout_of_another_weight():
    """The sizes a caller states are compared with the packed weight's own before anything is written."""
    _, packed = packed_on_cpu()
    for layout in ((5, 64, 0), (7, 64, 0)):
        with pytest.raises(KernelError, match="size"):
            packed_matmul(torch.zeros(1, 64), Packed(parts=packed.parts, layout=layout))


def test_packed_matmul_refuses_another_width():
    """With both numbers in the message."""
    _, packed = packed_on_cpu()
    with pytest.raises(ValueError, match="63 input features, the weight has 64"):
        packed_matmul(torch.zeros(1, 63), packed)


def test_packed_matmul_is_one_opaque_op_to_the_compiler():
    """Fullgraph and dynamic shapes: one graph serves every number of tokens."""
    _, packed = packed_on_cpu()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return packed_matmul(x * 2, packed) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, 64, generator=generator(tokens))
        torch.testing.assert_close(compiled(x), layer(x))


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
        torch.library.opcheck(
            torch.ops.onebit.lut_matmul.default,
            (x, pack_codes(torch.zeros(3, 64, dtype=torch.int32), 2), torch.ones(3, 2, 4)),
            test_utils=tests,
        ),
        torch.library.opcheck(
            torch.ops.onebit.factor_matmul.default,
            (x, pack_signs(torch.ones(4, 64)), pack_signs(torch.ones(3, 4)), *map(torch.ones, (64, 4, 3))),
            test_utils=tests,
        ),
    ]
    assert all(outcome == "SUCCESS" for result in results for outcome in result.values())


def test_the_packed_op_keeps_the_rules_of_torch_library():
    """Like the others, with a list of tensors and a list of sizes."""
    _, packed = packed_on_cpu()
    outcome = torch.library.opcheck(
        torch.ops.onebit.packed_matmul.default,
        (torch.randn(5, 64), list(packed.parts), list(packed.layout)),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert all(result == "SUCCESS" for result in outcome.values())

"""The compute form stands for exactly the weight that the reference of each op dequantizes."""

import pytest
import torch

from onebit_core.kernels import (
    LinearOperands,
    SparseTerm,
    byte_operands,
    code_terms,
    concatenate,
    dense_weight,
    factor_operands,
    int_dequantize,
    level_terms,
    lut_dequantize,
    pack_bits,
    pack_codes,
    pack_signs,
    sign_dequantize,
    sign_terms,
    unpack_signs,
)

EMPTY = torch.empty(0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands_of(terms, rows: int, columns: int, **more) -> LinearOperands:
    return LinearOperands(out_features=rows, in_features=columns, planes=terms, **more)


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("with_input_scale", [False, True])
@pytest.mark.parametrize(("groups", "shift_groups"), [(0, 0), (4, 0), (0, 1), (4, 2)])
def test_sign_terms_are_the_sign_planes(planes, with_input_scale, groups, shift_groups):
    """Also with groups, shifts and input scales per plane."""
    rows, columns = 5, 40
    signs = pack_signs(draw(planes, rows, columns))
    scale_in = draw(planes, columns, seed=1).half() if with_input_scale else None
    scale_out = draw(planes, rows, seed=2).half()
    group_scale = draw(planes, rows, groups, seed=3).half() if groups else None
    shift = draw(rows, shift_groups, seed=4).half() if shift_groups else None
    terms = sign_terms(signs, scale_in_PI=scale_in, scale_out_PO=scale_out, group_scale_POG=group_scale, shift_OG=shift)
    expected = sign_dequantize(
        signs,
        torch.ones(planes, columns) if scale_in is None else scale_in,
        scale_out,
        EMPTY if group_scale is None else group_scale,
        EMPTY if shift is None else shift,
    )
    torch.testing.assert_close(dense_weight(operands_of(terms, rows, columns)), expected, rtol=1e-5, atol=1e-5)


def test_code_terms_are_the_integer_grid():
    """S * (q - z) per group."""
    codes = torch.randint(0, 8, (5, 48), generator=torch.Generator().manual_seed(0))
    zero = torch.randint(0, 8, (5, 3), generator=torch.Generator().manual_seed(1))
    stored = pack_codes(codes, 3), draw(5, 3).half(), pack_codes(zero.reshape(1, -1), 3)[:, 0]
    weight = dense_weight(operands_of(code_terms(*stored), 5, 48))
    torch.testing.assert_close(weight, int_dequantize(*stored, 48), rtol=1e-5, atol=1e-5)


def test_level_terms_are_four_free_levels():
    """Any four numbers per group, by two index bits and their product."""
    index = torch.randint(0, 4, (5, 48), generator=torch.Generator().manual_seed(0))
    planes, levels = pack_codes(index, 2), draw(5, 3, 4)
    weight = dense_weight(operands_of(level_terms(planes, levels), 5, 48))
    torch.testing.assert_close(weight, lut_dequantize(planes, levels, 48), rtol=1e-5, atol=1e-5)


def test_factor_operands_multiply_to_the_factors():
    """W = diag(u) U diag(v) V diag(g)."""
    signs_down, signs_up = pack_signs(draw(6, 40)), pack_signs(draw(9, 6, seed=1))
    scale_in, scale_mid, scale_out = draw(40, seed=2), draw(6, seed=3), draw(9, seed=4)
    down, up = factor_operands(signs_down, signs_up, scale_in_I=scale_in, scale_mid_R=scale_mid, scale_out_O=scale_out)
    expected = (
        scale_out[:, None]
        * (unpack_signs(signs_up, 6) @ (scale_mid[:, None] * unpack_signs(signs_down, 40)))
        * scale_in
    )
    torch.testing.assert_close(dense_weight(up) @ dense_weight(down), expected, rtol=1e-5, atol=1e-4)


def sparse_part(rows: int, columns: int, seed: int) -> SparseTerm:
    mask = draw(rows, columns, seed=seed) > 1
    return SparseTerm(
        bitmap_OW=pack_bits(mask),
        codes_N=(torch.arange(int(mask.sum())) % 256).to(torch.uint8),
        scale_O=draw(rows, seed=seed + 1),
        zero_O=torch.full((rows,), 7, dtype=torch.uint8),
    )


def test_weights_of_one_input_become_one_weight():
    """Rows one below the other; a part that one member lacks is empty for it."""
    members = [
        operands_of(
            sign_terms(
                pack_signs(draw(1, rows, 40, seed=rows)),
                scale_in_PI=None,
                scale_out_PO=draw(1, rows, seed=1),
                group_scale_POG=None,
                shift_OG=None,
            ),
            rows,
            40,
            sparse=sparse_part(rows, 40, rows) if rows > 3 else None,
            bias_O=draw(rows) if rows < 6 else None,
        )
        for rows in (6, 3, 4)
    ]
    joined = concatenate(members)
    assert joined is not None
    assert torch.equal(dense_weight(joined), torch.cat([dense_weight(member) for member in members]))
    assert torch.equal(joined.bias_O, torch.cat([torch.zeros(6), draw(3), draw(4)]))


def test_weights_of_different_structure_stay_apart():
    """Another number of planes, other groups, other input scales, another format: no common weight."""

    def signs(planes=1, groups=None, scale_in=None) -> LinearOperands:
        group_scale = None if groups is None else torch.ones(planes, 2, groups)
        terms = sign_terms(
            pack_signs(draw(planes, 2, 32)),
            scale_in_PI=scale_in,
            scale_out_PO=None,
            group_scale_POG=group_scale,
            shift_OG=None,
        )
        return operands_of(terms, 2, 32)

    codes = code_terms(pack_codes(torch.zeros(2, 32).int(), 1), torch.ones(2, 1), torch.zeros(1, 1).int())
    others = [signs(planes=2), signs(groups=2), signs(scale_in=torch.ones(1, 32)), operands_of(codes, 2, 32)]
    assert concatenate([signs(), signs()]) is not None
    assert [concatenate([signs(), other]) for other in others] == [None] * len(others)
    assert concatenate([signs(scale_in=torch.ones(1, 32)), signs(scale_in=torch.ones(1, 32))]) is not None
    assert concatenate([signs(scale_in=torch.ones(1, 32)), signs(scale_in=draw(1, 32))]) is None
    head = byte_operands(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2))
    assert concatenate([head, head]) is None

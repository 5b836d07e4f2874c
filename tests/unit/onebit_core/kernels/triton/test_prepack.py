"""Bit order on the GPU: packing loses nothing, and every bit lies where the tensor core wants it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebit_core.kernels.packing import pack_bits
from onebit_core.kernels.planes import LinearOperands, PlaneTerm
from onebit_core.kernels.triton.layout import FORMAT, PLANES_KIND, Plan, plan_of
from onebit_core.kernels.triton.prepack import Stack, pack_fragments, pack_planes, unpack_fragments


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 700), half_bits=st.sampled_from([8, 16]), seed=st.integers(0, 99)
)
def test_unpacking_undoes_packing(rows, columns, half_bits, seed):
    bits = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(bits)
    fragments = pack_fragments(words, columns, half_bits)
    assert fragments.shape == (-(-columns // 128), rows, 4)
    assert torch.equal(unpack_fragments(fragments, columns, half_bits), words)


@pytest.mark.parametrize("column", [0, 1, 7, 8, 77, 127, 128, 200])
def test_column_8j_plus_e_is_bit_j_of_half_e(column):
    bits = torch.zeros(1, 256, dtype=torch.bool)
    bits[0, column] = True
    fragments = pack_fragments(pack_bits(bits), 256)
    half, bit = column % 128 % 8, column % 128 // 8
    halves = fragments.view(torch.int16).view(2, 8)
    assert int(halves.count_nonzero()) == 1
    assert int(halves[column // 128, half]) & 0xFFFF == 1 << bit


def test_a_thread_owns_the_columns_of_its_fragment():
    """Thread c of a quad holds word c; the instruction wants columns 2c, 2c + 1, 2c + 8, 2c + 9 of 16 from it."""
    for column in range(128):
        bits = torch.zeros(1, 128, dtype=torch.bool)
        bits[0, column] = True
        (word,) = pack_fragments(pack_bits(bits), 128)[0, 0].nonzero()[0].tolist()
        assert column % 8 // 2 == word


@pytest.mark.parametrize(
    ("size", "groups", "stored_size", "parts"),
    [(128, 3, 128, 1), (256, 2, 256, 1),
     (64, 4, 64, 2), (32, 4, 32, 4), (96, 4, 32, 4), (16, 8, 16, 0), (300, 1, 300, 1)],
)  # fmt: skip
def test_groups_are_cut_to_parts_of_a_block(size, groups, stored_size, parts):
    term = PlaneTerm(
        words_QOW=pack_bits(torch.rand(1, 6, size * groups) < 0.5), coefficient_COG=torch.rand(1, 6, groups)
    )
    (stack,), (tensors,) = pack_planes(LinearOperands(out_features=6, in_features=size * groups, planes=(term,)))
    assert (stack.group_size, stack.parts) == (stored_size, parts)
    assert tensors[1].shape == (1, 1, stack.groups, 6)
    assert stack.groups * stack.group_size == size * groups


def test_signs_need_no_shift_and_exact_halves_are_stored_as_halves():
    scale = torch.rand(1, 8, 2).half().float()
    term = PlaneTerm(
        words_QOW=pack_bits(torch.rand(1, 8, 256) < 0.5), coefficient_COG=-2 * scale, offset_OG=scale.sum(0)
    )
    (stack,), (tensors,) = pack_planes(LinearOperands(out_features=8, in_features=256, planes=(term,)))
    assert not stack.has_shift
    assert tensors[1].dtype == torch.float16
    assert torch.equal(tensors[1][0, 0].T.float(), scale[0])


def test_large_input_scales_move_into_the_coefficients():
    """A power of two moves, so that no digit is lost."""
    gain = torch.rand(300) * 1000
    coefficient = torch.rand(1, 4, 1)
    term = PlaneTerm(
        words_QOW=pack_bits(torch.rand(1, 4, 300) < 0.5), coefficient_COG=coefficient, scale_in_I=gain
    )  # fmt: skip
    _, (tensors,) = pack_planes(LinearOperands(out_features=4, in_features=300, planes=(term,)))
    words, packed_coefficient, shift, packed_gain = tensors
    factor = float(gain[0] / packed_gain[0, 0])
    assert float(packed_gain.abs().max()) <= 16
    assert torch.equal(packed_gain[0, :300] * factor, gain)
    assert torch.equal(packed_coefficient[0, 0, 0], -coefficient[0, :, 0] / 2 * factor)
    assert not packed_gain[0, 300:].any()
    assert words.shape == (1, 1, 3, 4, 4)
    assert shift.shape == (1, 1, 4)


def test_the_layout_carries_the_plan():
    plan = Plan(70, 300, PLANES_KIND, (Stack(2, 1, 1, 1, 300, 0, 1), Stack(1, 3, 0, 3, 100, 1, 0)), True, (1, 3, 0))
    layout = plan.to_layout()
    assert plan_of(layout) == plan
    assert layout[:4] == (70, 300, 1, FORMAT)
    assert plan.products == 2 + 4
    assert plan.group_size == 100

"""The GPU kernels' arithmetic, run by Triton's interpreter on the CPU; `test_interpreter.py` starts this file.

The interpreter is chosen when Triton is imported, so these cases need a process of their own.
"""

import pytest
import torch

from onebit_core.kernels import triton as backend
from onebit_core.kernels.planes import LinearOperands, PlaneTerm
from onebit_core.kernels.triton import launch, tiles, workspace
from onebit_core.kernels.triton.layout import parts_of, plan_of
from onebit_core.layers import LutLinear, SignLinear, SplitLinear, use_backend
from tests.support.random_operands import STRUCTURES, error_of, grouped, plane_term, shift_term, sparse_term

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check(operands: LinearOperands, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    packed = backend.pack(operands)
    x = torch.randn(tokens, operands.in_features).to(dtype)
    y = backend.matmul(x, packed.parts, packed.layout)
    assert y.dtype == dtype
    assert y.shape == (tokens, operands.out_features)
    if tokens:
        assert error_of(y, x, operands) < TOLERANCE[dtype]
    assert not any(int(counter.count_nonzero()) for counter in workspace._by_stream.values())


def test_the_interpreter_runs_here():
    assert launch.EMULATE
    assert backend.why_unavailable() is None
    assert "interpreter" in backend.describe()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("tokens", [0, 3, 33])
def test_product_equals_the_dense_weight(structure, tokens):
    check(STRUCTURES[structure](70, 300, "cpu"), tokens)


@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (70, 1), (33, 8), (17, 128), (64, 257), (130, 1024)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_odd_shapes(rows, columns, tokens):
    check(STRUCTURES["sign with shift and bias"](rows, columns, "cpu"), tokens)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("group_size", [16, 20, 32, 64, 96, 128, 256])
def test_groups_of_any_size(group_size, code):
    check(grouped(40, group_size, code=code), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("structure", ["sign with input scale", "code of 4 bits", "salient", "bytes"])
def test_half_precision(structure, dtype):
    check(STRUCTURES[structure](40, 300, "cpu"), 3, dtype)


@pytest.mark.parametrize("structure", ["three planes", "salient", "bytes", "two terms with input scales"])
def test_many_tokens_take_the_dense_path(structure, monkeypatch):
    """Chunks of rows give what one product gives."""
    monkeypatch.setattr(launch, "DENSE_CHUNK_WEIGHTS", 300 * 32)
    check(STRUCTURES[structure](70, 300, "cpu"), 2048)


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize(("rows", "warps"), [(16, 1), (32, 2), (64, 4), (128, 8), (128, 4)])
def test_every_tile_gives_the_same_integers(rows, warps, columns):
    """Small integers are exact in every order, so that tiles, stages and splits must agree bit for bit."""
    operands = STRUCTURES["sign"](100, 1024, "cpu")
    packed = backend.pack(operands)
    plan = plan_of(packed.layout)
    x = torch.randint(-8, 9, (9, 1024)).float()
    for splits in (1, 3, 4):
        tile = tiles.Tile(rows, 16, columns, warps, 3, splits)
        y = launch.packed_matmul(x, parts_of(plan, packed.parts), plan, tile)
        assert error_of(y, x, operands) < 1e-7


def test_split_sums_are_deterministic_and_counters_return_to_zero():
    operands = STRUCTURES["sign with input scale"](100, 2048, "cpu")
    packed = backend.pack(operands)
    plan = plan_of(packed.layout)
    x = torch.randn(5, 2048)
    tile = tiles.Tile(64, 8, 128, 4, 3, 4)
    results = [launch.packed_matmul(x, parts_of(plan, packed.parts), plan, tile) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not int(workspace.counters(x.device).count_nonzero())


def test_a_token_with_nan_spoils_no_other():
    operands = STRUCTURES["salient"](40, 300, "cpu")
    packed = backend.pack(operands)
    x = torch.randn(3, 300)
    expected = backend.matmul(x, packed.parts, packed.layout)
    x[1, 7] = torch.nan
    y = backend.matmul(x, packed.parts, packed.layout)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], expected[::2])


def test_large_float16_inputs_do_not_overflow():
    """|x| of 1000 times an input scale of 200 is beyond float16; the scale is packed smaller."""
    term = plane_term(32, 256)
    scaled = PlaneTerm(
        words_QOW=term.words_QOW,
        coefficient_COG=term.coefficient_COG / 1e4,
        offset_OG=None if term.offset_OG is None else term.offset_OG / 1e4,
        scale_in_I=torch.full((256,), 200.0),
    )
    operands = LinearOperands(out_features=32, in_features=256, planes=(scaled,))
    packed = backend.pack(operands)
    x = torch.full((2, 256), 1000.0, dtype=torch.float16)
    y = backend.matmul(x, packed.parts, packed.layout)
    assert y.isfinite().all()
    assert error_of(y, x, operands) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inputs_may_be_strided(dtype):
    operands = STRUCTURES["sign"](40, 300, "cpu")
    packed = backend.pack(operands)
    wide = torch.randn(7, 812).to(dtype)
    for x in (wide[:, :300], wide[::2, 5:305], wide[:, ::2][:, :300], wide[:1, :300].expand(4, 300)):
        assert error_of(backend.matmul(x, packed.parts, packed.layout), x, operands) < TOLERANCE[dtype]


def test_shifts_ride_with_planes_that_have_their_groups():
    """One stack in place of two, with the same result; an input scale or foreign groups keep them apart."""
    for host, groups, stacks in (
        (plane_term(20, 300, 1, 3), 1, 1),
        (plane_term(20, 300, 1, 3), 3, 1),
        (plane_term(20, 300), 3, 2),
        (plane_term(20, 300, gain=True), 1, 2),
    ):
        operands = LinearOperands(
            out_features=20,
            in_features=300,
            planes=(host, shift_term(20, 300, groups)),
            sparse=sparse_term(20, 300),
        )
        assert len(plan_of(backend.pack(operands).layout).stacks) == stacks
        check(operands, 3)


@pytest.mark.parametrize("structure", ["sign with shift and bias", "salient", "code of 4 bits"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_int8_activations_cost_about_a_percent(structure, tokens):
    operands = STRUCTURES[structure](70, 300, "cpu")
    packed = backend.pack(operands, act="int8")
    x = torch.randn(tokens, 300)
    assert plan_of(packed.layout).kind == 2
    assert 1e-4 < error_of(backend.matmul(x, packed.parts, packed.layout), x, operands) < 2e-2


def test_int8_activations_are_exact_for_small_integers_and_keep_nan():
    operands = STRUCTURES["sign"](70, 300, "cpu")
    packed = backend.pack(operands, act="int8")
    x = torch.randint(-127, 128, (4, 300)).float()
    x[:, 0] = 127
    x[3] = 0
    assert error_of(backend.matmul(x, packed.parts, packed.layout), x, operands) < 1e-6
    x[1, 5] = torch.nan
    y = backend.matmul(x, packed.parts, packed.layout)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_split_layer_sums_its_parts(tokens, dtype):
    """Each part is a product of its own on its columns; groups of 27 columns take the dense path."""
    residual = SignLinear.from_parts(
        torch.randn(2, 40, 25), group_scale_POG=torch.rand(2, 40, 5), shift_OG=torch.randn(40, 5)
    )
    levels = LutLinear.from_levels(torch.randint(0, 4, (40, 135)), torch.randn(40, 5, 4))
    first = torch.arange(160) % 32 < 5
    layer = SplitLinear.from_layers(first, (residual, levels))
    layer.set_bias(torch.randn(40))
    x = torch.randn(tokens, 160).to(dtype)
    expected = x.double() @ layer.dequantize().double().T + layer.bias.double()
    use_backend(layer, "triton")
    y = layer(x)
    assert y.dtype == dtype
    assert layer.packed_bytes() > 0
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
